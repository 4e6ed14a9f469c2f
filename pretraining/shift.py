"""Latents moved by less than a latent, and the pixels that they should decode to.

A VAE's latents need not move with the picture: moved by half a latent, this one's lost the outlines of objects, so that a
moving shape had to be drawn anew at each of 8x8 places. Training on moved latents makes them agree, as in EQ-VAE
(Kouzelis et al. 2025, arXiv 2502.09509) and AF-LDM (Zhou et al. 2025, arXiv 2503.09419).
"""

from __future__ import annotations

from torch import Tensor

from models.wan.encoders import WanVAE

STRIDE = WanVAE.spatial_factor
"""Pixels along each side of a latent."""
_BEFORE, _BEHIND = 1, 2
"""Latents that the interpolation needs around, along each axis."""


def moved(latents: Tensor, down: int, right: int) -> Tensor:
    """The latents of a picture whose corner lies `down` and `right` pixels further in, by cubic interpolation (Catmull-Rom).

    Args:
        latents: (..., h, w).
        down, right: 0 to 7 pixels.

    Returns:
        (..., h - 3, w - 3): without the border that has no neighbours.
    """
    return _along(_along(latents, down / STRIDE, -2), right / STRIDE, -1)


def same_part(video: Tensor, down: int, right: int) -> Tensor:
    """The pixels (..., 8 (h - 3), 8 (w - 3)) of a video (..., 8 h, 8 w) that `moved` latents are of."""
    lost = STRIDE * (_BEFORE + _BEHIND)
    top, left = STRIDE * _BEFORE + down, STRIDE * _BEFORE + right
    return video[..., top : top + video.shape[-2] - lost, left : left + video.shape[-1] - lost]


def _along(latents: Tensor, part: float, axis: int) -> Tensor:
    weights = (
        -0.5 * part**3 + part**2 - 0.5 * part,
        1.5 * part**3 - 2.5 * part**2 + 1,
        -1.5 * part**3 + 2 * part**2 + 0.5 * part,
        0.5 * part**3 - 0.5 * part**2,
    )
    length = latents.shape[axis] - _BEFORE - _BEHIND
    first, *rest = (weight * latents.narrow(axis, tap, length) for tap, weight in enumerate(weights))
    return sum(rest, first)
