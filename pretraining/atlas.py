"""Cuts the natural-texture atlas (textures.png) from free pictures that scikit-image, a dev requirement, bundles."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from skimage import data

from loraedit_ext.evaluation.textures import ATLAS_PATH, TILE, TILES

# name -> (scikit-image picture, left, top, side) in pixels of the source. Licences as scikit-image states them:
# astronaut and hubble: NASA, public domain; camera, chelsea, coffee, brick, grass, gravel, retina, rocket: CC0 or
# released to the public domain; immunohistochemistry: no known copyright restrictions.
CROPS: dict[str, tuple[str, int, int, int]] = {
    "astronaut": ("astronaut", 60, 0, 400),
    "suit": ("astronaut", 30, 300, 180),
    "flag": ("astronaut", 0, 0, 110),
    "brick": ("brick", 150, 250, 150),
    "photographer": ("camera", 90, 20, 300),
    "cat": ("chelsea", 75, 0, 300),
    "fur": ("chelsea", 60, 120, 120),
    "coffee": ("coffee", 120, 0, 400),
    "wood": ("coffee", 470, 0, 130),
    "grass": ("grass", 100, 100, 90),
    "gravel": ("gravel", 120, 120, 110),
    "stars": ("hubble_deep_field", 420, 560, 180),
    "rocket": ("rocket", 130, 40, 380),
    "eye": ("retina", 150, 350, 700),
    "tissue": ("immunohistochemistry", 0, 0, 300),
    "cells": ("immunohistochemistry", 250, 230, 180),
}
SMOOTHING = 1.3  # Gaussian sigma in atlas pixels: nothing thinner than a VAE cell can carry


def tile(name: str) -> Image.Image:
    """One tile, (TILE, TILE) RGB, cut, shrunk and smoothed."""
    source, left, top, side = CROPS[name]
    picture = np.asarray(getattr(data, source)())
    crop = Image.fromarray(picture[top : top + side, left : left + side]).convert("RGB")
    return crop.resize((TILE, TILE), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(SMOOTHING))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ATLAS_PATH)
    out = parser.parse_args().out
    columns = 4
    atlas = Image.new("RGB", (columns * TILE, len(TILES) // columns * TILE))
    for index, name in enumerate(TILES):
        atlas.paste(tile(name), (index % columns * TILE, index // columns * TILE))
    atlas.save(out, optimize=True)
    print(f"{out}: {len(TILES)} tiles of {TILE} px, {out.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main()
