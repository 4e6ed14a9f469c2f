"""Editing: exact preservation, the seam, reproducibility, guidance, LoRA checks, what is written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from common.errors import UserError
from dataset.images import read_image, write_png
from dataset.video import read_video
from loraedit_ext import launch
from loraedit_ext.config import load_config
from loraedit_ext.editing import pictures
from loraedit_ext.editing.editor import Editor
from loraedit_ext.pipeline import alone
from loraedit_ext.wan import MaskedWan
from tests.conftest import write_edit_folder


@pytest.fixture
def trained(edit_folder):
    launch.train(load_config(edit_folder.config))
    return edit_folder


@pytest.fixture
def token_replace_folder(tmp_path, tiny_hunyuan):
    return write_edit_folder(tmp_path, "hunyuan-video", tiny_hunyuan["token_replace"])


def edit(folder, *overrides, lora=None):
    return launch.edit(load_config(folder.config, ["edit.output=png", *overrides]), lora, None)


def frames_of(out):
    return np.stack([read_image(path) for path in sorted((out / "edited").glob("*.png"))])


def test_preserved_pixels_are_the_sources_and_frame_0_is_the_edit(trained, capsys):
    """Also where the edited picture changes them, as image models do."""
    edited = read_image(trained.path / "edited_0.png") + np.uint8(2)
    edited[-8:, -8:] = 255
    write_png(trained.path / "edited_0.png", edited)
    out = frames_of(edit(trained))
    source = np.stack([read_image(p) for p in sorted((trained.path / "source").glob("*.png"))])
    mask = np.stack([read_image(p)[..., 0] for p in sorted((trained.path / "mask").glob("*.png"))])
    assert (out[0][mask[0] > 0] == edited[mask[0] > 0]).all()
    assert (out[mask == 0] == source[mask == 0]).all()
    assert (out[1:][mask[1:] > 0] != source[1:][mask[1:] > 0]).any()
    assert "% of what edited_0.png changes lies outside the mask" in capsys.readouterr().out


@pytest.mark.parametrize("condition", ["first_frame", "all", "none"])
def test_whatever_the_model_is_told_compositing_follows_the_jobs_mask(trained, condition):
    told = frames_of(edit(trained, "edit.composite=false", f"edit.condition={condition}"))
    assert (told != frames_of(edit(trained, "edit.composite=false"))).any()
    out = frames_of(edit(trained, f"edit.condition={condition}", "edit.feather=0", "edit.color_match=0"))
    mask = np.stack([read_image(p)[..., 0] for p in sorted((trained.path / "mask").glob("*.png"))])
    source = np.stack([read_image(p) for p in sorted((trained.path / "source").glob("*.png"))])
    assert (out[0] == read_image(trained.path / "edited_0.png")).all()
    assert (out[1:][mask[1:] == 0] == source[1:][mask[1:] == 0]).all()
    assert (out[1:][mask[1:] > 0] == told[1:][mask[1:] > 0]).all()


def test_a_whole_frame_edit_trains_and_edits_without_a_mask(edit_folder):
    """A style or the light: all is white, the naive regime and its condition preserve nothing behind frame 0."""
    for path in (edit_folder.path / "mask").glob("*.png"):
        write_png(path, np.full((64, 64), 255, np.uint8))
    for index in (0, 6):
        path = edit_folder.path / f"edited_{index}.png"
        write_png(path, 255 - read_image(path))
    with pytest.raises(UserError, match=r"all white.*mix = \{ naive = 1 \}.*edit\.condition"):
        launch.train(load_config(edit_folder.config), dry_run=True)
    launch.train(load_config(edit_folder.config, ["stage=[{name='naive', steps=2, mix={naive=1}}]"]))
    with pytest.raises(UserError, match=r"edit\.condition = \"first_frame\""):
        edit(edit_folder)
    out = frames_of(edit(edit_folder, "edit.condition=first_frame"))
    raw = frames_of(edit(edit_folder, "edit.condition=first_frame", "edit.composite=false"))
    assert (out[1:] == raw[1:]).all()
    assert (out[0] == read_image(edit_folder.path / "edited_0.png")).all()


def test_the_seam_blends_towards_the_source_and_not_towards_the_grey_condition(trained):
    """It once did the latter: beside a preserved pixel seven eighths must be the source's, with a feather of 8."""
    out = frames_of(edit(trained, "edit.feather=8")).astype(int)
    source = np.stack([read_image(p) for p in sorted((trained.path / "source").glob("*.png"))]).astype(int)
    for index in range(1, 9):
        rim = (20, slice(8 + 3 * index, 16 + 3 * index))  # the region's top row, away from its corners
        assert np.abs(out[index][rim] - source[index][rim]).max() <= 255 / 8 + 1


@pytest.mark.parametrize("family", ["wan", "hunyuan-video"])
def test_the_last_decode_goes_to_the_cpu_rather_than_to_lose_what_was_sampled(request, family, caplog):
    """Of both families: the frames are those of a run whose VAE had room."""
    folder = request.getfixturevalue("edit_folder" if family == "wan" else "token_replace_folder")
    config = load_config(folder.config, ["edit.steps=1", "edit.guidance=1"])
    device = torch.device("cpu")

    def generated():
        model = launch.build_model(config, device)
        editor = Editor(config, model, None, alone(device), launch.cache_of(config))
        return editor.edit(launch.open_job(config, model)).generated

    expected = generated()
    request.getfixturevalue("no_room_to_decode")
    assert (generated() == expected).all()
    assert caplog.text.count("no room for the vae encoder") == 1


def test_without_compositing_nothing_is_pasted(trained):
    source = np.stack([read_image(p) for p in sorted((trained.path / "source").glob("*.png"))])
    raw = frames_of(edit(trained, "edit.composite=false"))
    assert (raw[1:, :8] != source[1:, :8]).mean() > 0.5


def test_the_same_seed_gives_the_same_frames_and_another_does_not(trained):
    out = edit(trained, "edit.composite=false")
    first = frames_of(out)
    assert edit(trained, "edit.composite=false") == out
    assert (frames_of(out) == first).all()
    assert (frames_of(edit(trained, "edit.composite=false", "edit.seed=7")) != first).any()
    assert (frames_of(out) == first).all(), "what one wants to compare with is still there"


def test_steps_that_follow_from_others_do_not_ask_the_model_and_change_little(trained, monkeypatch):
    asked = []
    inputs = MaskedWan.model_inputs
    monkeypatch.setattr(MaskedWan, "model_inputs", lambda self, *given: asked.append(given) or inputs(self, *given))
    raw = ["edit.composite=false", "edit.steps=12", "edit.guidance=2"]
    whole = frames_of(edit(trained, *raw)).astype(int)
    assert len(asked) == 2 * 12
    asked.clear()
    out = edit(trained, *raw, "edit.compute_every=3")
    assert len(asked) == 2 * 7, "the first three, the last two, and one in three of the seven between"
    assert json.loads((out / "edited.json").read_text())["facts"]["computed_steps"] == 7
    fewer = frames_of(edit(trained, *raw, "edit.steps=7")).astype(int)
    change, of_fewer = (np.abs(made - whole).mean() for made in (frames_of(out).astype(int), fewer))
    assert 0 < change < 0.5 * of_fewer


def test_another_seed_or_guidance_loads_no_text_and_no_image_encoder(trained, monkeypatch):
    from models.wan.checkpoint import WanCheckpoint

    edit(trained, "edit.source_guidance=2")

    def refuse(*_, **__):
        raise AssertionError("an encoder was loaded although the cache is warm")

    for name in ("load_text_encoder", "load_image_encoder"):
        monkeypatch.setattr(WanCheckpoint, name, refuse)
    edit(trained, "edit.source_guidance=3", "edit.seed=7")
    with pytest.raises(AssertionError, match="encoder was loaded"):
        edit(trained, "edit.negative_prompt=blurred")


def test_guidance_1_skips_the_unconditional_pass_and_changes_the_result(trained):
    guided = frames_of(edit(trained, "edit.composite=false"))
    plain = frames_of(edit(trained, "edit.composite=false", "edit.guidance=1"))
    assert (guided != plain).any()


def test_strength_0_is_the_model_without_lora(trained):
    launch.train(load_config(trained.config, ["optimizer.lr=1e-12"]))
    untrained = frames_of(edit(trained, "edit.composite=false"))
    first = trained.runs()[0] / "step6"
    assert (frames_of(edit(trained, "edit.composite=false", lora=first)) != untrained).any()
    assert (frames_of(edit(trained, "edit.composite=false", "edit.lora_strength=0", lora=first)) == untrained).all()


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm++"])
def test_every_sampler_runs_to_finite_frames(trained, sampler):
    assert frames_of(edit(trained, f"edit.sampler={sampler}", "edit.steps=3")).shape == (9, 64, 64, 3)


def test_mp4_and_comparison_have_the_sources_frames_and_rate(trained):
    out = launch.edit(load_config(trained.config), None, trained.path / "out")
    assert out == trained.path / "out"
    edited, comparison = read_video(out / "edited.mp4"), read_video(out / "comparison.mp4")
    assert (edited.total, edited.fps, edited.size) == (9, 16, (64, 64))
    assert comparison.size == (3 * 64 + 2 * 8, 64)
    assert read_image(out / "contact_sheet.png").shape == (3 * 64 + 2 * 8, 6 * 64 + 5 * 8, 3)
    record = json.loads((out / "edited.json").read_text())
    assert record["lora"]["metadata"]["steps"] == 6
    assert record["config"]["edit"]["seed"] == 42
    assert record["job"]["hashes"].keys() >= {"source", "mask"}


def test_a_mask_is_laid_over_in_red_by_half_of_its_brightness():
    """What it does not mark stays to the bit, as a person compares it with the source beside it."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 4, 3)).astype(np.uint8)
    mask = np.zeros((2, 6, 4), np.uint8)
    mask[0, 2:4], mask[1, 4:] = 255, 102
    shown = pictures.overlaid(frames, mask)
    share = mask[..., None] / 510
    assert np.array_equal(shown[mask == 0], frames[mask == 0])
    assert np.abs(shown - (frames * (1 - share) + np.array([255, 0, 80]) * share)).max() <= 0.51


def test_the_contact_sheet_shows_source_mask_and_result_from_first_to_last_frame():
    ramp = np.broadcast_to(np.arange(13, dtype=np.uint8)[:, None, None, None], (13, 4, 6, 3))
    sheet = pictures.contact_sheet([ramp, ramp + 100], count=4)
    assert sheet.shape == (4 + 8 + 4, 4 * 6 + 3 * 8, 3)
    assert sheet[0, ::14, 0].tolist() == [0, 4, 8, 12]
    assert sheet[-1, ::14, 0].tolist() == [100, 104, 108, 112]
    assert (sheet[4:12] == 255).all()
    assert pictures.contact_sheet([ramp[:1]]).shape == (4, 6, 3)


def test_no_lora_is_told_with_the_place_that_was_searched(edit_folder):
    with pytest.raises(UserError, match=r"runs: no trained LoRA in it.*--lora FILE"):
        edit(edit_folder)


def test_a_run_or_its_state_instead_of_a_lora_is_told_with_where_that_is(trained):
    """Of a state it was said once that the layers' files are several LoRAs, one of which to name."""
    folder, run = trained, trained.runs()[0]
    for named, told in ((run, r"no LoRA file in it .*\. Name one of its folders: step3, step6\."),
                        (run / "global_step3", rf"full state, not a LoRA\. One of that step would be in {run / 'step3'}\.")):
        with pytest.raises(UserError, match=told):
            launch.edit(load_config(folder.config), named, None)


def test_what_does_not_fit_the_job_is_told(trained, capsys):
    trained.job.write_text('trigger = "sks"\nframes = 5\n' + trained.job.read_text().replace("frame = 6", "frame = 3"))
    edit(trained)
    out = capsys.readouterr().out
    assert "trigger: LoRA `p3rs0n,`, job `sks`" in out
    assert "frames: LoRA 9, job 5" in out


def test_a_lora_of_another_model_ends_before_any_weight_is_read(trained, tmp_path):
    import dataclasses

    from models.wan.config import WanConfig
    from models.wan.random_weights import tiny_config, write_random_checkpoint

    other: WanConfig = dataclasses.replace(tiny_config(), num_layers=2)
    write_random_checkpoint(tmp_path / "other", other)
    with pytest.raises(UserError, match=r"another model.*layers: LoRA 4, checkpoint 2"):
        edit(trained, f"model.ckpt_path={tmp_path / 'other'}")


def test_the_noise_is_a_cpu_generators_so_a_seed_means_the_same_everywhere(trained):
    expected = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(42))
    seen = []
    config = load_config(trained.config, ["edit.steps=1", "edit.sampler=euler"])
    from loraedit_ext import flow

    real = flow.sample

    def spy(predict, noise, *rest, **options):
        seen.append(noise)
        return real(predict, noise, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "sample", spy)
        launch.edit(config, None, None)
    assert torch.equal(seen[0], expected)


def test_a_step_distilled_lora_is_stacked_on_the_edits(trained):
    """Few steps, no guidance, other rank and targets, path relative to the TOML; recorded with its hash."""
    from safetensors.torch import save_file

    from common.files import hash_file

    g = torch.Generator().manual_seed(1)
    state = {}
    for linear in ("cross_attn.k_img", "self_attn.v", "ffn.2"):
        rows, columns = (96, 192) if linear == "ffn.2" else (96, 96)
        key = f"lora_unet_blocks_1_{linear.replace('.', '_')}"
        state |= {f"{key}.lora_down.weight": torch.randn(7, columns, generator=g),
                  f"{key}.lora_up.weight": torch.randn(rows, 7, generator=g), f"{key}.alpha": torch.tensor(3.5)}
    save_file(state, trained.path / "distilled.safetensors")
    few = ["edit.composite=false", "edit.steps=4", "edit.guidance=1"]
    plain = frames_of(edit(trained, *few))
    out = edit(trained, *few, "edit.lora=[{path='distilled.safetensors', strength=0.5}]")
    stacked = frames_of(out)
    assert (stacked != plain).any()
    assert (frames_of(edit(trained, *few, "edit.lora=[{path='distilled.safetensors', strength=0}]")) == plain).all()
    facts = json.loads((out / "edited.json").read_text())["facts"]
    assert facts["loras"][1]["sha256"] == hash_file(trained.path / "distilled.safetensors")


def test_a_stacked_lora_of_another_model_is_refused(trained):
    from safetensors.torch import save_file

    key = "diffusion_model.blocks.1.ffn.0.lora_"
    save_file({f"{key}A.weight": torch.ones(4, 5120), f"{key}B.weight": torch.ones(13824, 4)},
              trained.path / "big.safetensors")
    with pytest.raises(UserError, match=r"big\.safetensors.*\(13824, 5120\).*\(192, 96\)"):
        edit(trained, "edit.lora=[{path='big.safetensors'}]")
