"""Textures of the procedural scenes: two-colour patterns and natural pictures, sampled at continuous coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[np.float32]

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.14, 0.14), "green": (0.13, 0.66, 0.25), "blue": (0.14, 0.28, 0.88), "yellow": (0.95, 0.84, 0.15),
    "purple": (0.55, 0.18, 0.75), "cyan": (0.15, 0.78, 0.85), "orange": (0.95, 0.50, 0.10), "white": (0.94, 0.94, 0.94),
    "black": (0.08, 0.08, 0.08), "pink": (0.95, 0.52, 0.72), "brown": (0.45, 0.27, 0.12), "gray": (0.5, 0.5, 0.5),
}
PATTERNS = ("solid", "striped", "checkered", "dotted", "shaded", "halved", "wavy", "cloudy")
TILES = (
    "astronaut", "suit", "flag", "brick", "photographer", "cat", "fur", "coffee",
    "wood", "grass", "gravel", "stars", "rocket", "eye", "tissue", "cells",
)
TILE = 96  # side of an atlas tile, pixels
ATLAS_PATH = Path(__file__).with_name("textures.png")
_ALIKE = 0.42  # distance in RGB under which two colours pass for one: orange is like red and yellow, brown like black
_EXTENT = 1.25  # a tile spans [-_EXTENT, _EXTENT] in texture coordinates and is mirrored beyond


@dataclass(frozen=True)
class Texture:
    """A colour field over the plane.

    Attributes:
        kind: one of `PATTERNS`, or the name of a natural tile of `TILES`.
        colors: two names of `PALETTE`; a pattern or a tile's brightness blends between them. None (tiles only) keeps
            the picture's own colours.
        frequency: pattern periods, about, across [-1, 1]; for tiles a magnification.
        angle: rotation of the pattern in radians.
        offset: shift of the pattern in texture coordinates.
    """

    kind: str
    colors: tuple[str, str] | None
    frequency: float = 1.5
    angle: float = 0.0
    offset: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if self.kind not in PATTERNS + TILES:
            raise ValueError(f"texture kind {self.kind!r}: expected one of {', '.join(PATTERNS + TILES)}")
        if self.colors is None and self.kind in PATTERNS:
            raise ValueError(f"texture {self.kind!r} needs two colours; only natural tiles have their own")
        for name in self.colors or ():
            if name not in PALETTE:
                raise ValueError(f"colour {name!r}: expected one of {', '.join(PALETTE)}")


def sample(texture: Texture, u: Array, v: Array) -> Array:
    """Colours (..., 3) in [0, 1] of a texture at coordinates u (right) and v (down), broadcast together."""
    cos, sin = np.float32(np.cos(texture.angle)), np.float32(np.sin(texture.angle))
    p = u * cos + v * sin - np.float32(texture.offset[0])
    q = v * cos - u * sin - np.float32(texture.offset[1])
    if texture.kind in TILES:
        tiles = _atlas() if texture.colors is None else _brightness()
        scale = np.float32(texture.frequency)
        field = _bilinear(tiles[TILES.index(texture.kind)], p * scale, q * scale)
        if texture.colors is None:
            return field
        weight = field
    else:
        weight = _pattern(texture.kind, p, q, texture.frequency)[..., None]
    first, second = (np.asarray(PALETTE[name], np.float32) for name in texture.colors or ())
    return first + weight * (second - first)


def lookalikes(texture: Texture) -> set[str]:
    """Names of the `PALETTE` that would be hard to see on a texture: near its colours, or near their mean."""
    if texture.colors is None:
        shown = [_atlas()[TILES.index(texture.kind)].mean(axis=(0, 1))]
    else:
        first, second = (np.asarray(PALETTE[name]) for name in texture.colors)
        shown = [first, second, (first + second) / 2]
    return {name for name, color in PALETTE.items() if any(np.linalg.norm(color - other) < _ALIKE for other in shown)}


def _pattern(kind: str, p: Array, q: Array, frequency: float) -> Array:
    """Blend weight in [0, 1]; edges are soft, so that nothing aliases at 64 pixels."""
    f = np.float32(np.pi * frequency)
    if kind == "solid":
        return np.zeros(np.broadcast_shapes(p.shape, q.shape), np.float32)
    if kind == "striped":
        return 0.5 + 0.5 * np.tanh(3 * np.sin(f * p)) + 0 * q
    if kind == "checkered":
        return 0.5 + 0.5 * np.tanh(4 * np.sin(f * p) * np.sin(f * q))
    if kind == "dotted":
        return 0.5 + 0.5 * np.tanh(2.5 * (np.cos(f * p) + np.cos(f * q) - 0.6))
    if kind == "shaded":
        return np.clip(0.5 + 0.5 * p, 0, 1) + 0 * q
    if kind == "halved":
        return 0.5 + 0.5 * np.tanh(12 * p) + 0 * q
    if kind == "wavy":
        return 0.5 + 0.5 * np.sin(f * p + 1.2 * np.sin(0.8 * f * q))
    return 0.5 + 0.25 * (np.sin(f * p + 1.3 * np.sin(f * q)) + np.sin(0.7 * f * q - 1.1 * np.sin(0.6 * f * p)))


@cache
def _atlas() -> Array:
    """The natural tiles, (len(TILES), TILE, TILE, 3) in [0, 1]."""
    with Image.open(ATLAS_PATH) as picture:
        pixels = np.asarray(picture.convert("RGB"), np.float32) / 255
    rows, columns = pixels.shape[0] // TILE, pixels.shape[1] // TILE
    grid = pixels.reshape(rows, TILE, columns, TILE, 3).swapaxes(1, 2)
    return np.ascontiguousarray(grid.reshape(rows * columns, TILE, TILE, 3))


@cache
def _brightness() -> Array:
    """Brightness of the tiles stretched to [0, 1], (len(TILES), TILE, TILE, 1): what tinted tiles blend with."""
    grey = _atlas().mean(axis=-1, keepdims=True)
    low, high = (np.percentile(grey, q, axis=(1, 2, 3), keepdims=True).astype(np.float32) for q in (3, 97))
    return np.clip((grey - low) / (high - low), 0, 1)


def _bilinear(tile: Array, p: Array, q: Array) -> Array:
    """Sample a tile (TILE, TILE, channels), mirrored endlessly, at broadcast coordinates."""
    side, channels = tile.shape[0], tile.shape[-1]
    x0, x1, wx = _mirrored(p, side)
    y0, y1, wy = _mirrored(q, side)
    flat = tile.reshape(-1, channels)
    wx, wy = wx[..., None], wy[..., None]
    top = flat[y0 * side + x0] * (1 - wx) + flat[y0 * side + x1] * wx
    bottom = flat[y1 * side + x0] * (1 - wx) + flat[y1 * side + x1] * wx
    return top + wy * (bottom - top)


def _mirrored(coordinate: Array, side: int) -> tuple[NDArray[np.int32], NDArray[np.int32], Array]:
    """Two neighbouring texel indices and the weight of the second, for a mirror-repeated axis."""
    position = (coordinate + _EXTENT) * np.float32((side - 1) / (2 * _EXTENT))
    period = np.float32(2 * (side - 1))
    position = np.abs(np.mod(position + (side - 1), period) - (side - 1))
    lower = np.minimum(position.astype(np.int32), side - 2)
    return lower, lower + 1, position - lower.astype(np.float32)
