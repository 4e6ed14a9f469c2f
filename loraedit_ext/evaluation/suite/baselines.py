"""What anybody can do without a video model: the bars that a method has to clear. Pixels alone.

Videos are uint8 (F, H, W, 3), `preserve` is bool (F, H, W), True outside the edit.
"""

from __future__ import annotations

import cv2
import numpy as np

Box = tuple[int, int, int, int]
"""top, left, bottom, right; bottom and right are the first behind the box."""


def unchanged(source: np.ndarray, first: np.ndarray, preserve: np.ndarray) -> np.ndarray:
    """The source itself."""
    return source.copy()


def static_paste(source: np.ndarray, first: np.ndarray, preserve: np.ndarray) -> np.ndarray:
    """The edited first frame, shown through the region of every frame."""
    pasted = np.where(preserve[..., None], source, first[None])
    pasted[0] = first
    return pasted


def tracked_paste(source: np.ndarray, first: np.ndarray, preserve: np.ndarray) -> np.ndarray:
    """The box around the edited object, cut out of the edited first frame and carried along by the mask's box.

    It takes on the centre and the size of each frame's box; frames without a region stay as they are.
    """
    pasted = source.copy()
    pasted[0] = first
    start = bounding_box(~preserve[0])
    if start is None:
        return pasted
    top, left, bottom, right = start
    crop = first[top:bottom, left:right]
    for frame, kept in zip(pasted[1:], preserve[1:], strict=True):
        if (box := bounding_box(~kept)) is None:
            continue
        top, left, bottom, right = box
        frame[top:bottom, left:right] = cv2.resize(crop, (right - left, bottom - top), interpolation=cv2.INTER_LINEAR)
    return pasted


def bounding_box(region: np.ndarray) -> Box | None:
    """The box around a region, bool (H, W), or None where it is empty."""
    if not region.any():
        return None
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
