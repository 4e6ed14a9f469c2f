"""The eight symmetries of a square: a rendered clip, mirrored and turned, is a new one for the price of encoding it.

Odd numbers mirror left and right first; each pair turns a quarter clockwise further than the one before.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from loraedit_ext.evaluation.scenes import Motion, Scene, Vector

COUNT = 8


def of_picture(picture: Tensor, symmetry: int) -> Tensor:
    """(..., height, width), square."""
    mirrored = picture.flip(-1) if symmetry % 2 else picture
    return torch.rot90(mirrored, -(symmetry // 2), (-2, -1)).contiguous()


def of_scene(scene: Scene, symmetry: int) -> Scene:
    """A scene whose objects, rendered on a square, are where `of_picture` puts them; textures stay as they are."""
    objects = tuple(replace(item, motion=_of_motion(item.motion, symmetry)) for item in scene.objects)
    return replace(scene, pan=_of_vector(scene.pan, symmetry), objects=objects)


def _of_vector(vector: Vector, symmetry: int) -> Vector:
    x, y = (-vector[0], vector[1]) if symmetry % 2 else vector
    for _ in range(symmetry // 2):
        x, y = -y, x
    return x, y


def _of_motion(motion: Motion, symmetry: int) -> Motion:
    hand = -1 if symmetry % 2 else 1
    return replace(
        motion,
        start=_of_vector(motion.start, symmetry),
        travel=_of_vector(motion.travel, symmetry),
        curl=motion.curl if motion.path == "sway" else hand * motion.curl,
        angle=hand * motion.angle + symmetry // 2 * math.pi / 2,
        spin=hand * motion.spin,
        turn_axis=hand * motion.turn_axis,
    )
