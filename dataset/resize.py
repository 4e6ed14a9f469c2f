"""From the source's size to the working size: one crop and scale for frames, masks and edited frames.

Axes: F frames, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

Size = tuple[int, int]
"""(width, height) in pixels."""

Box = tuple[int, int, int, int]
"""(left, top, width, height) in pixels."""

MAX_STRETCH = 0.02
"""A change of aspect up to this is stretched, a larger one is cropped."""
_AROUND = 0.25
"""Of a box's sides, how much of its surroundings a window shows on every side."""
_LONGEST = 16 / 9
"""Aspect up to which a window follows a long box."""


@dataclass(frozen=True)
class Grid:
    """The sizes and frame counts that a model can take; the caller knows the model."""

    frame_step: int = 4
    """Frame counts are a multiple of this plus 1."""
    size_step: int = 16
    """Width and height are multiples of this."""
    max_area: int = 832 * 480
    """Pixels of a frame up to which the default size goes."""

    def frames_below(self, count: int) -> int:
        """The largest count n * frame_step + 1 up to `count`."""
        return (count - 1) // self.frame_step * self.frame_step + 1

    def takes_frames(self, count: int) -> bool:
        """Whether a clip may have `count` frames; one frame alone is no video."""
        return count > self.frame_step and count == self.frames_below(count)

    def nearest_frames(self, count: int) -> list[int]:
        """The frame counts below and above one that is not on the grid."""
        below = self.frames_below(max(1, count))
        return [n for n in (below, below + self.frame_step) if n > self.frame_step]

    def takes_size(self, size: Size) -> bool:
        return all(side % self.size_step == 0 for side in size)

    def default_size(self, source: Size) -> Size:
        """The source's own size if the model can take it, else the nearest below it with its aspect."""
        width, height = source
        if self.takes_size(source) and width * height <= self.max_area:
            return source
        scale = min(1.0, (self.max_area / (width * height)) ** 0.5)
        step = self.size_step
        candidates = [
            (w, h)
            for w in range(step, max(width, step) + 1, step)
            for h in range(step, max(height, step) + 1, step)
            if w * h <= self.max_area
        ]
        return min(candidates, key=lambda size: _distance(size, source, scale))

    def window(self, box: Box, source: Size) -> Box:
        """A part of the source around a box, at least as large as the model's pictures, so that nothing need be scaled up.

        Its sides are on the grid where the source and the box leave room for that, so that it need not be scaled at all.
        """
        width, height = (side * (1 + 2 * _AROUND) for side in box[2:])
        width, height = max(width, height / _LONGEST), max(height, width / _LONGEST)
        area, aspect = max(width * height, self.max_area), width / height
        width = min(source[0], (area * aspect) ** 0.5)
        height = min(source[1], area / width)
        width = min(source[0], area / height)
        sides = [self._side(least, wanted, most) for least, wanted, most in zip(box[2:], (width, height), source, strict=True)]
        starts = [
            min(max(0, start + (inner - side) // 2), most - side)
            for start, inner, side, most in zip(box[:2], box[2:], sides, source, strict=True)
        ]
        return starts[0], starts[1], sides[0], sides[1]

    def _side(self, least: int, wanted: float, most: int) -> int:
        down = int(wanted + 1e-6) // self.size_step * self.size_step
        return down if down >= max(least, self.size_step) else min(most, max(least, math.ceil(wanted)))

    def nearest_sizes(self, size: Size) -> list[Size]:
        """The sizes on the grid around one that is not: rounded down and up."""
        step = self.size_step
        down = tuple(max(step, side // step * step) for side in size)
        up = tuple(-(-side // step) * step for side in size)
        return [(down[0], down[1])] if down == up else [(down[0], down[1]), (up[0], up[1])]


def _distance(size: Size, source: Size, scale: float) -> float:
    """Keeping the aspect counts more than keeping the area."""
    aspect = abs(np.log(size[0] * source[1] / (size[1] * source[0])))
    area = abs(np.log(size[0] * size[1] / (source[0] * source[1] * scale**2)))
    return 3 * float(aspect) + float(area) / 2


@dataclass(frozen=True)
class Fit:
    """A crop of the source and the size that it is scaled to."""

    source: Size
    offset: tuple[int, int]
    """(left, top) of the crop in the source."""
    crop: Size
    size: Size

    @property
    def cropped(self) -> bool:
        return self.crop != self.source

    @property
    def whole(self) -> bool:
        """Whether nothing is cut and nothing scaled."""
        return self.crop == self.size == self.source

    @property
    def factors(self) -> tuple[float, float]:
        """Scale along width and height."""
        return self.size[0] / self.crop[0], self.size[1] / self.crop[1]

    def is_worked_on(self, size: Size) -> bool:
        """Whether a picture of that size is one of the crop at the working size; others show all of the source."""
        return size == self.size != self.source

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) at source size -> working size: area average down, cubic up."""
        return np.ascontiguousarray(scaled(self.cut(image), self.size))

    def laid_over(self, source: np.ndarray, image: np.ndarray) -> np.ndarray:
        """A copy of a picture at source size with one at working size, scaled back, in place of the crop; uint8 (H, W, 3)."""
        whole = source.copy()
        self.cut(whole)[:] = scaled(image, self.crop)
        return whole

    def frames(self, frames: np.ndarray) -> np.ndarray:
        """uint8 (F, H, W, 3) at source size -> working size."""
        return frames if self.whole else np.stack([self.image(frame) for frame in frames])

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """uint8 (F, H, W) at source size -> working size: the brightest source pixel under each pixel."""
        cut = self.cut(mask.transpose(1, 2, 0)).transpose(2, 0, 1)
        if self.crop == self.size:
            return np.ascontiguousarray(cut)
        rows = _footprint_max(cut, 1, self.size[1])
        return np.ascontiguousarray(_footprint_max(rows, 2, self.size[0]))

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The part of a picture (H, W, ...) at source size that is used, as a view of it."""
        (left, top), (width, height) = self.offset, self.crop
        return image[top : top + height, left : left + width]


def box_around(shape: np.ndarray) -> Box:
    """The upright box around a shape, bool (H, W); all zeros where there is none."""
    return cv2.boundingRect(shape.astype(np.uint8))


def fit(source: Size, size: Size, window: Box | None = None) -> Fit:
    """Scale `source` to `size`, after a centred crop where the aspect changes by more than 2 %.

    Args:
        window: the part of the source that is used; default: all of it.
    """
    left, top, width, height = window or (0, 0, *source)
    right, bottom = left + width, top + height
    if not alike(size, (width, height)):
        stretch = _stretch(size, (width, height))
        width = max(1, round(width * min(1.0, stretch)))
        height = max(1, round(height * min(1.0, 1 / stretch)))
    offset = ((left + right - width) // 2, (top + bottom - height) // 2)
    return Fit(source, offset, (width, height), size)


def alike(one: Size, other: Size) -> bool:
    """Whether two sizes have about the same aspect, so that a picture of one may be stretched to the other."""
    return abs(_stretch(one, other) - 1) <= MAX_STRETCH


def _stretch(one: Size, other: Size) -> float:
    """By how much wider the first is than the second of its height."""
    return one[0] * other[1] / (one[1] * other[0])


def scaled(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (H, W, 3) -> that size: area average down, cubic up."""
    height, width = image.shape[:2]
    smaller = (min(width, size[0]), min(height, size[1]))
    if smaller != (width, height):
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
    return image if smaller == size else cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)


def _footprint_max(mask: np.ndarray, axis: int, length: int) -> np.ndarray:
    """Maximum along `axis` over all source pixels that touch each of `length` target pixels."""
    source, cells = mask.shape[axis], np.arange(length)
    first, last = cells * source // length, -(-(cells + 1) * source // length) - 1
    found = np.take(mask, first, axis)
    for step in range(1, int((last - first).max()) + 1):
        np.maximum(found, np.take(mask, np.minimum(first + step, last), axis), out=found)
    return found
