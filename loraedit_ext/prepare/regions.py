"""Regions of a picture that can be carried to other frames: a drawn box, or any painted shape.

Axes: H W pixels. A transform is float64 (2, 3): a point p = (x, y) of the key frame goes to M[:, :2] p + M[:, 2].
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from dataset.resize import Box, box_around

_CORE = 0.7
"""Share of a box's sides that the ellipse has from which its motion is read: the corners are background as a rule."""
SMALLEST_MARGIN = 8
"""Pixels: one cell of latents."""


@dataclass(frozen=True, eq=False)
class Region:
    """What may change in a key frame.

    Attributes:
        shape: bool (H, W), all of it.
        core: bool (H, W), the part whose motion is its motion.
    """

    shape: np.ndarray
    core: np.ndarray

    def moved(self, transform: np.ndarray) -> Region:
        """The region of another frame; what leaves the picture is cut off."""
        return Region(warped(self.shape, transform), warped(self.core, transform))


def from_box(box: Box, size: tuple[int, int]) -> Region:
    """A box of a picture of (height, width) `size`; the core is an ellipse in it."""
    left, top, width, height = box
    shape, core = np.zeros(size, bool), np.zeros(size, np.uint8)
    shape[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)] = True
    centre = (left + (width - 1) / 2, top + (height - 1) / 2)
    axes = (max(1.0, _CORE * width), max(1.0, _CORE * height))
    cv2.ellipse(core, (centre, axes, 0.0), 1, thickness=cv2.FILLED)
    return Region(shape, core.astype(bool) & shape)


def from_picture(painted: np.ndarray) -> Region:
    """A painted shape, bool (H, W); the core is all of it but a rim, where it has more than that."""
    rim = max(1, round(0.05 * float(np.sqrt(painted.sum()))))
    core = cv2.erode(painted.astype(np.uint8), np.ones((2 * rim + 1, 2 * rim + 1), np.uint8)).astype(bool)
    return Region(painted, core if core.any() else painted)


def widened(shape: np.ndarray, margin: float) -> np.ndarray:
    """A shape, bool (H, W), with a margin on every side.

    Args:
        margin: share of the shape's size (the root of width times height of its box); at least `SMALLEST_MARGIN` pixels.
    """
    _, _, width, height = box_around(shape)
    whole = max(shape.shape)  # more than that is no wider, but a kernel that no memory holds
    pixels = min(whole, max(SMALLEST_MARGIN, round(margin * (width * height) ** 0.5)))
    return cv2.dilate(shape.astype(np.uint8), np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8)).astype(bool)


def filled(shape: np.ndarray) -> np.ndarray:
    """A shape, bool (H, W), without its holes."""
    contours, _ = cv2.findContours(shape.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(np.zeros(shape.shape, np.uint8), contours, -1, 1, cv2.FILLED).astype(bool)


def warped(shape: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """A shape, bool (H, W), in another frame; what leaves the picture is cut off."""
    height, width = shape.shape
    return cv2.warpAffine(shape.astype(np.uint8), transform, (width, height), flags=cv2.INTER_NEAREST).astype(bool)
