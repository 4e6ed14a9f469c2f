"""The numbers of one result of the benchmark, against the exact truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraedit_ext.evaluation import metrics, motion
from loraedit_ext.evaluation.suite.tasks import FRAMES, REFERENCES, TaskMedia

PER_MILLE = 1000


@dataclass(frozen=True)
class Score:
    """One column of the table."""

    key: str
    title: str
    better: str
    """"higher" or "lower"."""
    digits: int = 1


SCORES = (
    Score("preserved_psnr", "background PSNR (dB)", "higher"),
    Score("preserved_ssim", "background SSIM", "higher", 3),
    Score("edit_psnr", "edit PSNR (dB)", "higher"),
    Score("edit_ssim", "edit SSIM", "higher", 3),
    Score("edit_psnr_unseen", "edit PSNR, no reference (dB)", "higher"),
    Score("object_psnr", "object PSNR (dB)", "higher"),
    Score("object_gain", "nearer to edit than source (dB)", "higher"),
    Score("warping", "warping error (per mille)", "lower"),
)
"""All of them leave out frame 0, which is given. Definitions: docs/benchmark.md."""
BY_KEY = {score.key: score for score in SCORES}
UNSEEN = tuple(index for index in range(1, FRAMES) if index not in REFERENCES)
"""Frames whose edit no method is shown."""


def scores(video: np.ndarray, media: TaskMedia) -> dict[str, float]:
    """All scores of a result, uint8 (F, H, W, 3), before compositing; `warping_truth` is what the truth itself has."""
    later, edit = slice(1, None), ~media.preserve
    background = metrics.quality(video[later], media.source[later], media.preserve[later])
    edited = metrics.quality(video[later], media.truth[later], edit[later])
    unseen = list(UNSEEN)
    to_truth, to_source = (
        metrics.quality(video[later], target[later], media.changed[later]).psnr
        for target in (media.truth, media.source)
    )
    source_flow = motion.flow(media.source)
    return {
        "preserved_psnr": background.psnr, "preserved_ssim": background.ssim,
        "edit_psnr": edited.psnr, "edit_ssim": edited.ssim,
        "edit_psnr_unseen": metrics.quality(video[unseen], media.truth[unseen], edit[unseen]).psnr,
        "object_psnr": metrics.quality(video[later], media.truth[later], media.object[later]).psnr,
        "object_gain": to_truth - to_source,
        "warping": PER_MILLE * motion.warping(video, source_flow, edit).error,
        "warping_truth": PER_MILLE * motion.warping(media.truth, source_flow, edit).error,
    }  # fmt: skip

