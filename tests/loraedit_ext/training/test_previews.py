"""Previews during training: no effect on the numbers, bounded, the same picture as inference; early stopping."""

from __future__ import annotations

import math

import numpy as np
import pytest

from common.errors import UserError
from dataset.images import read_image
from dataset.job import load_job
from dataset.resize import Grid
from dataset.video import read_video
from loraedit_ext import launch
from loraedit_ext.config import PreviewSettings, load_config
from loraedit_ext.training.patience import Patience
from loraedit_ext.training.preview import shorten
from models.base import Geometry
from tests.conftest import strips

PREVIEWS = ["sample_every_n_steps=2", "preview.steps=2"]
DROPOUT = "adapter.dropout=0.1"


def train(folder, *overrides):
    launch.train(load_config(folder.config, overrides))


def losses_and_norms(folder, run):
    return [(row["train/loss"], row["train/grad_norm"]) for row in folder.metrics(run) if "train/loss" in row]


def test_previews_change_no_number_of_the_training(edit_folder):
    """With dropout, the training's only source of chance: to the bit."""
    train(edit_folder, DROPOUT)
    train(edit_folder, DROPOUT, *PREVIEWS)
    train(edit_folder)
    assert losses_and_norms(edit_folder, 0) == losses_and_norms(edit_folder, 1)
    assert losses_and_norms(edit_folder, 0) != losses_and_norms(edit_folder, 2)
    _, run, _ = edit_folder.runs()
    assert sorted(path.name for path in (run / "previews").iterdir()) == ["step2.mp4", "step4.mp4", "step6.mp4"]
    assert [row["step"] for row in edit_folder.metrics(1) if "preview/seconds" in row] == [2, 4, 6]


@pytest.mark.parametrize("source_guidance", [1, 3])
def test_a_preview_is_what_inference_makes_with_the_lora_of_that_step(edit_folder, source_guidance):
    """Same steps, seed and guidance, same length and size: the same frames; and another step has others."""
    raw = ["edit.composite=false", "optimizer.lr=1e-2", f"edit.source_guidance={source_guidance}"]
    train(edit_folder, *PREVIEWS, *raw, "save_every_n_steps=2")
    (run,) = edit_folder.runs()
    shown = {step: strip.astype(int) for step, strip in strips(run).items()}
    for step in (2, 6):
        lora = run / f"step{step}" / "adapter_model.safetensors"
        out = launch.edit(load_config(edit_folder.config, [*raw, "edit.output=png"]), lora, None)
        edited = [read_image(out / "edited" / f"{index:05d}.png") for index in (0, 1, 2, 3, 5, 6, 7, 8)]
        assert np.abs(shown[step] - np.concatenate(edited, axis=1)).max() <= 1
    assert (np.abs(shown[2] - shown[6]) > 1).mean() > 0.2


def test_preserved_pixels_of_a_preview_are_composited_as_edit_says(edit_folder):
    train(edit_folder, *PREVIEWS)
    (run,) = edit_folder.runs()
    preview = read_video(run / "previews" / "step6.mp4").frames.astype(int)
    source = np.stack([read_image(p) for p in sorted((edit_folder.path / "source").glob("*.png"))]).astype(int)
    assert np.abs(preview[1:, :12] - source[1:, :12]).mean() < 4  # H.264 apart


def test_a_preview_is_short_and_small_and_the_plan_says_what_it_costs(edit_folder, capsys):
    train(edit_folder, *PREVIEWS, "preview.max_frames=5", "preview.max_area=1024")
    (run,) = edit_folder.runs()
    video = read_video(run / "previews" / "step2.mp4")
    assert (video.total, video.size, video.fps) == (5, (32, 32), 16)
    out = capsys.readouterr().out
    # 2 x 2 x 2 tokens x 2 steps x 2 passes; training: 3 x 4 x 4 tokens x (forward, recomputed, backward). So few tokens
    # that the keys and values of 769 of the context are most of both.
    assert "every 2 steps: 5 frames of 32x32 (8 tokens), 2 steps x 2 pass(es); one costs about 0.7" in out


def test_a_shortened_job_scales_frames_mask_and_edited_frame_alike(edit_folder):
    job = load_job(edit_folder.job, Grid())
    small = shorten(job, PreviewSettings(max_frames=7, max_area=32 * 32), Geometry())
    assert small.frames.shape == (5, 32, 32, 3)
    assert small.grey_mask.shape == (5, 32, 32)
    assert [frame.index for frame in small.edited_frames] == [0]  # frame 6 lies behind the end
    assert small.first_edit.image.shape == (32, 32, 3)
    blocks = job.grey_mask[:5].reshape(5, 32, 2, 32, 2).max((2, 4))
    assert (small.grey_mask == blocks).all()
    whole = shorten(job, PreviewSettings(), Geometry())
    assert whole.frames.shape == job.frames.shape
    assert (whole.first_edit.image == job.first_edit.image).all()


def test_no_encoder_but_the_vae_is_loaded_for_a_preview_and_that_one_is_freed(edit_folder, monkeypatch):
    from loraedit_ext.wan import MaskedWan

    launch.train(load_config(edit_folder.config, PREVIEWS), cache_only=True)
    loaded, freed = [], []
    real, free = MaskedWan.encoder, MaskedWan.free_encoders
    monkeypatch.setattr(MaskedWan, "encoder", lambda self, name: loaded.append(name) or real(self, name))
    monkeypatch.setattr(MaskedWan, "free_encoders", lambda self: freed.append(sorted(self._encoders)) or free(self))
    train(edit_folder, *PREVIEWS)
    assert loaded == ["vae"] * 3
    assert freed == [[], ["vae"], ["vae"], ["vae"]]


@pytest.mark.usefixtures("no_room_to_decode")
def test_a_preview_without_room_on_the_gpu_is_decoded_on_the_cpu(edit_folder, caplog):
    train(edit_folder, *PREVIEWS)
    (run,) = edit_folder.runs()
    assert len(edit_folder.losses()) == 6
    assert [read_video(run / "previews" / f"step{step}.mp4").total for step in (2, 4, 6)] == [9, 9, 9]
    assert caplog.text.count("no room for the vae encoder") == 1


def test_a_job_without_edited_first_frame_is_refused_before_anything_is_encoded(edit_folder):
    text = edit_folder.job.read_text()
    edit_folder.job.write_text(text.replace("frame = 0", "frame = 3"))
    with pytest.raises(UserError, match="no edited first frame"):
        train(edit_folder, *PREVIEWS)
    assert not (edit_folder.path / "cache").exists()


def test_guidance_1_needs_no_unconditional_pass(edit_folder, capsys):
    train(edit_folder, *PREVIEWS, "preview.guidance=1", "stage=[{name='motion', steps=2, mix={motion=1}}]")
    assert "2 steps x 1 pass(es)" in capsys.readouterr().out
    launch.train(load_config(edit_folder.config, [*PREVIEWS, "edit.source_guidance=2"]), cache_only=True)
    assert "2 steps x 3 pass(es)" in capsys.readouterr().out


def test_hunyuan_has_previews_too(hunyuan_folder):
    train(hunyuan_folder, "sample_every_n_steps=6", "preview.steps=2")
    (run,) = hunyuan_folder.runs()
    assert read_video(run / "previews" / "step6.mp4").total == 9


def test_tensorboard_gets_a_strip_of_frames(edit_folder):
    train(edit_folder, *PREVIEWS)
    (run,) = edit_folder.runs()
    found = strips(run)
    assert list(found) == [2, 4, 6]
    assert found[6].shape == (64, 8 * 64, 3)
    edited = read_image(edit_folder.path / "edited_0.png")
    assert (found[6][:, :64] == edited).all()  # frame 0 is given, and nothing was lost on the way


def test_patience_counts_evaluations_without_a_new_best():
    patience = Patience(2, ["motion", "appearance"], first=10)
    for step, loss in ((5, 0.1), (10, 1.0), (15, 0.9), (20, 0.95)):
        patience.add(step, {"motion/loss": loss, "appearance/loss": loss})
    assert not patience.exhausted  # step 5 is before the stage
    patience.add(25, {"motion/loss": 0.7, "appearance/loss": 1.1})  # the mean equals the best: no improvement
    assert patience.exhausted
    assert (patience.best_step, patience.waited) == (15, 2)


def test_a_loss_that_is_no_number_is_no_improvement():
    patience = Patience(1, ["motion"], first=0)
    patience.add(1, {"motion/loss": math.nan})
    assert patience.exhausted


def test_no_patience_waits_for_ever():
    patience = Patience(None, ["motion"], first=0)
    for step in range(99):
        patience.add(step, {"motion/loss": 1.0})
    assert not patience.exhausted


STALE = ["eval_every_n_steps=1", "early_stop_patience=2", "optimizer.type=sgd", "optimizer.lr=1e-30"]


def test_a_run_that_no_longer_improves_stops_exports_checkpoints_and_says_so(edit_folder, capsys):
    """The learning rate is 0 in effect, so no evaluation beats the one at the last stage's begin."""
    train(edit_folder, *STALE, "stage.1.steps=9")
    (run,) = edit_folder.runs()
    assert len(edit_folder.losses()) == 5  # 3 of the first stage, which patience leaves alone, and 2
    assert (run / "latest").read_text() == "global_step5\n"
    assert (run / "step5" / "adapter_model.safetensors").is_file()
    err = capsys.readouterr().err
    assert "stopped at step 5: no better evaluation loss than" in err
    assert "(step 3) in 2 evaluations" in err


def test_a_resumed_run_remembers_how_long_it_has_waited(edit_folder):
    train(edit_folder, *STALE, "stage.1.steps=9", "checkpoint_every_n_steps=1")
    (run,) = edit_folder.runs()
    (run / "latest").write_text("global_step4\n")
    train(edit_folder, *STALE, "stage.1.steps=9", "resume_from_checkpoint=true")
    assert (run / "latest").read_text() == "global_step5\n"
    assert len(edit_folder.losses()) == 5


def test_a_run_that_improves_is_not_stopped(edit_folder):
    train(edit_folder, "stage=[{name='motion', steps=6, mix={motion=1}}]", "optimizer.lr=5e-3",
          "eval_every_n_steps=2", "early_stop_patience=1")
    assert len(edit_folder.losses()) == 6


def test_patience_without_evaluations_is_refused(edit_folder):
    with pytest.raises(UserError, match="set eval_every_n_steps too"):
        load_config(edit_folder.config, ["early_stop_patience=2"])


