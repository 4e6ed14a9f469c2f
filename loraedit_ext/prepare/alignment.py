"""Brings an edited picture back into line with its frame: image models zoom and shift by some pixels what they do not edit."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from loraedit_ext import difference

_SIDE = 1024
"""Pixels of the longer side at which features are found."""
_RATIO = 0.75
"""A match counts if it is nearer than that share of the next best one's distance (Lowe 2004)."""
_TOLERANCE = 2.0
"""Pixels by which a match may miss the common movement."""
_LEAST = 40
"""Matches that must follow it."""
_OFF, _FARTHEST = 0.75, 0.06
"""Pixels of the source by which a corner must be off to be worth a change, and the share of the diagonal that is no slip."""
_BETTER = 0.8
"""Of the difference from the frame, where the picture is least changed, what may be left."""


@dataclass(frozen=True, eq=False)
class Slip:
    """How far what a picture shows lies off its frame."""

    matrix: np.ndarray
    """float64 (2, 3): the affine map from the picture's pixels to the frame's."""
    pixels: float
    """By which the farthest corner is off."""


def slip(frame: np.ndarray, picture: np.ndarray) -> Slip | None:
    """How a picture lies off its frame.

    None where it lies well, or nothing can be said: too little of it is unchanged or has texture, or it lies too far off.

    Args:
        frame, picture: uint8 (H, W, 3) of one size.
    """
    matrix = _movement(frame, picture)
    if matrix is None:
        return None
    height, width = frame.shape[:2]
    corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]], float)
    off = np.linalg.norm(corners @ matrix.T - corners[:, :2], axis=1).max()
    if not _OFF <= off <= _FARTHEST * np.hypot(width, height):
        return None
    before, after = (_unchanged_error(frame, other) for other in (picture, moved(frame, picture, matrix)))
    return Slip(matrix, float(off)) if after < _BETTER * before else None


def moved(frame: np.ndarray, picture: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The picture in line; what comes in at its borders is the frame's."""
    height, width = frame.shape[:2]
    there = cv2.warpAffine(np.full((height, width), 255, np.uint8), matrix, (width, height), flags=cv2.INTER_LINEAR)
    inside = cv2.erode(there, np.ones((5, 5), np.uint8), borderValue=255) == 255  # cubic pixels reach two beyond their own
    content = cv2.warpAffine(picture, matrix, (width, height), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.where(inside[..., None], content, frame)


def _movement(frame: np.ndarray, picture: np.ndarray) -> np.ndarray | None:
    """The affine map that most features follow."""
    scale = min(1.0, _SIDE / max(frame.shape[:2]))
    small = [cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
             for image in (picture, frame)]
    finder = cv2.SIFT_create(4000)
    (here, those), (there, these) = (finder.detectAndCompute(image, None) for image in small)
    if those is None or these is None or min(len(here), len(there)) < 2:
        return None
    pairs = cv2.BFMatcher().knnMatch(those, these, k=2)
    good = [best for best, second in pairs if best.distance < _RATIO * second.distance]
    if len(good) < _LEAST:
        return None
    start = np.array([here[match.queryIdx].pt for match in good])
    end = np.array([there[match.trainIdx].pt for match in good])
    matrix, follow = cv2.estimateAffine2D(start, end, method=cv2.RANSAC, ransacReprojThreshold=_TOLERANCE)
    if matrix is None or follow.sum() < max(_LEAST, len(good) / 3):
        return None
    matrix[:, 2] /= scale
    return matrix


def _unchanged_error(frame: np.ndarray, picture: np.ndarray) -> float:
    """Mean difference over the pixels between the third and the eighth tenth of it: flat ones and edited ones left out."""
    ranked = np.sort(difference.distance(frame, picture), axis=None)
    return float(ranked[3 * len(ranked) // 10 : 8 * len(ranked) // 10].mean())
