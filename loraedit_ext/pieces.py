"""Long clips: edited piece by piece, each from the last frame of the one before.

It is the training's own condition: clips of `clip_frames` share their end frames as well (paper section 4.5), and the first
frame of each is known whole. Axes: F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from common.errors import UserError
from dataset.job import EditJob
from loraedit_ext import regimes

Generate = Callable[[regimes.Piece, str], np.ndarray]
"""A piece and its number among all, for people, to its frames: uint8 (F, H, W, 3)."""


def spans(frames: int, limit: int | None, stride: int) -> tuple[range, ...]:
    """The frames of each piece: as few pieces as can be, about equally long, neighbours with one frame in common.

    Args:
        frames: of the clip, n * stride + 1.
        limit: of a piece; None: no limit.
        stride: pixel frames of a latent frame.

    Raises:
        UserError: the limit is no length that the model takes.
    """
    if limit is None or limit >= frames:
        return (range(frames),)
    steps, most = (frames - 1) // stride, (limit - 1) // stride
    if most * stride + 1 != limit:
        raise UserError(f"edit.clip_frames = {limit}: the model takes {stride}n+1 frames at once, e.g. {most * stride + 1} or "
                        f"{(most + 1) * stride + 1}.")  # fmt: skip
    count = -(-steps // most)
    bounds = [number * steps // count * stride for number in range(count + 1)]
    return tuple(range(first, last + 1) for first, last in pairwise(bounds))


def describe(planned: Sequence[range]) -> list[str]:
    """A line on the pieces, where there is more than one."""
    if len(planned) == 1:
        return []
    bounds = ", ".join(f"{span.start}-{span.stop - 1}" for span in planned)
    return [f"pieces    frames {bounds}, one after the other; each begins with what was made of its first frame, or with the "
            "[[edited_frame]] that is given for it"]  # fmt: skip


def edit_all(job: EditJob, planned: Sequence[range], generate: Generate) -> np.ndarray:
    """What is generated of a clip, uint8 (F, H, W, 3); a piece in which nothing is marked keeps the source's frames.

    Raises:
        UserError: the job has no edited first frame.
    """
    marked = (~regimes.preserve_mask(job)).flatten(1).any(1)
    first = regimes.with_first_edit(job)[0]
    made = np.array(job.frames)
    for number, span in enumerate(planned):
        if len(planned) > 1 and not marked[span.start + 1 : span.stop].any():
            continue
        piece = regimes.continuing(job, span, made[span.start]) if number else regimes.Piece(span, first)
        frames = generate(piece, f"{number + 1} of {len(planned)}")
        keeps = int(number > 0)  # the shared frame stays as the piece before made it
        made[span.start + keeps : span.stop] = frames[keeps:]
    return made
