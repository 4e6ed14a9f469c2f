"""Does the edit move as the source does: warping error along the source's flow, and flow against flow.

Optical flow is OpenCV's DIS (Kroeger et al. 2016): no weights. Videos are uint8 (F, H, W, 3) RGB, regions bool
(F, H, W); flow is in pixels, (x, y). Numbers that a region has no pixels for are nan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from common.progress import progress
from loraedit_ext.evaluation.metrics import PEAK, RunningMean, check

SMALLEST_SIDE = 32
"""Pixels below which DIS has too few scales to be of use."""


@dataclass(frozen=True, eq=False)
class Flow:
    """Motion between neighbouring frames of a video."""

    backward: np.ndarray
    """float32 (F-1, H, W, 2): for each pixel of frame t+1, where it was in frame t."""
    visible: np.ndarray
    """bool (F-1, H, W): pixels of frame t+1 that were in frame t too, neither occluded nor outside the picture."""


@dataclass(frozen=True)
class Warping:
    """Temporal consistency: what is left when each frame is compared with the one before it, moved along."""

    error: float
    """Mean squared difference of a channel, pixel values in 0 to 1."""
    frame_errors: tuple[float, ...]
    """The same for frames 1 on."""


@dataclass(frozen=True)
class Agreement:
    """Motion of the edit against motion of the source."""

    error: float
    """Mean endpoint error of the edit's flow, in pixels a frame."""
    frozen: float
    """What a frozen picture scores: the source's mean speed, in pixels a frame."""

    @property
    def ratio(self) -> float:
        """error / frozen: 0 is the source's own motion, 1 no better than standing still."""
        return self.error / self.frozen if self.frozen else math.nan


def flow(video: np.ndarray, description: str = "optical flow") -> Flow:
    """Flow of a video and where it can be trusted.

    A pixel counts as occluded where forward and backward flow do not cancel: |f + b|^2 > 0.01 (|f|^2 + |b|^2) + 0.5,
    f read at the place that b points to (Ruder, Dosovitskiy, Brox 2016, as used by Lai et al. 2018).

    Args:
        video: uint8 (F, H, W, 3), at least two frames, sides of 32 pixels or more.
        description: what the progress bar says.

    Raises:
        ValueError: the video is too short or too small.
    """
    if len(video) < 2 or min(video.shape[1:3]) < SMALLEST_SIDE:
        raise ValueError(
            f"flow needs two frames of at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels, got {video.shape}"
        )
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in video]
    estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    backward = np.empty((len(video) - 1, *video.shape[1:3], 2), np.float32)
    visible = np.empty(backward.shape[:3], bool)
    with progress(len(backward), description, unit="frame") as bar:
        for t in range(len(backward)):
            backward[t] = estimator.calc(grey[t + 1], grey[t], None)
            visible[t] = _visible(estimator.calc(grey[t], grey[t + 1], None), backward[t])
            bar.update()
    return Flow(backward, visible)


def _visible(forward: np.ndarray, backward: np.ndarray) -> np.ndarray:
    there = warp(forward, backward)
    height, width = backward.shape[:2]
    x, y = np.moveaxis(_targets(backward), -1, 0)
    inside = (x >= 0) & (x <= width - 1) & (y >= 0) & (y <= height - 1)
    return inside & (_squares(there + backward) <= 0.01 * (_squares(there) + _squares(backward)) + 0.5)


def warp(picture: np.ndarray, backward: np.ndarray) -> np.ndarray:
    """Move frame t to where frame t+1 has it: out(p) = picture(p + backward(p)), bilinear.

    Args:
        picture: (H, W, C).
        backward: float32 (H, W, 2).
    """
    return cv2.remap(picture, _targets(backward), None, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def _targets(backward: np.ndarray) -> np.ndarray:
    height, width = backward.shape[:2]
    targets = backward.copy()
    targets[..., 0] += np.arange(width, dtype=np.float32)
    targets[..., 1] += np.arange(height, dtype=np.float32)[:, None]
    return targets


def _squares(vectors: np.ndarray) -> np.ndarray:
    """Squared lengths of (..., 2); numpy's sum takes several times as long along so short an axis."""
    return np.square(vectors[..., 0]) + np.square(vectors[..., 1])


def warping(video: np.ndarray, source_flow: Flow, region: np.ndarray | None = None) -> Warping:
    """Flow-warped error (Lai et al. 2018, arXiv 1808.00449), along the flow of the *source*.

    With its own flow a frozen video would be perfect; with the source's flow it is punished. Occluded pixels are left
    out. Set it beside the source's own error, which is the noise floor.

    Args:
        video: uint8 (F, H, W, 3).
        source_flow: of the source.
        region: bool (F, H, W): pixels of frame t+1 that count; default: all.
    """
    region = np.ones(video.shape[:3], bool) if region is None else region
    check(video, video, region)
    errors, counts = [], []
    for t in range(len(video) - 1):
        counted = source_flow.visible[t] & region[t + 1]
        moved = warp(video[t].astype(np.float32), source_flow.backward[t])
        errors.append(float(np.square((moved[counted] - video[t + 1][counted]) / PEAK).sum(dtype=np.float64)))
        counts.append(int(counted.sum()) * 3)
    frames = tuple(e / n if n else math.nan for e, n in zip(errors, counts, strict=True))
    return Warping(sum(errors) / sum(counts) if sum(counts) else math.nan, frames)


def agreement(edit_flow: Flow, source_flow: Flow, region: np.ndarray) -> Agreement:
    """Mean endpoint error between the flow of edit and source; a definition of this project.

    Pixels that the source occludes are left out; the edit's own occlusions are not, or an edit whose flow makes no
    sense would be judged by its best pixels. Flow is vague where there is no texture: compare with `frozen`, and with
    the same number of other methods on the same clip.

    Args:
        edit_flow, source_flow: of videos of one shape.
        region: bool (F, H, W): pixels of frame t+1 that count.

    Raises:
        ValueError: shapes differ.
    """
    if edit_flow.backward.shape != source_flow.backward.shape or region[1:].shape != source_flow.visible.shape:
        raise ValueError(
            f"shapes do not fit: flows {edit_flow.backward.shape} and {source_flow.backward.shape}, "
            f"region {region.shape}"
        )
    distance, speed = RunningMean(), RunningMean()
    for edit, source, counted in zip(
        edit_flow.backward, source_flow.backward, region[1:] & source_flow.visible, strict=True
    ):
        distance.add(_lengths(edit - source)[counted])
        speed.add(_lengths(source)[counted])
    return Agreement(distance.value, speed.value)


def _lengths(vectors: np.ndarray) -> np.ndarray:
    return np.hypot(vectors[..., 0], vectors[..., 1])
