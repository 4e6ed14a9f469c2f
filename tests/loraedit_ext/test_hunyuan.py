"""MaskedHunyuan overrides the conditioning and nothing else; what the two variants make of a mask."""

from __future__ import annotations

import pytest
import torch

from loraedit_ext import flow, masks
from loraedit_ext.hunyuan import MaskedHunyuan
from loraedit_ext.objective import Objective
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.hunyuan.wrapper import HunyuanI2V

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["token_replace", "latent_concat"])
def pair(request, tiny_hunyuan):
    checkpoint = HunyuanCheckpoint.open(tiny_hunyuan[request.param])
    return HunyuanI2V(checkpoint, CPU), MaskedHunyuan(checkpoint, CPU)


@pytest.fixture(scope="module")
def video():
    return torch.rand(3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def spatial() -> torch.Tensor:
    """Frame 0, and everything but the middle third of the width."""
    preserve = torch.ones(9, 32, 48, dtype=torch.bool)
    preserve[1:, :, 16:32] = False
    return preserve


def batched(condition):
    return {name: tensor[None] for name, tensor in condition.items()}


def test_the_first_frame_mask_gives_the_base_models_condition_bit_for_bit(pair, video):
    base, masked = pair
    arguments = (video, masks.first_frame_only(9, 32, 48), video[:, 0], "p3rs0n, a cat")
    expected, found = base.encode_condition(*arguments), masked.encode_condition(*arguments)
    assert expected.keys() == found.keys() == set(base.condition_names)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_only_the_conditioning_is_overridden():
    assert {name for name in vars(MaskedHunyuan) if not name.startswith("_")} == {"known_region", "encode_known"}


def test_the_library_pipeline_prepares_the_same_first_frame_condition(pair, video):
    """diffusers' image latents, mask and start of the released model, on the same VAE."""
    from diffusers import HunyuanVideoImageToVideoPipeline

    base, _ = pair
    condition = batched(base.encode_condition(video, masks.first_frame_only(9, 32, 48), video[:, 0], "a cat"))
    pipeline = HunyuanVideoImageToVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=None, vae=base.vae.model, scheduler=None, text_encoder_2=None,
        tokenizer_2=None, image_processor=None,
    )
    noise = torch.randn(1, 16, 3, 4, 6)
    start, image = pipeline.prepare_latents(
        video[None, :, 0], 1, 16, 32, 48, 9, torch.float32, CPU, latents=noise, image_condition_type=base.variant
    )
    assert torch.allclose(condition["known"][:, :, :1], image[:, :, :1], atol=1e-6)
    assert not condition["known"][:, :, 1:].any()
    assert torch.allclose(base.start_latents(noise, condition), start, atol=1e-6)
    latents, timestep, *_ = base.model_inputs(noise, torch.tensor([0.5]), condition)
    assert timestep == 500
    if base.variant == "token_replace":
        expected = torch.cat([image, noise[:, :, 1:]], dim=2)
    else:
        image[:, :, 1:] = 0
        mask = torch.zeros(1, 1, 3, 4, 6)
        mask[:, :, 0] = 1
        expected = torch.cat([noise, image, mask], dim=1)
    assert torch.allclose(latents, expected, atol=1e-6)


def test_known_latents_are_those_of_the_grey_filled_video(pair, video):
    """Replaced tokens where it is preserved; condition channels whole."""
    _, masked = pair
    condition = masked.encode_condition(video, spatial(), video[:, 0], "a cat")
    grey = masks.grey_fill(video, spatial())
    whole, first = masked.encode_video(grey), masked.encode_video(grey[:, :1])
    assert torch.equal(condition["known"][:, :1], first)
    assert torch.equal(condition["known"][:, 1:, :, :2], whole[:, 1:, :, :2])
    hidden = condition["known"][:, 1:, :, 2:4]
    assert torch.equal(hidden, whole[:, 1:, :, 2:4] if masked.variant == "latent_concat" else torch.zeros_like(hidden))
    assert condition["mask"][0, 1].tolist() == [[1, 1, 0, 0, 1, 1]] * 4


def test_a_latent_frame_of_which_nothing_is_preserved_is_zero_as_released(pair, video):
    _, masked = pair
    preserve = spatial()
    preserve[5:] = False
    condition = masked.encode_condition(video, preserve, video[:, 0], "a cat")
    assert condition["known"][:, 1].any()
    assert not condition["known"][:, 2].any()


def test_what_is_hidden_does_not_leak_into_the_condition(pair, video):
    _, masked = pair
    changed = torch.where(spatial(), video, -video)
    conditions = [masked.encode_condition(v, spatial(), video[:, 0], "a cat") for v in (video, changed)]
    assert torch.equal(conditions[0]["known"], conditions[1]["known"])


def test_token_masks_are_whole_tokens_and_never_bolder_than_latent_masks():
    preserve = torch.ones(9, 32, 64, dtype=torch.bool)
    preserve[3, 0, 8] = False
    latents, tokens = masks.latent_mask(preserve), masks.token_mask(preserve)
    assert latents[0, 1].tolist() == [[1, 0, 1, 1, 1, 1, 1, 1]] + [[1] * 8] * 3
    assert tokens[0, 1].tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]] * 2 + [[1] * 8] * 2
    assert (tokens <= latents).all()
    assert tokens[0, 0].all()
    assert tokens[0, 2].all()


@pytest.fixture(scope="module")
def token_replace(tiny_hunyuan):
    return MaskedHunyuan(HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]), CPU)


def transformer_of(model):
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), torch.float32, CPU)
    return transformer


def test_preserved_tokens_are_clean_at_every_step_and_in_the_result(token_replace, video):
    model = token_replace
    condition = batched(model.encode_condition(video, spatial(), video[:, 0], "a cat"))
    known, kept = condition["known"], condition["mask"].bool().expand(1, 16, 3, 4, 6)
    transformer = transformer_of(model)
    seen = []

    @torch.no_grad()
    def predict(x, t):
        inputs = model.model_inputs(x, t.expand(1), condition, 6.0)
        seen.append(inputs[0])
        return transformer(*inputs)

    start = model.start_latents(torch.randn(1, 16, 3, 4, 6), condition)
    x = flow.sample(predict, start, flow.inference_sigmas(3, 7.0, "euler"), "euler")
    final = model.final_latents(x, condition)
    assert len(seen) == 3
    assert all(torch.equal(state[kept], known[kept]) for state in [*seen, final])
    assert torch.equal(final[~kept], x[~kept])


def test_loss_is_on_generated_tokens_alone(token_replace):
    mask = masks.token_mask(spatial())[None]
    weight = token_replace.loss_weight({"mask": mask})
    prediction = torch.randn(1, 16, 3, 4, 6, requires_grad=True)
    flow.loss(prediction, torch.zeros_like(prediction), weight).backward()
    kept = mask.bool().expand_as(prediction)
    assert not prediction.grad[kept].any()
    assert (prediction.grad[~kept] != 0).all()


def test_latent_concat_learns_all_latents_as_released(tiny_hunyuan):
    model = HunyuanI2V(HunyuanCheckpoint.open(tiny_hunyuan["latent_concat"]), CPU)
    assert model.loss_weight({"mask": torch.ones(1)}) is None


@torch.no_grad()
def test_embedded_guidance_reaches_the_model_that_embeds_it(pair, video):
    _, masked = pair
    condition = batched(masked.encode_condition(video, spatial(), video[:, 0], "a cat"))
    transformer, noise = transformer_of(masked), torch.randn(1, 16, 3, 4, 6)
    outputs = [
        transformer(*masked.model_inputs(noise, torch.tensor([0.5]), condition, guidance)) for guidance in (1.0, 6.0)
    ]
    assert torch.equal(*outputs) == (masked.variant == "latent_concat")


def test_a_batch_of_different_masks_and_prompts_has_the_mean_of_the_samples_gradients(token_replace, video):
    """Samples whose numbers of preserved tokens and of words differ; equal weights of generated tokens aside."""
    from dataset.triple import EncodedTriple

    other = torch.ones(9, 32, 48, dtype=torch.bool)
    other[1:, 16:] = False
    samples = []
    for name, preserve, prompt in (("a", spatial(), "a cat"), ("b", other, "a much longer prompt, of nine words or so")):
        condition = token_replace.encode_condition(video, preserve, video[:, 0], prompt)
        samples.append(EncodedTriple(name, token_replace.encode_video(video), condition))
    counts = [int((1 - s.condition["mask"]).sum()) for s in samples]
    assert counts[0] != counts[1]
    assert samples[0].condition["text_length"] != samples[1].condition["text_length"]
    objective = Objective(token_replace, flow.TimestepSampler(), 0, False)
    transformer = transformer_of(token_replace)
    with torch.no_grad():
        losses = []
        for group in (samples, samples[:1], samples[1:]):
            inputs, labels = objective.at_quantile(group, 0.5)
            losses.append(float(objective.loss(transformer(*inputs), labels)))
    weighted = (losses[1] * counts[0] + losses[2] * counts[1]) / sum(counts)
    assert losses[0] == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize(("frames", "height", "width", "nearest"), [
    (9, 40, 48, "32 and 48"), (9, 32, 50, "48 and 64"), (10, 32, 48, "9 and 13"),
])
def test_sizes_off_the_grid_are_refused_with_the_nearest(token_replace, frames, height, width, nearest):
    from common.errors import UserError

    with pytest.raises(UserError, match=f"nearest are {nearest}"):
        token_replace.encode_video(torch.zeros(3, frames, height, width))


@pytest.mark.parametrize(("width", "height"), [(624, 368), (832, 480)])
def test_the_papers_sizes_fit(width, height):
    assert HunyuanI2V.geometry.latent_shape(49, height, width) == (16, 13, height // 8, width // 8)
