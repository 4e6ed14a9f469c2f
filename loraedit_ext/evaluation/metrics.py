"""How near a video is to another one, by region, and how visible the border of the region is; pixels alone.

Videos are uint8 (F, H, W, 3) RGB. Regions are bool (F, H, W), True = counts; `preserve` is a region too, True outside
the edit. Axes: F frames, H W pixels. Numbers that a region has no pixels for are nan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

PEAK = 255.0
"""Data range of 8-bit pixels."""
SIGMA = 1.5
RADIUS = 5
"""Of the Gaussian window: 11x11 pixels, as Wang et al. 2004 have it."""
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
RING = 8
"""Pixels around the edited region that count as its surroundings: one latent cell."""


@dataclass(frozen=True)
class Quality:
    """How near a video is to its target within a region."""

    psnr: float
    """dB over all pixels and channels of the region together; infinite where nothing differs."""
    ssim: float
    """Mean structural similarity, -1 to 1."""
    max_error: float
    """Largest difference of a channel, 0 to 255."""
    pixels: int
    """Pixels that the region has in all frames."""
    frame_psnr: tuple[float, ...]
    """dB, frame by frame."""


@dataclass(frozen=True)
class Seam:
    """How the border of the edited region looks."""

    leak: float
    """Mean absolute difference from the source in the preserved ring around the region, in grey levels."""
    jump: float
    """Mean absolute step of a channel from a preserved pixel to its edited neighbour, in grey levels."""
    source_jump: float
    """The same step in the source: what the picture has there by itself."""

    @property
    def excess(self) -> float:
        """Step that the edit added at the border; above 0 where a seam shows."""
        return self.jump - self.source_jump


def preserved_quality(video: np.ndarray, source: np.ndarray, preserve: np.ndarray) -> Quality:
    """The background against the source (FiVE's background metrics, arXiv 2503.13684)."""
    return quality(video, source, preserve)


def edited_quality(video: np.ndarray, truth: np.ndarray, preserve: np.ndarray) -> Quality:
    """The edited region against a ground truth video, where one exists."""
    return quality(video, truth, ~preserve)


def quality(video: np.ndarray, target: np.ndarray, region: np.ndarray | None = None) -> Quality:
    """PSNR, SSIM and largest error within a region; nothing outside it has any influence.

    Args:
        video, target: uint8 (F, H, W, 3).
        region: bool (F, H, W); default: the whole picture.

    Raises:
        ValueError: shapes or types differ.
    """
    region = np.ones(video.shape[:3], bool) if region is None else region
    check(video, target, region)
    squares, counts, largest = [], [], 0.0
    similarity, similar_pixels = 0.0, 0
    for a, b, mask in zip(video, target, region, strict=True):
        difference = np.abs(a[mask].astype(np.int16) - b[mask])
        squares.append(float(np.square(difference, dtype=np.int32).sum(dtype=np.int64)))
        counts.append(difference.size)
        largest = max(largest, float(difference.max(initial=0)))
        inner = mask & _inside_border(mask.shape)
        if inner.any():
            similarity += float(ssim_map(a, b, mask)[inner].sum(dtype=np.float64)) / 3
            similar_pixels += int(inner.sum())
    return Quality(
        psnr=psnr(sum(squares), sum(counts)),
        ssim=similarity / similar_pixels if similar_pixels else math.nan,
        max_error=largest if sum(counts) else math.nan,
        pixels=sum(counts) // 3,
        frame_psnr=tuple(psnr(s, n) for s, n in zip(squares, counts, strict=True)),
    )


def psnr(squared_error: float, count: int) -> float:
    """Peak signal-to-noise ratio in dB: 10 log10(255^2 / mean squared error).

    Args:
        squared_error: sum over all values, in grey levels squared.
        count: number of values; nan is returned for none.
    """
    if not count:
        return math.nan
    return math.inf if squared_error == 0 else 10 * math.log10(PEAK**2 * count / squared_error)


def ssim_map(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Structural similarity of two pictures at every pixel and channel (Wang, Bovik, Sheikh, Simoncelli 2004).

    The window is a Gaussian with sigma 1.5 cut to 11x11, weights renormalised to the pixels of the mask, so that the
    score of a preserved pixel beside the edit does not depend on the edit. With a full mask and more than 5 pixels off
    the picture's border this is the usual SSIM (population covariance, data range 255).

    Args:
        a, b: uint8 (H, W, 3).
        mask: bool (H, W): pixels that windows may see.

    Returns:
        float32 (H, W, 3); without meaning where the mask is False.
    """
    weight = mask.astype(np.float32)[..., None]
    # Centring keeps float32 exact enough: variances are small differences of large squares.
    x, y = ((picture.astype(np.float32) - PEAK / 2) * weight for picture in (a, b))
    total = np.maximum(_blur(weight[..., 0])[..., None], 1e-6)
    mean_x, mean_y, xx, yy, xy = (_blur(value) / total for value in (x, y, x * x, y * y, x * y))
    var_x, var_y, covariance = xx - mean_x**2, yy - mean_y**2, xy - mean_x * mean_y
    mean_x, mean_y = mean_x + PEAK / 2, mean_y + PEAK / 2
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return luminance * (2 * covariance + C2) / (var_x + var_y + C2)


def _blur(picture: np.ndarray) -> np.ndarray:
    size = (2 * RADIUS + 1, 2 * RADIUS + 1)
    return cv2.GaussianBlur(picture, size, SIGMA, borderType=cv2.BORDER_CONSTANT)


def _inside_border(shape: tuple[int, ...]) -> np.ndarray:
    """Pixels whose window lies within the picture: the only ones that Wang et al. average over."""
    inside = np.zeros(shape, bool)
    inside[RADIUS : shape[0] - RADIUS, RADIUS : shape[1] - RADIUS] = True
    return inside


def seam(video: np.ndarray, source: np.ndarray, preserve: np.ndarray, ring: int = RING) -> Seam:
    """How the border between edit and background looks; a definition of this project.

    `leak` tells whether the edit spilled over into the background near it (0 after compositing), `jump` against
    `source_jump` whether a visible step is left at the border. A mask drawn tight around an object whose colour
    changes has a step of its own; one with a margin should have none.

    Args:
        video, source: uint8 (F, H, W, 3).
        preserve: bool (F, H, W), True outside the edit.
        ring: width in pixels of the ring around the region.

    Raises:
        ValueError: shapes or types differ.
    """
    check(video, source, preserve)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * ring + 1, 2 * ring + 1))
    leak, steps, source_steps = RunningMean(), RunningMean(), RunningMean()
    for result, original, mask in zip(video, source, preserve, strict=True):
        near = mask & (cv2.dilate((~mask).astype(np.uint8), kernel) > 0)
        leak.add(np.abs(result[near].astype(np.int16) - original[near]))
        for axis in (0, 1):
            border = np.diff(mask, axis=axis)
            steps.add(np.abs(np.diff(result.astype(np.int16), axis=axis))[border])
            source_steps.add(np.abs(np.diff(original.astype(np.int16), axis=axis))[border])
    return Seam(leak.value, steps.value, source_steps.value)


def flicker(video: np.ndarray, region: np.ndarray | None = None) -> float:
    """Stillness, 0 to 1: (255 - mean absolute difference of neighbouring frames) / 255.

    VBench's "temporal flickering" (arXiv 2311.17982). A frozen video scores 1, so it means something only beside the
    same number of the source and beside the warping error.

    Args:
        video: uint8 (F, H, W, 3), at least two frames.
        region: bool (F, H, W): a pixel counts if it is in the region in both frames; default: all.
    """
    region = np.ones(video.shape[:3], bool) if region is None else region
    check(video, video, region)
    change = RunningMean()
    for t in range(len(video) - 1):
        both = region[t] & region[t + 1]
        change.add(np.abs(video[t + 1][both].astype(np.int16) - video[t][both]))
    return (PEAK - change.value) / PEAK


def check(video: np.ndarray, other: np.ndarray, region: np.ndarray) -> None:
    """Two videos and a region that belong together.

    Raises:
        ValueError: they do not.
    """
    if video.dtype != np.uint8 or other.dtype != np.uint8 or region.dtype != bool:
        raise ValueError(f"expected uint8 videos and a bool region, got {video.dtype}, {other.dtype}, {region.dtype}")
    if video.ndim != 4 or video.shape != other.shape or region.shape != video.shape[:3]:
        raise ValueError(f"shapes do not fit: videos {video.shape} and {other.shape}, region {region.shape}")


class RunningMean:
    """A mean over values that come in parts; nan without any."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: np.ndarray) -> None:
        self.total += float(values.sum(dtype=np.float64))
        self.count += values.size

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan
