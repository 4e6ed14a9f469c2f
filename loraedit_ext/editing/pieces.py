"""Long clips: edited piece by piece, each from the last frame of the one before.

It is the training's own condition: clips of `clip_frames` share their end frames as well (paper section 4.5), and the first
frame of each is known whole. Axes: F frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from functools import cache
from itertools import pairwise

import numpy as np

from common.errors import UserError
from dataset.job import EditJob
from loraedit_ext import regimes
from loraedit_ext.editing.compositing import color_matched, to_bytes

Generate = Callable[[regimes.Piece, str], np.ndarray]
"""A piece and its number among all, for people, to its frames: uint8 (F, H, W, 3)."""


def plan(job: EditJob, limit: int | None, stride: int) -> tuple[range, ...]:
    """The frames of each piece of a job, cut where edited frames are as far as that takes no more pieces; see `spans`."""
    return spans(len(job.frames), limit, stride, {edited.index for edited in job.edited_frames})


def spans(frames: int, limit: int | None, stride: int, wanted: Container[int] = ()) -> tuple[range, ...]:
    """The frames of each piece; neighbours have one in common.

    As few pieces as can be, none shorter than half of an even share; of these the cuts at most `wanted` frames; of these the
    most even one.

    Args:
        frames: of the clip, n * stride + 1.
        limit: of a piece; None: no limit.
        stride: pixel frames of a latent frame; pieces are cut at its multiples.

    Raises:
        UserError: the limit is no length that the model takes.
    """
    if limit is None or limit >= frames:
        return (range(frames),)
    steps, most = (frames - 1) // stride, (limit - 1) // stride
    if most * stride + 1 != limit:
        raise UserError(f"edit.clip_frames = {limit}: the model takes {stride}n+1 frames at once, e.g. {most * stride + 1} or "
                        f"{(most + 1) * stride + 1}.")  # fmt: skip
    pieces = -(-steps // most)
    least = max(1, steps // pieces // 2)

    @cache
    def best(start: int, count: int) -> tuple[int, int, tuple[int, ...]]:
        """Wanted cuts, minus the sum of squared lengths, and the cuts, of what lies behind `start` in `count` pieces."""
        if count == 1:
            return 0, -((steps - start) ** 2), (start, steps)
        rest = count - 1
        ends = range(max(start + least, steps - most * rest), min(start + most, steps - least * rest) + 1)
        found = ((end, best(end, rest)) for end in ends)
        return max((hits + (end * stride in wanted), squares - (end - start) ** 2, (start, *cuts))
                   for end, (hits, squares, cuts) in found)  # fmt: skip

    *_, cuts = best(0, pieces)
    return tuple(range(first * stride, last * stride + 1) for first, last in pairwise(cuts))


def describe(planned: Sequence[range]) -> list[str]:
    """A line on the pieces, where there is more than one."""
    if len(planned) == 1:
        return []
    bounds = ", ".join(f"{span.start}-{span.stop - 1}" for span in planned)
    return [f"pieces    frames {bounds}, one after the other; each begins with what was made of its first frame, or with the "
            "[[edited_frame]] that is given for it"]  # fmt: skip


def edit_all(job: EditJob, planned: Sequence[range], generate: Generate, reach: int) -> np.ndarray:
    """What is generated of a clip, uint8 (F, H, W, 3); a piece in which nothing is marked keeps the source's frames.

    Args:
        reach: of `color_matched`, by which a piece takes over what the one before made of its first frame: colours that have
            drifted would drift on from piece to piece.

    Raises:
        UserError: the job has no edited first frame.
    """
    preserve = regimes.preserve_mask(job).numpy()
    marked = (~preserve).any((1, 2))
    reach *= job.keep_outside  # else the picture counts whole, and nothing of the source meets it
    made = regimes.with_first_edit(job)
    for number, span in enumerate(planned):
        if len(planned) > 1 and not marked[span.start + 1 : span.stop].any():
            continue
        start = span.start
        first = color_matched(job.frames[start], made[start], preserve[start], reach if number else 0)
        frames = generate(regimes.continuing(job, span, to_bytes(first)), f"{number + 1} of {len(planned)}")
        keeps = int(number > 0)  # the shared frame stays as the piece before made it
        made[span.start + keeps : span.stop] = frames[keeps:]
    return made
