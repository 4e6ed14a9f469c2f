"""An edit of a procedural scene as a user would bring it: media, job.toml, and beside them the exact ground truth."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from dataset.images import write_png
from dataset.video_writer import write_images
from loraedit_ext.evaluation.captions import caption
from loraedit_ext.evaluation.rendering import Rendered, render
from loraedit_ext.evaluation.scenes import Scene

MARGIN = 4
"""Pixels that the mask reaches beyond the object, before and after the edit."""
TRUTH = "truth"


def write_task(
    folder: Path, name: str, source: Scene, edited: Scene, frames: int = 13, size: tuple[int, int] = (64, 64),
    references: Sequence[int] = (), fps: int = 8,
) -> None:
    """Write `source/`, `mask/`, `truth/`, the edited frames and job.toml.

    Args:
        folder: made if need be.
        source, edited: the same scene before and after the edit.
        size: (height, width) in pixels.
        references: later frames that the user edits too, besides frame 0.
    """
    before, after = render(source, frames, size), render(edited, frames, size)
    write_images(folder / "source", to_uint8(before.video))
    write_images(folder / TRUTH, to_uint8(after.video))
    write_images(folder / "mask", edit_boxes(before, after, source.target))
    for index in (0, *references):
        write_png(folder / f"edited_{index:05d}.png", to_uint8(after.video[index]))
    (folder / "job.toml").write_text(_job(name, source, edited, (0, *references), fps), encoding="utf-8")


def to_uint8(video: np.ndarray) -> np.ndarray:
    """float in [0, 1] -> uint8."""
    return np.rint(video * 255).astype(np.uint8)


def edit_boxes(before: Rendered, after: Rendered, target: int) -> np.ndarray:
    """The mask a person would draw: a box around the object in each frame, uint8 (F, H, W), white = edit.

    Wide enough for the object before and after the edit.
    """
    touched = (np.maximum(before.alpha[target], after.alpha[target]) > 0.02).astype(np.uint8)
    mask = np.zeros(touched.shape, np.uint8)
    height, width = touched.shape[1:]
    for frame, region in zip(mask, touched, strict=True):
        if region.any():
            x, y, w, h = cv2.boundingRect(region)
            top, left = max(0, y - MARGIN), max(0, x - MARGIN)
            frame[top : min(height, y + h + MARGIN), left : min(width, x + w + MARGIN)] = 255
    return mask


def _job(name: str, source: Scene, edited: Scene, indices: Sequence[int], fps: int) -> str:
    lines = [
        f"name = {json.dumps(name)}", 'source = "source"', f"fps = {fps}", 'mask = "mask"',
        f"caption = {json.dumps(caption(source, motion=False))}",
        f"edited_caption = {json.dumps(caption(edited, motion=False))}",
    ]
    for index in indices:
        lines += ["", "[[edited_frame]]", f'image = "edited_{index:05d}.png"', f"frame = {index}"]
    return "\n".join(lines) + "\n"
