"""Cuts and repeated frames: found where they are, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from media_makers import picture_frames, write_folder

from dataset import footage
from dataset.job import load_job
from dataset.resize import Grid

ONE, OTHER = picture_frames(17), picture_frames(17, seed=3)


def noisy(frames: np.ndarray) -> np.ndarray:
    """As a camera and a codec leave them."""
    grain = np.random.default_rng(0).normal(0, 3, frames.shape)
    return (frames + grain).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("frames", [
    ONE, noisy(ONE), np.repeat(ONE[:1], 17, axis=0), noisy(np.repeat(ONE[:1], 17, axis=0)), ONE[:2], ONE[:1], ONE[::4],
], ids=["moves", "with grain", "a still", "a still with grain", "two frames", "one", "quick"])
def test_a_clip_without_either_is_not_spoken_of(frames):
    assert not list(footage.notes(frames))


@pytest.mark.parametrize("at", [1, 8, 16])
def test_a_cut_is_found_by_the_frame_behind_it(at):
    joined = noisy(np.concatenate([ONE[:at], OTHER[at:]]))
    (note,) = footage.notes(joined, first=100, every=2)
    assert note.startswith(f"looks cut before frame {100 + 2 * at}: ")


def test_a_flash_of_a_frame_is_no_cut():
    lit = ONE.copy()
    lit[8] = 255
    assert not list(footage.notes(lit))


def test_repeats_are_counted_and_listed():
    """24 frames a second in 30: each fourth is shown twice; its noise is another if it was filmed off a screen."""
    telecined = noisy(ONE[[0, 1, 2, 3, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 11]])
    (note,) = footage.notes(telecined)
    assert note.startswith("3 frames repeat the one before (4, 9, 14): ")


def test_frames_on_twos():
    (note,) = footage.notes(np.repeat(ONE, 2, axis=0))
    assert note.startswith("17 frames repeat the one before (1, 3, 5, 7, ...): ")
    assert "`every` = 2" in note


def test_one_frame_that_repeats_is_let_pass():
    assert not list(footage.notes(ONE[[0, 1, 2, 3, 3, *range(4, 16)]]))


def test_the_job_tells(tmp_path):
    write_folder(tmp_path / "clip", np.concatenate([ONE[:9], OTHER[9:]]))
    write_folder(tmp_path / "mask", np.full((17, 48, 64), 255, np.uint8))
    (tmp_path / "job.toml").write_text('source = "clip"\nmask = "mask"\ncaption = "a street"\nstart = 1\n')
    told = load_job(tmp_path / "job.toml", Grid()).choices
    assert any("source clip: looks cut before frame 9: " in choice for choice in told)
