"""From the outlines that SAM 2 found to the regions to edit: what an edit has beyond its object goes with the object.

Axes: F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from loraedit_ext.prepare.regions import warped, widened
from loraedit_ext.prepare.tracking import Track


def track_of(outlines: np.ndarray, keys: Collection[int], edits: Mapping[int, np.ndarray]) -> Track:
    """The object's outlines, and with them what the edits have beyond, such as a hat on a head.

    The frame of an edit holds all of it. What the widened outline there does not hold moves to other frames by the shift and
    the change of size between both outlines; each frame takes it from the edit that is nearest, as in optical flow. Where
    there is no object nothing is marked.

    Args:
        outlines: bool (F, H, W).
        keys: frames whose outlines were asked for, none of them empty.
        edits: bool (H, W) by frame, which is a key.

    Returns:
        A track whose agreement is the smaller by the larger area of the outline and of that of the frame before: one that
        doubles or halves from frame to frame has lost or caught something.
    """
    shapes = outlines.copy()
    beyond = {frame: edit & ~widened(outlines[frame], 0.0) for frame, edit in edits.items()}
    for frame in np.flatnonzero(outlines.any((1, 2))) if beyond else ():
        key = min(beyond, key=lambda key: (abs(key - frame), key))
        shapes[frame] |= warped(beyond[key], _motion(outlines[key], outlines[frame]))
    for frame, edit in edits.items():
        shapes[frame] |= edit
    return Track(shapes, _steadiness(outlines.sum((1, 2)), keys))


def _motion(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Shift and scale, float64 (2, 3), from one outline to another.

    By centroid and area: a box's sides follow every arm that is stretched out.
    """
    scale = float(after.sum() / before.sum()) ** 0.5
    shift = _centroid(after) - scale * _centroid(before)
    return np.array([[scale, 0.0, shift[0]], [0.0, scale, shift[1]]])


def _centroid(shape: np.ndarray) -> np.ndarray:
    return np.argwhere(shape)[:, ::-1].mean(0)


def _steadiness(areas: np.ndarray, keys: Collection[int]) -> np.ndarray:
    """How alike areas (F,) are to their neighbours on the side of the first key."""
    steps = np.minimum(areas[1:], areas[:-1]) / np.maximum(1, np.maximum(areas[1:], areas[:-1]))
    first = min(keys)
    agreement = np.concatenate([steps[:first], [1.0], steps[first:]])
    agreement[list(keys)] = 1.0
    return agreement
