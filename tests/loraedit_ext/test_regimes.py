"""Each regime's triple, row by row of the paper's table, on a moving square."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from common.errors import UserError
from dataset.images import read_image, write_png
from dataset.job import load_job
from dataset.resize import Grid
from loraedit_ext import masks, regimes


@pytest.fixture
def job(edit_folder):
    return load_job(edit_folder.job, Grid())


@pytest.fixture
def video(job):
    return regimes.to_unit(job.frames)


@pytest.fixture
def preserve(job):
    return torch.from_numpy(job.grey_mask.copy()) < 128


def test_naive_knows_frame_0_and_nothing_else(job, video):
    (triple,) = regimes.naive(job)
    assert torch.equal(triple.condition[:, 0], video[:, 0])
    assert triple.condition[:, 1:].eq(0).all()
    assert torch.equal(triple.mask, masks.first_frame_only(9, 64, 64))
    assert torch.equal(triple.target, video)
    assert torch.equal(triple.reference, video[:, 0])
    assert triple.prompt == "p3rs0n, a red square"


def test_motion_knows_frame_0_and_the_background(job, video, preserve):
    (triple,) = regimes.motion(job)
    assert triple.mask[0].all()
    assert torch.equal(triple.mask[1:], preserve[1:])
    assert torch.equal(triple.condition[:, triple.mask], video[:, triple.mask])
    assert triple.condition[:, ~triple.mask].eq(0).all()
    assert torch.equal(triple.target, video)


def test_appearance_has_one_single_frame_sample_per_later_edited_frame(job, video, preserve):
    (triple,) = regimes.appearance(job)
    assert triple.name == "appearance@6"
    assert triple.condition.shape == (3, 1, 64, 64)
    assert torch.equal(triple.mask, preserve[6:7])  # frame 0 of the sample is not preserved whole
    assert torch.equal(triple.condition[:, triple.mask], video[:, 6:7][:, triple.mask])
    assert triple.condition[:, ~triple.mask].eq(0).all()
    assert torch.equal(triple.target, regimes.to_unit(job.edited_frames[1].image[None]))
    assert torch.equal(triple.reference, video[:, 6])
    assert triple.prompt == "p3rs0n, a blue square"


def test_edit_is_motion_but_for_frame_0(job):
    (motion,) = regimes.motion(job)
    edit = regimes.edit(job)
    edited = regimes.to_unit(job.first_edit.image[None])[:, 0]
    assert torch.equal(edit.mask, motion.mask)
    assert torch.equal(edit.condition[:, 1:], motion.condition[:, 1:])
    assert torch.equal(edit.condition[:, 0], edited)
    assert torch.equal(edit.reference, edited)
    assert edit.target is None
    assert edit.prompt == "p3rs0n, a blue square"


def test_unedited_is_the_edit_but_for_the_first_frame(job, video):
    for condition in ("motion", "first_frame", "all"):
        edit, unedited = regimes.edit(job, condition), regimes.unedited(job, condition)
        assert torch.equal(unedited.mask, edit.mask)
        assert torch.equal(unedited.condition[:, 1:], edit.condition[:, 1:])
        assert torch.equal(unedited.condition[:, 0], video[:, 0])
        assert torch.equal(unedited.reference, video[:, 0])
        assert unedited.prompt == edit.prompt


def test_the_source_never_shows_through_the_edit_region_behind_frame_0(job):
    """What the model is told of the region at inference must not hold the object that is to go."""
    condition = regimes.to_pixels(regimes.edit(job).condition)
    red = (condition[1:, ..., 0] > 200) & (condition[1:, ..., 1] < 60)
    assert not red.any()


def test_short_clips_share_their_end_frames_and_keep_their_first_whole(edit_folder):
    edit_folder.job.write_text("clip_frames = 5\n" + edit_folder.job.read_text())
    first, second = regimes.motion(load_job(edit_folder.job, Grid()))
    assert (first.name, second.name) == ("motion@0-4", "motion@4-8")
    assert torch.equal(first.target[:, 4], second.target[:, 0])
    assert second.mask[0].all()


def test_a_job_without_edited_first_frame_cannot_be_edited(edit_folder):
    text = edit_folder.job.read_text()
    edit_folder.job.write_text(text.replace('[[edited_frame]]\nimage = "edited_0.png"\nframe = 0\n', ""))
    with pytest.raises(UserError, match="no edited first frame"):
        regimes.edit(load_job(edit_folder.job, Grid()))


def rendered_again(edit_folder, text="", patch=8):
    """The job with pictures as an image model returns them: a little off everywhere, and a corner changed outright."""
    for index in (0, 6):
        path = edit_folder.path / f"edited_{index}.png"
        picture = read_image(path) + np.uint8(3)
        picture[-patch:, -patch:] = 255
        write_png(path, picture)
    edit_folder.job.write_text(text + edit_folder.job.read_text())
    return load_job(edit_folder.job, Grid())


def test_outside_the_mask_an_edited_picture_does_not_count(edit_folder, video, preserve):
    job = rendered_again(edit_folder)
    (triple,) = regimes.appearance(job)
    edit = regimes.edit(job)
    for picture, index in ((edit.condition[:, 0], 0), (edit.reference, 0), (triple.target[:, 0], 6)):
        whole = regimes.to_unit(read_image(edit_folder.path / f"edited_{index}.png")[None])[:, 0]
        assert torch.equal(picture[:, preserve[index]], video[:, index][:, preserve[index]])
        assert torch.equal(picture[:, ~preserve[index]], whole[:, ~preserve[index]])


def test_the_whole_edited_picture_counts_where_the_job_says_so(edit_folder):
    job = rendered_again(edit_folder, "keep_outside = false\n")
    (triple,) = regimes.appearance(job)
    first, later = (read_image(edit_folder.path / f"edited_{index}.png") for index in (0, 6))
    assert (regimes.with_first_edit(job)[0] == first).all()
    assert torch.equal(triple.target, regimes.to_unit(later[None]))
    assert regimes.left_out(job) == []


def test_what_the_mask_leaves_out_of_an_edited_picture_is_told(edit_folder, job):
    assert regimes.left_out(job) == []
    first, later = regimes.left_out(rendered_again(edit_folder))
    assert "edited frame 0: 2" in first  # 8x8 of 8x8 + 16x16 pixels, a little more for smoothing
    assert "% of what edited_0.png changes lies outside the mask" in first
    assert "edited frame 6" in later


def test_an_edit_is_never_lost_to_an_empty_mask(edit_folder):
    write_png(edit_folder.path / "mask" / "000.png", np.zeros((64, 64), np.uint8))
    with pytest.raises(UserError, match=r"edited_0\.png: changes .* frame 0, but .*mask marks nothing .*keep_outside = false"):
        regimes.left_out(load_job(edit_folder.job, Grid()))
    write_png(edit_folder.path / "edited_0.png", read_image(edit_folder.path / "source" / "000.png") + np.uint8(1))
    (line,) = regimes.left_out(load_job(edit_folder.job, Grid()))
    assert "edited frame 0: nothing of edited_0.png is used" in line


def test_an_edit_is_never_lost_to_an_inverted_mask(edit_folder):
    path = edit_folder.path / "mask" / "000.png"
    write_png(path, 255 - cv2.dilate(read_image(path), np.ones((9, 9), np.uint8)))
    with pytest.raises(UserError, match=r"edited_0\.png: changes .* frame 0, but .*mask marks nothing of that.*white = edit"):
        regimes.left_out(load_job(edit_folder.job, Grid()))


def test_a_picture_that_nobody_edited_is_told(edit_folder):
    write_png(edit_folder.path / "edited_6.png", read_image(edit_folder.path / "source" / "006.png"))
    (line,) = regimes.left_out(load_job(edit_folder.job, Grid()))
    assert "edited frame 6: edited_6.png shows hardly any change" in line


def test_pixels_survive_the_way_to_unit_and_back(job):
    assert (regimes.to_pixels(regimes.to_unit(job.frames)) == job.frames).all()


def test_the_ablations_tell_the_edit_more_or_less(job):
    edited = regimes.to_unit(regimes.with_first_edit(job))
    first, everything, nothing = (regimes.edit(job, condition) for condition in ("first_frame", "all", "none"))
    (naive,) = regimes.naive(job)
    assert torch.equal(first.mask, naive.mask)
    assert torch.equal(first.condition[:, 0], edited[:, 0])
    assert first.condition[:, 1:].eq(0).all()
    assert everything.mask.all()
    assert torch.equal(everything.condition, edited)
    assert not nothing.mask.any()
    assert nothing.condition.eq(0).all()
    assert all(torch.equal(triple.reference, edited[:, 0]) for triple in (first, everything, nothing))
