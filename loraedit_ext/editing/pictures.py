"""Videos as pictures for people: side by side, as a contact sheet, with a mask laid over. uint8 (F, H, W, 3) throughout."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

SHEET_FRAMES = 6
GAP = 8
"""Pixels between the pictures of a comparison."""
_WHITE = 255
_MASK_COLOUR = (255, 0, 80)


def overlaid(frames: np.ndarray, grey_mask: np.ndarray) -> np.ndarray:
    """The frames with a mask, uint8 (F, H, W) and white = edit, laid over them in red."""
    shown, colour = np.empty_like(frames), np.full_like(frames[0], _MASK_COLOUR)
    for index, (frame, grey) in enumerate(zip(frames, grey_mask, strict=True)):
        share = grey * np.float32(0.5 / 255)
        shown[index] = cv2.blendLinear(frame, colour, 1 - share, share)
    return shown


def side_by_side(videos: Sequence[np.ndarray]) -> np.ndarray:
    """Videos next to each other: (F, H, sum of W + gaps, 3)."""
    gap = np.full((*videos[0].shape[:2], GAP, 3), _WHITE, np.uint8)
    return np.concatenate([part for video in videos for part in (video, gap)][:-1], axis=2)


def contact_sheet(videos: Sequence[np.ndarray], count: int = SHEET_FRAMES) -> np.ndarray:
    """One row for each video, with up to `count` frames evenly spread, first and last among them: uint8 (H', W', 3)."""
    frames = len(videos[0])
    chosen = np.unique(np.linspace(0, frames - 1, min(frames, count)).round().astype(int))
    rows = [side_by_side([video[index : index + 1] for index in chosen])[0] for video in videos]
    gap = np.full((GAP, rows[0].shape[1], 3), _WHITE, np.uint8)
    return np.concatenate([part for row in rows for part in (row, gap)][:-1], axis=0)
