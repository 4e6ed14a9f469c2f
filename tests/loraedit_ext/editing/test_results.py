"""What an edit leaves behind: a result of the source's own size, and results that others do not replace."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from dataset.images import read_image, write_png
from dataset.job import load_job
from dataset.resize import Grid
from dataset.video import read_media
from dataset.video_writer import write_images
from loraedit_ext import plan
from loraedit_ext.config import EditSettings, EvaluationSettings, load_config
from loraedit_ext.editing import compositing, results
from loraedit_ext.editing.editor import Edit
from loraedit_ext.evaluation.judge import judge
from loraedit_ext.evaluation.subject import from_edit
from loraedit_ext.lora import LoraFile

FRAMES, WIDTH, HEIGHT = 5, 101, 67
BOX = (slice(25, 55), slice(40, 80))
HARD = ("edit.feather=0", "edit.color_match=0")
"""No seam: inside the region there is what the model made, and nothing else."""


@pytest.fixture
def folder(tmp_path):
    """A job whose source the model cannot take as it is: odd, and no multiple of 16."""
    coarse = np.random.default_rng(0).integers(0, 256, (FRAMES, 4, 6, 3), np.uint8)
    source = np.stack([cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_LINEAR) for frame in coarse])
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[BOX] = 255
    first = source[0].copy()
    first[BOX] = 255 - first[BOX]
    write_images(tmp_path / "source", source)
    write_png(tmp_path / "mask.png", mask)
    write_png(tmp_path / "first.png", first)
    (tmp_path / "job.toml").write_text(
        'source = "source"\nmask = "mask.png"\n[[edited_frame]]\nimage = "first.png"\nframe = 0\n'
    )
    (tmp_path / "edit.toml").write_text(
        'output_dir = "runs"\ndataset = "job.toml"\n[model]\ntype = "wan"\nckpt_path = "wan"\n'
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    return tmp_path


def written(folder, *overrides, **job_changes):
    """(job, what the model made, frames as written) of an edit that came out as noise."""
    job = load_job(folder / "job.toml", Grid(), job_changes)
    config = load_config(folder / "edit.toml", ["edit.output=png", *overrides])
    generated = np.random.default_rng(1).integers(0, 256, job.frames.shape, np.uint8)
    edit = Edit(compositing.finished(job, generated, config.edit), generated, {})
    results.write(folder / "edit", edit, job, config, LoraFile(folder / "adapter_model.safetensors", {}, {}))
    return job, generated, read_media(folder / "edit" / results.EDITED[config.edit.output]).frames


def test_a_record_never_tells_of_files_that_other_settings_made(folder, monkeypatch):
    """Writing over a result was interrupted: its edited.json stood beside the other's generated.mkv, and was believed."""
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    written(folder)
    monkeypatch.setattr(results, "write_images", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written(folder, "edit.seed=7")
    assert not (folder / "edit" / results.RECORD).exists()


def source_of(folder):
    return read_media(folder / "source").frames


def test_the_result_has_the_sources_size_and_its_pixels_wherever_the_mask_is_black(folder):
    job, generated, out = written(folder, *HARD)
    source, mask = source_of(folder), read_image(folder / "mask.png")[..., 0]
    assert job.size == (96, 64)
    assert out.shape == source.shape
    assert (out[0] == read_image(folder / "first.png")).all()
    assert (out[1:, mask == 0] == source[1:, mask == 0]).all()
    left, top, width, height = job.crop
    for frame, made in zip(out[1:], generated[1:], strict=True):
        whole = np.zeros_like(frame)
        whole[top : top + height, left : left + width] = cv2.resize(made, (width, height), interpolation=cv2.INTER_CUBIC)
        assert (frame[BOX] == whole[BOX]).all()
    assert json.loads((folder / "edit/edited.json").read_text())["size"] == [WIDTH, HEIGHT]


def test_outside_the_part_that_the_model_works_on_the_source_stays(folder):
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:10] = 0
    write_png(folder / "mask.png", mask)
    job, _, out = written(folder, size=[64, 64])
    left, _, width, _ = job.crop
    assert (left, width) == (17, HEIGHT)
    source = source_of(folder)
    assert (out[1:, :, :left] == source[1:, :, :left]).all()
    assert (out[1:, :, left + width :] == source[1:, :, left + width :]).all()
    assert (out[1:, 40, left + 20 : left + 50] != source[1:, 40, left + 20 : left + 50]).any(-1).mean() > 0.99


@pytest.mark.parametrize("keep_outside", [True, False])
def test_what_an_edited_picture_changes_outside_the_mask_counts_only_if_it_is_let(folder, keep_outside):
    picture = 255 - source_of(folder)[0]
    write_png(folder / "first.png", picture)
    _, _, out = written(folder, keep_outside=keep_outside)
    mask = read_image(folder / "mask.png")[..., 0] > 0
    assert (out[0, mask] == picture[mask]).all()
    assert (out[0, ~mask] == (source_of(folder)[0] if keep_outside else picture)[~mask]).all()
    subject = from_edit(load_config(folder / "edit.toml"), folder / "edit")
    assert (subject.reference == out[0]).all()


def test_a_crop_is_laid_back_pixel_by_pixel(folder):
    job, generated, out = written(folder, *HARD, crop=[32, 16, 64, 48])
    assert job.size == (64, 48)
    source, mask = source_of(folder), read_image(folder / "mask.png")[..., 0]
    assert (out[1:, mask == 0] == source[1:, mask == 0]).all()
    assert (out[1:, 25:55, 40:80] == generated[1:, 9:39, 8:48]).all()
    assert (out[0] == read_image(folder / "first.png")).all()
    subject = from_edit(load_config(folder / "edit.toml"), folder / "edit")
    assert subject.edited.shape == source.shape
    assert (subject.generated.source == job.frames).all()


def test_a_crop_that_is_worked_on_at_the_sources_own_size_is_cut_and_laid_back(folder):
    """The most natural use: a part of the picture at all the resolution that the model has."""
    mask = read_image(folder / "mask.png")[:64, :96, 0]
    even = {"source": np.ascontiguousarray(source_of(folder)[:, :64, :96]), "mask": mask}
    write_images(folder / "source", even["source"])
    write_png(folder / "mask.png", even["mask"])
    write_png(folder / "first.png", 255 - even["source"][0])
    job, generated, out = written(folder, *HARD, crop=[36, 21, 48, 32], size=[96, 64])
    assert job.size == job.original_size == (96, 64)
    assert (job.frames[0] == job.fit.image(even["source"][0])).all()
    assert (out[1:, even["mask"] == 0] == even["source"][1:, even["mask"] == 0]).all()
    laid = job.fit.laid_over(even["source"][1], generated[1])
    inside = np.zeros_like(even["mask"], bool)
    inside[25:53, 40:80] = even["mask"][25:53, 40:80] > 0
    assert (out[1, inside] == laid[inside]).all()
    assert "what is made is scaled from 96x64 to 48x32 and is laid over" in plan.describe_result(job, EditSettings())
    subject = from_edit(load_config(folder / "edit.toml"), folder / "edit")
    assert (subject.source == even["source"]).all()
    assert (subject.generated.source == job.frames).all()


def test_an_edit_beyond_the_crop_does_not_flash_up_in_frame_0(folder):
    write_png(folder / "first.png", 255 - source_of(folder)[0])
    _, _, out = written(folder, crop=[32, 16, 64, 48], keep_outside=False)
    assert (out[0, :, :32] == source_of(folder)[0, :, :32]).all()
    assert (out[0, 16:64, 32:96] == 255 - source_of(folder)[0, 16:64, 32:96]).all()


def test_an_edited_frame_of_the_working_size_gives_its_region_alone(folder):
    write_png(folder / "first.png", np.full((64, 96, 3), 7, np.uint8))
    _, _, out = written(folder, *HARD)
    mask = read_image(folder / "mask.png")[..., 0]
    assert (out[0, mask == 0] == source_of(folder)[0, mask == 0]).all()
    assert (out[0, mask > 0] == 7).all()


@pytest.mark.parametrize("crop", [None, [32, 16, 64, 48]])
def test_an_edited_frame_of_the_sources_aspect_is_laid_over_all_of_it(folder, crop):
    """Not over the crop, as one of the working size is."""
    picture = source_of(folder)[0]
    picture[BOX] = 7
    write_png(folder / "first.png", cv2.resize(picture, (2 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC))
    _, _, out = written(folder, *HARD, **({"crop": crop} if crop else {}))
    mask = read_image(folder / "mask.png")[..., 0]
    assert (out[0, mask == 0] == source_of(folder)[0, mask == 0]).all()
    assert np.abs(out[0][mask > 0].astype(int) - picture[mask > 0]).mean() < 3


def test_the_feather_is_measured_in_the_results_pixels(folder):
    write_images(folder / "source", np.zeros((FRAMES, HEIGHT, WIDTH, 3), np.uint8))
    job = load_job(folder / "job.toml", Grid())
    white = np.full(job.frames.shape, 255, np.uint8)
    row = compositing.finished_at_source_size(job, white, EditSettings(feather=10, color_match=0))[1, 45, :, 0].astype(int)
    assert (row[:40] == 0).all()
    assert row[40:50] == pytest.approx(25.5 * np.arange(1, 11), abs=0.5)
    assert (row[50:70] == 255).all()


@pytest.mark.parametrize("grain", [0.0, 1.0])
def test_what_lies_beyond_the_part_that_was_made_is_no_measure_of_colours_and_grain(folder, grain):
    """There the result is the source itself, and would say that nothing had drifted and no grain was missing."""
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:24] = 0
    write_png(folder / "mask.png", mask)
    random = np.random.default_rng(2)
    clean = np.full((FRAMES, HEIGHT, WIDTH, 3), 100, np.uint8)
    grainy = clean + np.rint(random.normal(0, 5 * grain, (*clean.shape[:3], 1))).astype(np.int8)
    write_images(folder / "source", grainy.astype(np.uint8))
    job = load_job(folder / "job.toml", Grid(), {"size": [64, 64]})
    left, _, width, _ = job.crop
    assert left > 0
    made = np.full(job.frames.shape, 109, np.uint8)
    settings = EditSettings(grain=grain, feather=0)
    inside = compositing.finished_at_source_size(job, made, settings)[1:, 45:, left + 8 : left + width - 8].astype(int)
    assert inside.mean() == pytest.approx(100, abs=1.5)
    assert inside[..., 0].std() == pytest.approx(5 * grain, abs=0.8)


@pytest.mark.parametrize("override", ["edit.size=model", "edit.composite=false"])
def test_the_result_stays_as_the_model_works_where_that_is_asked_for(folder, override):
    job, generated, out = written(folder, override)
    config = load_config(folder / "edit.toml", [override])
    assert (out == compositing.finished(job, generated, config.edit)).all()
    assert "result    96x64, the size that the model works at" in plan.describe_result(job, config.edit)


def test_the_plan_tells_the_results_size(folder):
    job = load_job(folder / "job.toml", Grid())
    assert plan.describe_result(job, EditSettings()).startswith(
        "result    101x67, as the source: what is made is scaled from 96x64 to 101x67 and is laid over the source's own frames"
    )
    assert plan.describe_result(load_job(folder / "job.toml", Grid(size_step=1)), EditSettings()) == \
        "result    101x67, as the source"


@pytest.mark.parametrize(("output", "least"), [("png", np.inf), ("prores", 50), ("mp4", 35)])
def test_a_result_of_the_sources_size_is_judged_at_it(folder, output, least):
    """An mp4 is padded to even sides; what the model made is judged at the size that it was made at."""
    job, generated, _ = written(folder, f"edit.output={output}")
    subject = from_edit(load_config(folder / "edit.toml"), folder / "edit")
    assert subject.edited.shape == subject.source.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert (subject.source == source_of(folder)).all()
    assert (subject.preserve == (read_image(folder / "mask.png")[..., 0] == 0)).all()
    assert (subject.reference == read_image(folder / "first.png")).all()
    assert (subject.generated.video == generated).all()
    assert (subject.generated.source == job.frames).all()
    values = judge(subject, EvaluationSettings(), torch.device("cpu"))
    assert values["preserved_psnr"].value >= least
    assert values["preserved_psnr_generated"].value < 12


def test_a_result_from_before_the_source_had_a_say_in_its_size_is_judged_as_it_is(folder):
    written(folder, "edit.size=model")
    record = folder / "edit/edited.json"
    facts = json.loads(record.read_text())
    del facts["size"], facts["config"]["edit"]["size"]
    record.write_text(json.dumps(facts))
    assert from_edit(load_config(folder / "edit.toml"), folder / "edit").edited.shape == (FRAMES, 64, 96, 3)


def test_files_that_changed_while_the_model_worked_are_told_and_its_work_is_kept(folder):
    job = load_job(folder / "job.toml", Grid())
    write_png(folder / "source/00001.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    config = load_config(folder / "edit.toml")
    with pytest.raises(UserError, match="source: has changed since the job was read"):
        results.write(folder / "edit", Edit(job.frames, job.frames, {}), job, config,
                      LoraFile(folder / "adapter_model.safetensors", {}, {}))
    assert (read_media(folder / "edit/generated.mkv").frames == job.frames).all()


def test_a_result_of_other_settings_is_not_written_over(folder):
    job = load_job(folder / "job.toml", Grid())
    adapter = LoraFile(folder / "step2/adapter_model.safetensors", {}, {})
    adapter.path.parent.mkdir()
    adapter.path.write_bytes(b"weights")

    def edit(*overrides):
        config = load_config(folder / "edit.toml", overrides)
        there = results.folder_beside(job, config, adapter)
        results.write(there, Edit(job.frames, job.frames, {}), job, config, adapter)
        assert results.all_beside(adapter.path)[-1] == there
        return there.name

    assert edit() == "edit"
    assert edit("edit.seed=43") == "edit_2"
    assert edit("edit.source_guidance=2") == "edit_3"
    assert edit("edit.seed=43") == "edit_2"
    assert edit("optimizer.lr=1") == "edit", "training alone"
    record = json.loads((folder / "step2/edit/edited.json").read_text())
    for key in ("clip_frames", "boundary"):
        del record["config"]["edit"][key]
    (folder / "step2/edit/edited.json").write_text(json.dumps(record))
    assert edit() == "edit", "its record is older than these keys, which are not set"
    adapter.path.write_bytes(b"other weights")
    assert edit() == "edit_4"
    job = load_job(folder / "job.toml", Grid(), {"edited_caption": "another"})
    assert edit() == "edit_5"
    (folder / "step2/edit/edited.json").write_text("cut off {")
    assert edit("edit.steps=3") == "edit_6"
    assert len(results.all_beside(adapter.path)) == 6
