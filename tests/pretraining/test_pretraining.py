"""The pieces that pretraining stands on: optimizer, VAE start and evaluation, encoders, resuming, growing, export."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from loraedit_ext.evaluation.captions import VOCABULARY
from loraedit_ext.evaluation.rendering import Rendered, render
from loraedit_ext.evaluation.scenes import Scene, random_scene
from models.wan import whole_clip
from models.wan.checkpoint import WanCheckpoint
from models.wan.save import write_checkpoint
from pretraining import (
    clips,
    encoders,
    evaluate,
    export,
    freeze,
    hunyuan,
    latents,
    loop,
    sensitivity,
    transformer,
    vae,
)
from pretraining.conditioning import Conditioner
from pretraining.grow import deepened, depth, widened
from pretraining.muon import Muon, orthogonalise, split_parameters


@pytest.fixture(scope="module")
def start() -> vae.AutoencoderKLWan:
    return vae.build().requires_grad_(False)


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    return clips.held_out_videos(2)[:, :, :5, :32, 16:48].contiguous()


@pytest.mark.parametrize("shape", [(32, 32), (24, 100), (100, 24), (16, 400), (3, 20, 30)])
def test_orthogonalise_flattens_the_spectrum_and_keeps_the_directions(shape: tuple[int, ...]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix)
    cores = u.mT @ result @ v.mT
    values = cores.diagonal(dim1=-2, dim2=-1)
    assert values.min() > 0.4
    assert values.max() < 1.35
    assert (cores - torch.diag_embed(values)).abs().max() < 0.06


def test_muon_takes_matrices_and_steps_by_the_learning_rate() -> None:
    layer = torch.nn.Conv3d(16, 32, 3)
    matrices, rest = split_parameters(layer)
    assert [tuple(weight.shape) for weight in matrices] == [(32, 16, 3, 3, 3)]
    assert [tuple(weight.shape) for weight in rest] == [(32,)]
    before = layer.weight.detach().clone()
    layer(torch.randn(2, 16, 4, 5, 5)).square().mean().backward()
    Muon(matrices, lr=1e-2).step()
    change = (layer.weight - before).flatten(1)
    norms = torch.linalg.svdvals(change) / (1e-2 * 0.2 * math.sqrt(16 * 27))
    assert norms.max() < 1.35
    assert (change * layer.weight.grad.flatten(1)).sum() < 0  # downhill


def test_whole_clip_evaluation_equals_the_chunked_library(start: vae.AutoencoderKLWan, videos: torch.Tensor) -> None:
    mean, logvar = whole_clip.encode_moments(start, videos)
    posterior = start.encode(videos).latent_dist
    torch.testing.assert_close(mean, posterior.mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logvar, posterior.logvar, atol=1e-5, rtol=1e-4)
    output = whole_clip.decode(start, mean).clamp(-1, 1)
    torch.testing.assert_close(output, start.decode(mean).sample, atol=1e-4, rtol=1e-4)


def test_structured_start_is_nearly_a_block_average_before_training(start: vae.AutoencoderKLWan) -> None:
    """Compared with 8x8 averages of the same pictures, because an absolute bound moves with the scenes."""
    videos = clips.held_out_videos(8)[:, :, :5].contiguous()
    average = torch.nn.functional.avg_pool3d(videos, (1, 8, 8))
    blocks = vae.psnr(torch.nn.functional.interpolate(average, scale_factor=(1, 8, 8)), videos)
    mean, _ = whole_clip.encode_moments(start, videos)
    assert vae.psnr(whole_clip.decode(start, mean), videos) > blocks - 4  # a random start: 13 below


def test_freezing_normalises_the_latents_and_keeps_the_pictures(
    start: vae.AutoencoderKLWan, videos: torch.Tensor
) -> None:
    frozen = vae.AutoencoderKLWan(base_dim=vae.BASE_DIM)
    frozen.load_state_dict(start.state_dict())
    before = whole_clip.decode(frozen, whole_clip.encode_moments(frozen, videos)[0])
    measured, _ = whole_clip.encode_moments(frozen, videos)
    freeze.normalise(frozen, measured.mean((0, 2, 3, 4)), measured.std((0, 2, 3, 4)))
    mean, logvar = whole_clip.encode_moments(frozen, videos)
    shift, scale = latents.statistics(frozen)
    unit = (mean - shift) / scale
    torch.testing.assert_close(unit.mean((0, 2, 3, 4)), torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(unit.std((0, 2, 3, 4)), torch.ones(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(whole_clip.decode(frozen, mean), before, atol=1e-3, rtol=0)
    _, old = whole_clip.encode_moments(start, videos)
    spread = scale / measured.std((0, 2, 3, 4)).view_as(scale)
    torch.testing.assert_close(logvar, old + 2 * spread.log(), atol=1e-3, rtol=1e-3)


def test_training_and_held_out_seeds_never_meet() -> None:
    rng = clips.np.random.default_rng(0)
    assert min(clips.training_seed(rng) for _ in range(1000)) >= clips.HELD_OUT


def pace(slow: Scene, full: Scene) -> float:
    """Of a panning scene."""
    return slow.pan[0] / full.pan[0]


def test_training_clips_are_calm_as_a_rule() -> None:
    rng, scene = clips.np.random.default_rng(0), random_scene(0, panning=True)
    paces = sorted(pace(clips.at_some_pace(scene, rng), scene) for _ in range(1000))
    assert paces[0] >= 0.05
    assert paces[500] == pytest.approx(0.11, abs=0.02)
    assert sum(value <= 0.25 for value in paces) == pytest.approx(680, abs=45)
    assert sum(value > 0.5 for value in paces) == pytest.approx(170, abs=36)


def test_held_out_scenes_are_calm_and_fixed_by_their_seeds() -> None:
    pairs = [(clips.held_out_scene(seed), random_scene(seed)) for seed in range(400)]
    paces = [pace(slow, full) for slow, full in pairs if full.pan[0]]
    assert 0.05 <= min(paces) <= max(paces) <= 0.25
    assert sum(paces) / len(paces) == pytest.approx(0.05 + 0.2 / 3, abs=0.015)
    assert clips.held_out_scene(3) == pairs[3][0]
    with pytest.raises(ValueError, match="held-out scenes lie below"):
        clips.held_out_scene(clips.HELD_OUT)


def test_conditions_are_frame_zero_then_grey(videos: torch.Tensor) -> None:
    condition = clips.first_frame_condition(videos)
    assert torch.equal(condition[:, :, 0], videos[:, :, 0])
    assert not condition[:, :, 1:].any()
    y = transformer.conditioning(torch.randn(2, 16, 4, 8, 8))
    assert y[:, :4, 0].eq(1).all()
    assert y[:, :4, 1:].eq(0).all()


def test_tokenizer_knows_the_vocabulary_and_falls_back_to_characters() -> None:
    tokenizer = encoders.build_tokenizer()
    for word in (*VOCABULARY, encoders.TRIGGER):
        assert len(tokenizer.encode(word).ids) == 2, word  # the word and the end token
    foreign = tokenizer.encode("a zebra ☃")
    assert tokenizer.token_to_id("<unk>") not in foreign.ids
    assert tokenizer.decode(foreign.ids) == "a zebra ☃"


def test_features_tell_words_order_and_pictures_apart(videos: torch.Tensor) -> None:
    conditioner = Conditioner()
    first = conditioner.text("red ball, blue disc")
    for other in ("blue ball, red disc", "blue disc, red ball", "red ball, blue disc, camera still"):
        difference = (conditioner.text(other) - first).norm() / first.norm()
        assert difference > 0.3, other
    assert first.shape == (encoders.TEXT_LEN, encoders.TEXT_DIM)
    one, two = conditioner.image(videos[:, :, 0])
    assert one.shape == (17, encoders.IMAGE_DIM)
    assert (one - two).norm() / one.norm() > 0.3


def test_training_forward_equals_the_models_and_reaches_every_parameter() -> None:
    model = transformer.build(replace(transformer.tiny_config(), num_layers=1))
    torch.nn.init.normal_(model.head.head.weight)
    inputs = velocity_inputs()
    output = transformer.velocity(model, *inputs)
    torch.testing.assert_close(output, model(*inputs))
    output.square().mean().backward()
    # A key's bias shifts all logits of a query alike, so that its gradient is zero up to rounding.
    idle = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not idle


def make_pool(folder: Path, start: vae.AutoencoderKLWan, size: int) -> Path:
    conditioner = Conditioner()

    def encode(scenes: list) -> latents.LatentPool:
        return latents.encode_scenes(start, conditioner, scenes[:4], latents.FUTURES, size=size)

    latents.fill(folder, encode, shards=range(2), minutes=None)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, start: vae.AutoencoderKLWan) -> Path:
    return make_pool(tmp_path_factory.mktemp("latents"), start, 64)


def options(pool: Path, out: Path, steps: int) -> transformer.Options:
    return transformer.Options(out=out, steps=steps, latents=(pool,), batch=2, windows=0.5)


def test_windows_are_cut_alike_out_of_clip_and_condition_on_the_grid_of_tokens() -> None:
    """Each latent holds its own place, so that a window tells where it was cut."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    place = torch.stack([rows, columns]).unsqueeze(1).expand(64, 2, 4, 16, 16)
    words = torch.arange(64.0).view(64, 1, 1)
    objects = torch.ones(64, 16, 16)
    found = latents.LatentPool(place, place + 100, words, words, objects).windows(torch.Generator().manual_seed(0))
    assert found.video.shape == (64, 2, 4, 8, 8)
    assert torch.equal(found.condition, found.video + 100)
    assert torch.equal(found.text, words)
    corners = found.video[:, :, 0, 0, 0]
    assert torch.equal(found.video - corners[..., None, None, None], place[..., :8, :8])
    assert {tuple(corner) for corner in corners.tolist()} <= {(a, b) for a in range(0, 9, 2) for b in range(0, 9, 2)}
    assert set(corners.flatten().tolist()) == {0, 2, 4, 6, 8}


def test_windows_show_the_objects() -> None:
    """One object a clip, one latent large: nearly every window holds it, wherever it is, and not always at one place."""
    objects = torch.zeros(256, 16, 16)
    rows, columns = torch.randint(0, 16, (2, 256), generator=torch.Generator().manual_seed(1))
    objects[torch.arange(256), rows, columns] = 100 * 256 * latents._ANYWHERE
    video = objects[:, None, None].expand(-1, 1, 4, -1, -1)
    found = latents.LatentPool(video, video, objects, objects, objects).windows(torch.Generator().manual_seed(0))
    assert torch.equal(found.video[:, 0, 0], found.objects)
    held = found.objects > 0
    assert held.flatten(1).any(1).float().mean() > 0.95
    assert held.any(0).float().mean() > 0.8


def test_a_folder_of_other_shards_is_refused_by_name(tmp_path: Path) -> None:
    """Before windows were cut around objects, shards did not say where these are."""
    save_file({"video": torch.zeros(1), "text": torch.zeros(1)}, tmp_path / "00000.safetensors")
    with pytest.raises(UserError, match=r"00000\.safetensors: holds text, video; expected .*objects.* make the folder again"):
        latents.load_shards(tmp_path, set())


def test_object_shares_are_those_of_the_picture() -> None:
    seen = np.zeros((2, 4, 32, 16), np.float32)
    seen[0, :2, 8:16, :8] = 0.5
    seen[1, :, 8:16, :4] = 0.5
    share = latents.object_share(Rendered(seen[0, ..., None], seen, seen))
    expected = torch.zeros(4, 2)
    expected[1, 0] = 0.5 / 2 + 0.5 / 2
    assert torch.equal(share, expected)


def test_a_step_on_windows_sees_four_times_as_many_clips(pool: Path, tmp_path: Path) -> None:
    sizes = []
    for share in (0.0, 1.0):
        training = transformer.TransformerTraining(replace(options(pool, tmp_path, 1), windows=share))
        sizes.append(training._clips(training.generator()).video.shape)
        assert training.train_step()["loss"] > 0
    assert sizes == [(2, 16, 4, 8, 8), (8, 16, 4, 4, 4)]


@pytest.mark.parametrize("training", [transformer.TransformerTraining, hunyuan.HunyuanTraining])
def test_a_resumed_transformer_run_equals_the_uninterrupted_one(
    training: type[transformer.TransformerTraining], pool: Path, tmp_path: Path
) -> None:
    whole = training(options(pool, tmp_path / "whole", 4))
    loop.run(whole)
    part = training(options(pool, tmp_path / "parts", 4))
    (tmp_path / "parts").mkdir()
    for _ in range(2):
        part.train_step()
    loop.save(part)
    rest = training(options(pool, tmp_path / "parts", 4))
    loop.run(rest)
    assert rest.step == whole.step == 4
    for name, value in whole.average.state_dict().items():
        assert torch.equal(value, rest.average.state_dict()[name]), name


def test_a_resumed_vae_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    made = vae.Options(out=tmp_path, steps=100)  # begins with single images
    whole, part = vae.VAETraining(made), vae.VAETraining(made)
    for _ in range(3):
        expected = whole.train_step()
    part.train_step()
    loop.save(part)
    rest = vae.VAETraining(made)
    loop.resume(rest)
    for _ in range(2):
        found = rest.train_step()
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.vae.parameters(), rest.vae.parameters(), strict=True))


def test_decoder_only_training_leaves_the_encoder_alone(tmp_path: Path) -> None:
    training = vae.VAETraining(vae.Options(out=tmp_path, decoder_only=True))
    trained = {id(weight) for weight in training.trainable}
    frozen = [*training.vae.encoder.parameters(), *training.vae.quant_conv.parameters()]
    assert not trained & {id(weight) for weight in frozen}
    assert trained == {id(weight) for weight in training.vae.parameters()} - {id(weight) for weight in frozen}


def velocity_inputs() -> list[torch.Tensor]:
    """Random arguments of `transformer.velocity` behind the model: two clips of 2x4x4 latents."""
    noise = torch.Generator().manual_seed(0)
    shapes = ((2, 16, 2, 4, 4), (2,), (2, 20, 2, 4, 4), (2, encoders.TEXT_LEN, encoders.TEXT_DIM), (2, 17, encoders.IMAGE_DIM))
    return [torch.randn(shape, generator=noise) for shape in shapes]


def test_a_deepened_transformer_computes_what_the_shallow_one_does_and_learns_in_every_block() -> None:
    config = transformer.tiny_config()
    shallow, deep = (transformer.build(replace(config, num_layers=layers)) for layers in (2, 5))
    torch.nn.init.normal_(shallow.head.head.weight)
    deep.load_state_dict(deepened(shallow.state_dict(), 5))
    inputs = velocity_inputs()
    output = transformer.velocity(deep, *inputs)
    assert torch.equal(output, transformer.velocity(shallow, *inputs))
    output.square().mean().backward()
    assert all(block.self_attn.o.weight.grad.abs().sum() > 0 for block in deep.blocks)
    silent = [index for index, block in enumerate(deep.blocks) if not block.ffn[2].weight.any()]
    assert silent == [1, 2, 4]  # between the old ones, not behind them


def test_a_widened_transformer_computes_what_the_narrow_one_does_and_learns_in_every_channel() -> None:
    """At twice the width the norms see each channel twice, and the output is the same; at less it is nearly so."""
    config = replace(transformer.tiny_config(), num_layers=2)
    narrow = transformer.build(config)
    torch.nn.init.normal_(narrow.head.head.weight)
    inputs = velocity_inputs()
    expected = transformer.velocity(narrow, *inputs)
    for scale, hidden, error in ((2, 700, 1e-10), (4 / 3, 768, 2e-3)):
        wider = replace(config, dim=round(192 * scale), num_heads=round(6 * scale), ffn_dim=hidden)
        wide = transformer.build(wider)
        wide.load_state_dict(widened(narrow.state_dict(), wider))
        output = transformer.velocity(wide, *inputs)
        assert (output - expected).square().mean() < error * expected.square().mean()
    output.square().mean().backward()
    for block in wide.blocks:
        assert (block.self_attn.o.weight.grad[:, 192:].abs().sum(0) > 0).all()
        assert (block.ffn[0].weight.grad[:, 192:].abs().sum(0) > 0).all()


def test_a_run_starts_from_the_weights_of_a_shallower_model(pool: Path, tmp_path: Path) -> None:
    shallow = transformer.build(replace(transformer.tiny_config(), num_layers=2))
    torch.nn.init.normal_(shallow.head.head.weight)
    torch.save(shallow.state_dict(), tmp_path / "start.pt")
    training = transformer.TransformerTraining(replace(options(pool, tmp_path, 1), start=tmp_path / "start.pt"))
    assert depth(training.model.state_dict()) == transformer.tiny_config().num_layers
    assert torch.equal(training.model.blocks[0].self_attn.q.weight, shallow.blocks[0].self_attn.q.weight)


def test_sensitivity_is_the_effect_of_a_small_change_of_each_channel(
    start: vae.AutoencoderKLWan, videos: torch.Tensor
) -> None:
    """Against finite differences along random directions; both are means over sixteen draws."""
    videos = videos.repeat(8, 1, 1, 1, 1)
    found = sensitivity.sensitivity(start, videos)
    noise, size = torch.Generator().manual_seed(1), 0.01
    mean, scale = latents.statistics(start)
    code = latents.encode_normalised(start, videos)
    before = whole_clip.decode(start, code * scale + mean)
    for channel in (0, 5, 15):
        moved = code.clone()
        moved[:, channel] += size * torch.randn(code[:, channel].shape, generator=noise)
        change = whole_clip.decode(start, moved * scale + mean) - before
        measured = change.square().sum() / size**2 / len(videos)
        torch.testing.assert_close(found[channel], measured, rtol=0.35, atol=0)
    assert found.max() > 20 * found.median()  # what makes the weights worth having


def test_weighted_training_reports_both_losses_and_differs_from_plain(
    start: vae.AutoencoderKLWan, pool: Path, tmp_path: Path
) -> None:
    torch.save(start.state_dict(), tmp_path / "vae.pt")
    plain = transformer.TransformerTraining(options(pool, tmp_path, 1))
    weighted = transformer.TransformerTraining(replace(options(pool, tmp_path, 1), vae=tmp_path / "vae.pt"))
    weights = weighted.channel_weights
    assert weights.shape == (1, 16, 1, 1, 1)
    assert weights.mean().item() == pytest.approx(1)
    found = weighted.evaluate(final=True)
    assert found.keys() == {"validation", "weighted"}
    assert found["validation"] == plain.evaluate(final=True)["validation"]
    assert weighted.train_step()["loss"] != plain.train_step()["loss"]


class ExactBut:
    """A model whose velocity is exact, but for an error in every latent of `wrong`, (T, h, w), one too high."""

    def __init__(self, wrong: torch.Tensor) -> None:
        self.vae, self.wrong = self, wrong

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        self.x = torch.randn((1, 16, 4, video.shape[-2] // 8, video.shape[-1] // 8))
        return self.x

    def context(self, _video: torch.Tensor, _prompt: str) -> None:
        return None

    def predict(self, noisy: torch.Tensor, t: torch.Tensor, _context: None) -> torch.Tensor:
        noise = (noisy - (1 - t) * self.x) / t
        return noise - self.x + self.wrong


def test_loss_by_level_tells_objects_from_the_rest() -> None:
    """The first latent frame is given and not counted; latents beside an object are counted with it."""
    scene, _ = evaluate.held_out(1, 64)[0]
    share = latents.object_share(render(scene, clips.FRAMES, (64, 64)))
    on = torch.zeros(4, 8, 8)
    on[:, share > 0] = 1
    for wrong, whole, objects in (
        (torch.zeros(4, 8, 8), 0.0, 0.0),
        (torch.cat([torch.ones(1, 8, 8), torch.zeros(3, 8, 8)]), 0.0, 0.0),
        (torch.ones(4, 8, 8), 1.0, 1.0),
        (on, on[0].mean().item(), None),
    ):
        found = evaluate.loss_by_level(ExactBut(wrong), torch.ones(1, 16, 1, 1, 1), 1, 64)
        assert len(found["loss_by_level"]) == len(evaluate.LEVELS)
        assert found["loss_by_level"] == pytest.approx([whole] * len(evaluate.LEVELS), abs=2e-4)
        if objects is None:
            assert all(whole < value < 1 for value in found["object_loss_by_level"])
        else:
            assert found["object_loss_by_level"] == pytest.approx([objects] * len(evaluate.LEVELS), abs=2e-4)


def test_a_stretched_schedule_ends_with_the_time(pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many steps as fit, the last of them at the low end of the learning rate; a million steps were asked for.

    By a clock on which steps take .15 to .45 s.
    """
    now = 0.0

    def clock() -> float:
        return now

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(loop, "_PACE_KNOWN", 3)
    training = transformer.TransformerTraining(replace(options(pool, tmp_path, 1_000_000), minutes=0.1, stretch=True, batch=1))
    rates: list[float] = []
    learn = training.learn

    def timed() -> object:
        nonlocal now
        now += (0.15, 0.3, 0.45)[len(rates) % 3]
        rates.append(training.rate)
        return learn()

    monkeypatch.setattr(training, "learn", timed)
    loop.run(training)
    assert len(rates) == training.step == pytest.approx(20, abs=1)
    assert training.planned == pytest.approx(training.step, abs=2)
    assert max(rates[: len(rates) // 2]) > 10 * rates[-1]
    with pytest.raises(UserError, match="--minutes"):
        replace(options(pool, tmp_path, 1), stretch=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_recorded_steps_are_those_that_were_launched(pool: Path, tmp_path: Path) -> None:
    """Of several shapes, with the learning rate, the average's pace and the noise of each step."""
    runs = []
    for recorded in (False, True):
        given = replace(options(pool, tmp_path / str(recorded), 24), device="cuda", batch=8, windows=0.5, graphs=recorded)
        training = transformer.TransformerTraining(given)
        runs.append(([float(training.train_step()["loss"]) for _ in range(24)],
                     torch.nn.utils.parameters_to_vector(training.average.parameters())))
    (losses, weights), (replayed, replayed_weights) = runs
    assert replayed == pytest.approx(losses, rel=0.05)
    assert (replayed_weights - weights).norm() < 0.01 * weights.norm()


def test_steps_draw_from_folders_of_several_sizes_fewer_clips_of_the_larger(
    start: vae.AutoencoderKLWan, pool: Path, tmp_path: Path
) -> None:
    large = make_pool(tmp_path / "large", start, 96)
    both = replace(options(pool, tmp_path, 1), latents=(pool, large), batch=9)
    training = transformer.TransformerTraining(both)

    drawn = set()
    for training.step in range(40):
        batch = training._clips(training.generator())
        drawn.add((batch.video.shape[-1], len(batch)))
    training.step = 0
    assert drawn == {(8, 9), (4, 36), (12, 4), (6, 16)}
    assert training.train_step()["clips"] == 8
    assert set(training.evaluate(final=True)) == {"validation", "validation_2"}


def test_an_empty_pool_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pretraining\.latents"):
        transformer.TransformerTraining(options(tmp_path, tmp_path, 1))


def test_an_export_loads_like_any_checkpoint(start: vae.AutoencoderKLWan, videos: torch.Tensor, tmp_path: Path) -> None:
    model = transformer.build(transformer.tiny_config())
    write_checkpoint(tmp_path, export.assemble(start.state_dict(), model.state_dict()), shards=1)
    checkpoint = WanCheckpoint.open(tmp_path)
    assert checkpoint.config == transformer.tiny_config()
    tensors = checkpoint.transformer_tensors()
    for name, value in model.state_dict().items():
        assert torch.equal(tensors[name], value.bfloat16()), name
    unpacked = export.unpack(tmp_path)
    for name, value in start.state_dict().items():
        assert torch.equal(unpacked["vae.pt"][name], value.bfloat16().float()), name
    model.load_state_dict(unpacked["transformer.pt"])  # the names of pretraining
    clip = videos[:1]
    loaded = checkpoint.load_vae().encode(clip)
    torch.testing.assert_close(loaded, latents.encode_normalised(start, clip), atol=0.1, rtol=0.1)
    prompt = "red ball, on wavy blue background"
    features = checkpoint.load_text_encoder().encode(prompt)
    assert torch.equal(features, Conditioner().text(prompt)[: len(features)])
    image = checkpoint.load_image_encoder().encode(clip[0, :, 0])
    torch.testing.assert_close(image, Conditioner().image(clip[:, :, 0])[0])


def test_a_command_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    """The folder of latents is there and empty."""
    done = subprocess.run([sys.executable, "-m", "pretraining.transformer", "--latents", ".", "--out", "out"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True)
    assert done.returncode == 2
    assert "0 shards of latents; expected two or more" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_gpu_without_enough_memory_is_told_with_what_these_commands_have(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    assert loop.guarded(full) == 2
    told = capsys.readouterr().err
    assert "not enough memory: CUDA out of memory. Smaller numbers need less" in told
    assert "--batch" in told
    assert "transformer_dtype" not in told


def test_arguments_that_cannot_be_are_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="--device is cpu, expected cuda"):
        transformer.Options(tmp_path, graphs=True)
    monkeypatch.setattr(sys, "argv", ["latents", "--vae", "no.pt", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        latents.main()
    assert "--vae: no.pt is not there" in capsys.readouterr().err
