"""What SAM 2 is told of the object in single frames, from the regions and clicks of a call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from common.errors import ErrorCollector, UserError
from dataset.resize import Box, box_around
from loraedit_ext.prepare.regions import Region
from loraedit_ext.prepare.request import Point, Request


@dataclass(frozen=True, eq=False)
class Prompt:
    """Where the object is in a frame, in the frame's pixels: a shape alone; or a box, clicks, or both.

    Attributes:
        shape: bool (H, W).
        box: around the object.
        clicks: on it.
        background: not on it.
    """

    shape: np.ndarray | None = None
    box: Box | None = None
    clicks: tuple[Point, ...] = ()
    background: tuple[Point, ...] = ()


def prompts_of(request: Request, regions: Mapping[int, Region]) -> dict[int, Prompt]:
    """Frame of the clip -> prompt.

    A painted shape is the object itself, a drawn box or that of a found edit is around it. Clicks narrow down a drawn box, but
    take the place of a found edit's: that one shows where the edit is, and the object that the edit belongs to, say the head
    under a new hat, may reach beyond it.

    Args:
        regions: by frame, drawn or of the edit.

    Raises:
        UserError: clicks that say nothing, or in a frame with a painted shape.
    """
    errors, found = ErrorCollector(), {}
    for frame in sorted({*regions, *request.clicks, *request.background}):
        with errors.catch():
            found[frame] = _prompt(request, regions, frame)
    errors.raise_if_any()
    return found


def _prompt(request: Request, regions: Mapping[int, Region], frame: int) -> Prompt:
    clicks, background = request.clicks.get(frame, ()), request.background.get(frame, ())
    if frame in request.painted:
        if clicks or background:
            raise UserError(f"frame {frame}: has a painted region and clicks; SAM 2 takes one or the other. Keep one.")
        return Prompt(shape=regions[frame].shape)
    if frame in request.boxes or (frame in regions and not clicks):
        return Prompt(None, box_around(regions[frame].shape), clicks, background)
    if not clicks:
        raise UserError(f"--not of frame {frame}: says only what is not the object, and each frame is understood by itself. "
                        f"Add --click {frame}:X,Y with a pixel on the object.")  # fmt: skip
    return Prompt(None, None, clicks, background)
