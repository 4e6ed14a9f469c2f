"""Where an edited picture differs from the frame that it was made of, and how much of that a mask leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dataset.images import channel_range

LITTLE = 0.01
"""Share of what an edited picture changes that may be left out without a word."""
LEAST = 20
"""Grey levels of difference that saving a picture as JPEG, or an editor's colour management, may leave anywhere."""
_NOISE_LEVELS = 4.0
"""A change stands out from the median difference by this many times it."""
_MOST_NOISE = 10
"""Grey levels of median difference above which the picture as a whole has changed."""
_SPECK = 5e-4
"""Share of the picture below which a changed patch is taken for noise."""
_SIGMA = 1.5
"""Pixels of the Gaussian that takes compression noise away."""


def distance(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Grey levels by which two pictures, uint8 (H, W, 3), differ, without their compression noise; uint8 (H, W)."""
    blurred = (cv2.GaussianBlur(picture, (0, 0), _SIGMA) for picture in (before, after))
    return channel_range(cv2.absdiff(*blurred))[1]


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """The pixels that a person changed, as bool (H, W).

    A picture that went through another program differs a little everywhere; what counts is what stands out from that.

    Args:
        before, after: uint8 (H, W, 3) of one size.
    """
    off = distance(before, after)
    noise = float(np.median(off))
    threshold = max(LEAST, _NOISE_LEVELS * noise) if noise <= _MOST_NOISE else LEAST
    touched = (off > threshold).astype(np.uint8)
    touched = cv2.morphologyEx(touched, cv2.MORPH_CLOSE, np.ones((9, 9), np.uint8))
    count, labels, facts, _ = cv2.connectedComponentsWithStats(touched)
    large = [index for index in range(1, count) if facts[index, cv2.CC_STAT_AREA] >= _SPECK * touched.size]
    return np.isin(labels, large)


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What of a change lies outside a mask."""

    touched: np.ndarray
    """bool (H, W): all that was changed."""
    outside: np.ndarray
    """bool (H, W): of it what the mask leaves out."""

    @property
    def share(self) -> float:
        """Of the change; 0 where nothing was changed."""
        return float(self.outside.sum()) / max(1, int(self.touched.sum()))


def left_out(before: np.ndarray, after: np.ndarray, preserve: np.ndarray) -> LeftOut:
    """What a mask, bool (H, W) and True where pixels stay, leaves out of an edited picture's change."""
    touched = changed(before, after)
    return LeftOut(touched, touched & preserve)
