"""Training clips: random scenes as tensors, with the grey regions and first-frame conditions that the VAE will meet."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loraedit_ext.evaluation.rendering import render
from loraedit_ext.evaluation.scenes import Scene, random_scene, slowed
from loraedit_ext.evaluation.textures import Array

FRAMES = 13
SIZE = 128  # side in pixels of the clips that the model is for
VAE_SIZE = 64  # side at which the VAE learns: patterns twice as fine, for a quarter of the work
HELD_OUT = 10_000_000  # scene seeds below this are never trained on: benchmarks and validation draw from there
_SEEDS = 2**40
_GREYED, _CONDITIONS = 0.25, 0.125  # shares of the VAE's clips
_SLOWEST, _CALM = 0.05, 0.25  # shares of its scene's motion: what a clip shows at least, and a calm one at most


def training_seed(rng: np.random.Generator) -> int:
    """A scene seed that no held-out list contains."""
    return int(rng.integers(HELD_OUT, _SEEDS))


def at_some_pace(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene slowed down: two of three to a quarter or less, as most film is; one of six to more than a half.

    A tenth in the median. Without the quick ones edits of quick clips suffer (docs/experiments.md).
    """
    return slowed(scene, _SLOWEST + (1 - _SLOWEST) * rng.random() ** 4)


def held_out_scene(seed: int) -> Scene:
    """A validation scene, calm, at a pace that its seed fixes."""
    if seed >= HELD_OUT:
        raise ValueError(f"seed = {seed}: held-out scenes lie below {HELD_OUT}")
    rng = np.random.default_rng([seed, 0x9ACE])
    return slowed(random_scene(seed), _SLOWEST + (_CALM - _SLOWEST) * rng.random() ** 2)


def scene_video(scene: Scene, frames: int = FRAMES, size: int = SIZE) -> Tensor:
    """A rendered scene as (3, frames, size, size) in [-1, 1]."""
    return to_tensor(render(scene, frames, (size, size)).video)


def held_out_videos(count: int, first: int = 0) -> Tensor:
    """Validation clips of the VAE, (count, 3, FRAMES, VAE_SIZE, VAE_SIZE), of scene seeds first, first + 1, ..."""
    return torch.stack([scene_video(random_scene(first + index), size=VAE_SIZE) for index in range(count)])


def to_tensor(video: Array) -> Tensor:
    """(frames, height, width, 3) in [0, 1] to (3, frames, height, width) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(video, -1, 0))) * 2 - 1


def first_frame_condition(video: Tensor) -> Tensor:
    """Wan's I2V condition video: frame 0, then mid-grey; (..., 3, frames, height, width) in [-1, 1]."""
    condition = torch.zeros_like(video)
    condition[..., :1, :, :] = video[..., :1, :, :]
    return condition


def vae_batch(seed: int, step: int, batch: int, frames: int, side: int) -> Tensor:
    """The VAE's training batch of a step: (batch, 3, frames, side, side), determined by seed and step alone."""
    rng = np.random.default_rng([seed, step])
    return torch.stack([_vae_clip(rng, frames, side) for _ in range(batch)])


def _vae_clip(rng: np.random.Generator, frames: int, side: int) -> Tensor:
    """A crop in time and space, of some with the target's box greyed, and of some the first-frame condition."""
    scene = random_scene(training_seed(rng))
    rendered = render(scene, FRAMES, (VAE_SIZE, VAE_SIZE))
    video, draw = to_tensor(rendered.video), rng.random()
    if draw < _GREYED:
        video = _without(video, rendered.visible[scene.target], padding=int(rng.integers(1, 6)))
    start = int(rng.integers(0, FRAMES - frames + 1))
    top, left = rng.integers(0, VAE_SIZE - side + 1, 2)
    video = video[:, start : start + frames, top : top + side, left : left + side]
    return (first_frame_condition(video) if draw > 1 - _CONDITIONS else video).contiguous()


def object_batch(seed: int, step: int, batch: int, side: int) -> Tensor:
    """Crops around objects of clips at full size and some pace, greyed like `vae_batch`: (batch, 3, FRAMES, side, side)."""
    rng = np.random.default_rng([seed, step])
    return torch.stack([_object_clip(rng, side) for _ in range(batch)])


def _object_clip(rng: np.random.Generator, side: int) -> Tensor:
    scene = at_some_pace(random_scene(training_seed(rng)), rng)
    rendered = render(scene, FRAMES, (SIZE, SIZE))
    video, draw = to_tensor(rendered.video), rng.random()
    if draw < _GREYED:
        video = _without(video, rendered.visible[scene.target], padding=int(rng.integers(1, 12)))
    seen = rendered.visible.sum(0).mean(0) + 0.02  # now and then the background alone
    y, x = divmod(int(rng.choice(seen.size, p=(seen / seen.sum()).ravel())), SIZE)
    top, left = (int(np.clip(centre - rng.integers(side // 6, side - side // 6), 0, SIZE - side)) for centre in (y, x))
    video = video[:, :, top : top + side, left : left + side]
    return (first_frame_condition(video) if draw > 1 - _CONDITIONS else video).contiguous()


def _without(video: Tensor, alpha: Array, padding: int) -> Tensor:
    """The clip with the box around an object grey in every frame but the first."""
    return video * (1 - torch.from_numpy(_boxes(alpha, padding)))


def _boxes(alpha: Array, padding: int) -> Array:
    """Per frame, 1 inside the padded bounding box of an object's (frames, height, width) coverage, else 0."""
    boxes = np.zeros_like(alpha)
    for frame, mask in zip(boxes[1:], alpha[1:] > 0, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            top, left = max(rows[0] - padding, 0), max(columns[0] - padding, 0)
            frame[top : rows[-1] + padding + 1, left : columns[-1] + padding + 1] = 1
    return boxes
