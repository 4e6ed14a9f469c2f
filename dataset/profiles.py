"""Colour profiles of pictures: what an image editor saved as Display P3, Adobe RGB or the like comes out in sRGB."""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

_ROUNDING = 2
"""Levels by which a profile that means sRGB differs from it; then the pixels stay as they are."""


def in_srgb(picture: np.ndarray, path: Path) -> np.ndarray:
    """A picture's pixels as viewers show them; those of a file without a profile, or with one that is damaged, are sRGB.

    Args:
        picture: uint8 (H, W, 3), RGB as stored.
        path: its file.
    """
    profile = _embedded(path)
    transform = _to_srgb(profile) if profile else None
    if transform is None:
        return picture
    return np.asarray(ImageCms.applyTransform(Image.fromarray(picture), transform))


def _embedded(path: Path) -> bytes | None:
    try:
        with Image.open(path) as header:  # the pixels are not read
            return header.info.get("icc_profile")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None  # OpenCV read the picture, which is what counts


@lru_cache(8)
def _to_srgb(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """How a profile's colours become sRGB's; None if they are, or if it is of no colours in RGB."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), "RGB", "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
    except (ImageCms.PyCMSError, OSError):
        return None
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    shown = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform))
    return transform if np.abs(shown.astype(int) - colours).max() > _ROUNDING else None
