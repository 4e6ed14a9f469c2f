"""Renders procedural scenes to video with exact per-object masks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraedit_ext.evaluation.scenes import Motion, Scene, SceneObject, Shape
from loraedit_ext.evaluation.textures import Array, sample

_THINNEST = 0.1  # a card seen edge-on keeps this share of its width, so that it never vanishes between pixels


@dataclass(frozen=True)
class Rendered:
    """A rendered scene.

    Attributes:
        video: (frames, height, width, 3), float32 in [0, 1].
        alpha: (objects, frames, height, width) in [0, 1]: coverage of each object as if it were alone.
        visible: the same after occlusion; the sum over objects plus the background's share is 1.
    """

    video: Array
    alpha: Array
    visible: Array


def render(scene: Scene, frames: int = 13, size: tuple[int, int] = (64, 64)) -> Rendered:
    """Render a scene; clip time runs from 0 at the first frame to 1 at the last.

    Compositing is exact: a pixel that an object's alpha does not touch is bit for bit what it is without that object.

    Args:
        scene: what to render.
        frames: number of frames, at least 1.
        size: height and width in pixels; the shorter side spans [-1, 1].
    """
    if frames < 1 or min(size) < 1:
        raise ValueError(f"frames = {frames}, size = {size}: both must be positive")
    time = (np.arange(frames, dtype=np.float32) / max(frames - 1, 1))[:, None, None]
    x, y, pixel = _grid(size)
    video = _background(scene, x, y, time)
    alphas, visible = [], []
    for item in scene.objects:
        alpha, color = _draw(item, x, y, time, pixel)
        # Exact where alpha is 0 or 1: there the pixel does not depend on what loses, not even in the last bit.
        video = video * (1 - alpha[..., None]) + color * alpha[..., None]
        visible = [share * (1 - alpha) for share in visible]
        visible.append(alpha)
        alphas.append(alpha)
    return Rendered(np.clip(video, 0, 1), np.stack(alphas), np.stack(visible))


def _grid(size: tuple[int, int]) -> tuple[Array, Array, float]:
    """Pixel centres x (1, 1, width), y (1, height, 1), and the side of a pixel."""
    height, width = size
    pixel = 2 / min(size)
    x = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) * np.float32(pixel)
    y = (np.arange(height, dtype=np.float32) + 0.5 - height / 2) * np.float32(pixel)
    return x[None, None, :], y[None, :, None], pixel


def _background(scene: Scene, x: Array, y: Array, time: Array) -> Array:
    if scene.pan == (0.0, 0.0):  # the same picture in every frame: sample it once
        still = sample(scene.background, x, y)
        return np.repeat(still, len(time), axis=0)
    return sample(scene.background, x - np.float32(scene.pan[0]) * time, y - np.float32(scene.pan[1]) * time)


def _draw(item: SceneObject, x: Array, y: Array, time: Array, pixel: float) -> tuple[Array, Array]:
    """Coverage (frames, height, width) and colours (frames, height, width, 3) of one object."""
    motion = item.motion
    centre_x, centre_y = centre(motion, time)
    size = np.float32(item.size) * (1 + np.float32(motion.growth) * time)
    stretch = 1 + np.float32(motion.wobble) * np.sin(np.float32(2 * np.pi * motion.wobbles) * time)
    angle = np.float32(motion.angle) + np.float32(motion.spin) * time
    u, v = _rotate((x - centre_x) / size, (y - centre_y) / size, angle)
    u, v = u / stretch, v * stretch
    if item.shape == "ball":
        return _ball(item, u, v, time, size / pixel)
    return _card(item, u, v, time, size / pixel)


def _card(item: SceneObject, u: Array, v: Array, time: Array, pixels: Array) -> tuple[Array, Array]:
    """A flat cut-out that may turn about an axis in its plane and then shows its back, mirrored as a real card's."""
    turn = np.float32(item.motion.turn) * time
    facing = np.cos(turn)
    narrow = np.where(np.abs(facing) < _THINNEST, np.copysign(np.float32(_THINNEST), facing), facing)
    axis = np.float32(item.motion.turn_axis)
    along, across = _rotate(u, v, axis)
    u, v = _rotate(along, across / narrow, -axis)
    alpha = np.clip(0.5 - _signed_distance(item.shape, u, v) * pixels * np.abs(narrow), 0, 1)
    if item.motion.turn == 0:
        return alpha, sample(item.front, u, v)
    color = sample(item.front, u, v)
    back = (facing < 0)[:, 0, 0]
    if back.any():
        color[back] = sample(item.back, u[back], v[back])
    return alpha, color


def _ball(item: SceneObject, u: Array, v: Array, time: Array, pixels: Array) -> tuple[Array, Array]:
    """A ball whose hemispheres carry the front and the back texture and roll into view as it turns."""
    radius2 = u * u + v * v
    alpha = np.clip(0.5 - (np.sqrt(radius2) - 1) * pixels, 0, 1)
    if item.motion.turn == 0:
        return alpha, sample(item.front, u, v)
    depth = np.sqrt(np.maximum(1 - radius2, 0))
    turn = np.float32(item.motion.turn) * time
    along, across = _rotate(u, v, np.float32(item.motion.turn_axis))
    across, depth = across * np.cos(turn) - depth * np.sin(turn), across * np.sin(turn) + depth * np.cos(turn)
    u, v = _rotate(along, across, -np.float32(item.motion.turn_axis))
    share = np.clip(1 + 6 * depth, 0, 1)[..., None]  # all of the first view's hemisphere is front
    return alpha, share * sample(item.front, u, v) + (1 - share) * sample(item.back, u, v)


def centre(motion: Motion, time: Array) -> tuple[Array, Array]:
    """x and y of an object's centre at clip times in [0, 1], in the units of `Motion`."""
    (start_x, start_y), (travel_x, travel_y) = motion.start, motion.travel
    if motion.path == "line":
        return np.float32(start_x) + np.float32(travel_x) * time, np.float32(start_y) + np.float32(travel_y) * time
    if motion.path == "sway":
        swing = np.sin(np.float32(2 * np.pi * motion.curl) * time) / 2
        return np.float32(start_x) + np.float32(travel_x) * swing, np.float32(start_y) + np.float32(travel_y) * swing
    radius = np.float32(np.hypot(travel_x, travel_y) / 2)
    phase = np.float32(np.arctan2(travel_y, travel_x))
    angle = phase + np.float32(2 * motion.curl) * time
    return start_x + radius * (np.cos(angle) - np.cos(phase)), start_y + radius * (np.sin(angle) - np.sin(phase))


def _rotate(x: Array, y: Array, angle: Array | np.float32) -> tuple[Array, Array]:
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _signed_distance(shape: Shape, u: Array, v: Array) -> Array:
    """Distance to the outline in units of the object's size, negative inside (approximate far from the outline)."""
    if shape == "disc":
        return np.hypot(u, v) - 1
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.85)
    if shape == "triangle":
        k = np.float32(np.sqrt(3) / 2)
        return np.maximum(np.maximum(v, k * u - 0.5 * v), -k * u - 0.5 * v) - np.float32(0.6)
    if shape == "hexagon":
        k = np.float32(np.sqrt(3) / 2)
        return np.maximum(np.abs(v), k * np.abs(u) + 0.5 * np.abs(v)) - np.float32(0.85)
    if shape == "cross":
        wide, narrow = np.maximum(np.abs(u), np.abs(v)), np.minimum(np.abs(u), np.abs(v))
        return np.maximum(wide - np.float32(0.95), narrow - np.float32(0.42))
    if shape == "ring":
        return np.abs(np.hypot(u, v) - np.float32(0.68)) - np.float32(0.3)
    return np.hypot(u - np.clip(u, -0.5, 0.5), v) - np.float32(0.5)  # pill
