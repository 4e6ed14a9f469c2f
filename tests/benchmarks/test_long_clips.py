"""The comparison of long clips: what counts as seen, and what its table says."""

from __future__ import annotations

import numpy as np

from benchmarks import long_clips


def test_frames_that_the_user_edited_do_not_count():
    truth = np.zeros((25, 8, 8, 3), np.uint8)
    video, region = truth.copy(), np.ones((25, 8, 8), bool)
    video[6] = 255
    video[7] = 10
    first, second = (long_clips.unseen_psnr(video, truth, region, frames, (6, 18)) for frames in long_clips.HALVES.values())
    assert np.isclose(first, 10 * np.log10(255**2 / (10**2 / 10)))
    assert second > 90


def test_pieces_are_compared_with_the_whole_task_by_task():
    first, second = long_clips.HALVES
    whole = {"a": {first: 20.0, second: 10.0}, "b": {first: 30.0, second: 20.0}}
    pieces = {"a": {first: 21.0, second: 12.0}, "b": {first: 31.0, second: 22.0}}
    _, _, plain, cut = long_clips.table({("L", "whole"): whole, ("L", "pieces of 13"): pieces}).strip().split("\n")
    assert plain == "| L | whole | 25.0 | 15.0 | – | – |"
    assert cut == "| L | pieces of 13 | 26.0 | 17.0 | +1.00 ± 0.00 | +2.00 ± 0.00 |"
