"""Carries regions through a video by optical flow (OpenCV's DIS): no weights, some milliseconds a frame.

From frame to frame the region's motion is the similarity (shift, turn, scale) that most of its core agrees on. Each key
frame's region goes forward and backward, and holds for the frames that are nearest to it, so that a wrong track is
mended by one more key frame. Axes: F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from common.progress import brief
from loraedit_ext.prepare.regions import Region

WORKING_SIDE = 480
"""Pixels of the shorter side at which flow is computed; more costs time and is no better."""
UNSURE = 0.5
"""Agreement below which a step is doubted."""
_RETURN = 1.0
"""Pixels by which a point may miss its origin after the way forth and back."""
_INLIER = 1.0
"""Pixels within which a point agrees with the similarity."""
_FITTING = 0.6
"""Share of the points that must agree before turn and scale are believed; else the median shift is taken."""
_GROWTH = 0.03
"""Change of size from one frame to the next that is believed."""
_POINTS = 2000
_FEWEST = 8


@dataclass(frozen=True, eq=False)
class Track:
    """A region in every frame.

    Attributes:
        shapes: bool (F, H, W).
        agreement: float64 (F,), 0 to 1: how far the step to this frame, from the side of its key frame, is believed; 1 at
            key frames, 0 where nothing was found. Here it is the share of the core that agreed on the step, of what stays
            in the picture.
    """

    shapes: np.ndarray
    agreement: np.ndarray

    def doubtful(self) -> list[int]:
        """Frames whose step is doubted although the region is in the picture."""
        seen = self.shapes.any((1, 2))
        return [int(index) for index in np.flatnonzero((self.agreement < UNSURE) & seen)]


def track(frames: np.ndarray, keys: Mapping[int, Region]) -> Track:
    """Carry the regions of key frames through a clip.

    Args:
        frames: uint8 (F, H, W, 3).
        keys: at least one; frame index -> region at the frames' size.
    """
    shapes, agreement = np.zeros(frames.shape[:3], bool), np.zeros(len(frames))
    steps = _Steps(frames)
    order = sorted(keys)
    with brief(len(frames), "tracking", "frame") as bar:
        for place, key in enumerate(order):
            before = order[place - 1] if place else -1 - key
            behind = order[place + 1] if place + 1 < len(order) else 2 * len(frames) - key
            first, last = (before + key) // 2 + 1, min(len(frames) - 1, (key + behind) // 2)
            shapes[key], agreement[key] = keys[key].shape, 1.0
            bar.update()
            for path in (range(key + 1, last + 1), range(key - 1, first - 1, -1)):
                _follow(keys[key], path, steps, shapes, agreement)
                bar.update(len(path))
    return Track(shapes, agreement)


def _follow(region: Region, path: range, steps: _Steps, shapes: np.ndarray, agreement: np.ndarray) -> None:
    """Fill in the frames of `path`, which begins beside the region's key frame."""
    whole, step = np.eye(3), np.eye(2, 3)
    present = region
    for index in path:
        measured, agreement[index] = steps.between(index - path.step, index, present.core)
        step = step if measured is None else measured  # what is out of sight goes on as it went
        whole = np.vstack([step, [0, 0, 1]]) @ whole
        present = region.moved(whole[:2])
        shapes[index] = present.shape


class _Steps:
    """Similarities between neighbouring frames, measured at the working size."""

    def __init__(self, frames: np.ndarray) -> None:
        self.factor = min(1.0, WORKING_SIDE / min(frames.shape[1:3]))
        self.greys = [self._grey(frame) for frame in frames]
        self.estimator = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def _grey(self, frame: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        return cv2.resize(grey, None, fx=self.factor, fy=self.factor, interpolation=cv2.INTER_AREA)

    def between(self, start: int, end: int, core: np.ndarray) -> tuple[np.ndarray | None, float]:
        """The similarity, float64 (2, 3), that takes the core of frame `start` to frame `end`, and how much of it agrees.

        None and 0 where too little of the core can be found again.
        """
        grey = self.greys[start], self.greys[end]
        small = cv2.resize(core.astype(np.uint8), grey[0].shape[::-1], interpolation=cv2.INTER_NEAREST)
        forth, back = self.estimator.calc(*grey, None), self.estimator.calc(*grey[::-1], None)
        sampled = _sampled(small)
        points, targets, staying = _pairs(sampled, forth, back)
        if len(points) < _FEWEST:
            return None, 0.0
        matrix, agreeing = _similarity(points, targets)
        matrix[:, 2] /= self.factor
        return matrix, agreeing * len(points) / staying


def _sampled(core: np.ndarray) -> np.ndarray:
    """Points of the core, int (N, 2), evenly thinned out."""
    points = np.argwhere(core)[:, ::-1]
    return points[:: max(1, len(points) // _POINTS)]


def _pairs(sampled: np.ndarray, forth: np.ndarray, back: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Sampled points (N, 2) and where they go, as far as they stay in the picture and the way back agrees; how many stay."""
    points = sampled.astype(np.float32)
    targets = points + forth[sampled[:, 1], sampled[:, 0]]
    height, width = forth.shape[:2]
    inside = ((targets >= 0) & (targets <= (width - 1, height - 1))).all(1)
    points, targets = points[inside], targets[inside]
    if not len(points):
        return points, targets, 0
    returned = cv2.remap(back, targets[None, :, 0], targets[None, :, 1], cv2.INTER_LINEAR)[0]
    kept = np.linalg.norm(targets + returned - points, axis=1) < _RETURN
    return points[kept], targets[kept], len(points)


def _similarity(points: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, float]:
    """The similarity most points agree on, or their median shift; and the share of them that agree."""
    cv2.setRNGSeed(0)
    matrix, inliers = cv2.estimateAffinePartial2D(points, targets, method=cv2.RANSAC, ransacReprojThreshold=_INLIER)
    if matrix is not None and inliers.mean() >= _FITTING and abs(np.linalg.det(matrix[:, :2]) ** 0.5 - 1) <= _GROWTH:
        return matrix, float(inliers.mean())
    shift = np.median(targets - points, axis=0)
    agreeing = np.linalg.norm(targets - points - shift, axis=1) < 2 * _INLIER
    return np.hstack([np.eye(2), shift[:, None]]).astype(np.float64), float(agreeing.mean())
