"""What a call brings, read and checked: the clip, edited pictures of its frames, and the regions to edit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.errors import ErrorCollector, UserError
from dataset.images import read_image, read_mask
from dataset.job import check_mask, grey_levels
from dataset.resize import Grid, alike, box_around, scaled
from dataset.schema import JobSettings
from dataset.video import Video, read_media
from loraedit_ext import masks
from loraedit_ext.difference import changed
from loraedit_ext.prepare import alignment
from loraedit_ext.prepare.regions import Region, from_box, from_picture
from loraedit_ext.prepare.request import Point, Request

MOST_CHANGED = 0.6
"""Share of the picture above which a difference says nothing about a region."""
_FRAMES = JobSettings.model_fields["max_frames"].default


def read_clip(request: Request) -> Video:
    """The frames that the job will use: 4n+1 of them, as both families ask.

    Raises:
        UserError: the source cannot be read or has too few frames.
    """
    grid = Grid()
    if request.frames is not None and not grid.takes_frames(request.frames):
        near = " or ".join(map(str, grid.nearest_frames(request.frames)))
        raise UserError(f"--frames {request.frames}: must be {grid.frame_step}n+1 with n >= 1; nearest: {near}.")
    read = read_media(request.source, request.start, request.frames or _FRAMES, every=request.every)
    used = request.frames or grid.frames_below(max(1, len(read.frames)))
    if len(read.frames) < used or not grid.takes_frames(used):
        steps = f" in steps of {request.every}" if request.every > 1 else ""
        raise UserError(f"{request.source}: has {read.total} frames, {len(read.frames)} from frame {request.start} on{steps}; "
                        f"expected at least {request.frames or grid.frame_step + 1}.")  # fmt: skip
    return replace(read, frames=read.frames[:used], times=read.times[:used])


@dataclass(frozen=True, eq=False)
class Given:
    """By frame of the clip, what a call brings.

    Attributes:
        edited: pictures, uint8 (H, W, 3), at the source's size and in line with its frames.
        regions: to edit. Those that the person drew hold; without any, each edited picture shows its own.
        aligned: frames whose picture was brought into line.
        told: what was done to pictures, a clause each.
    """

    edited: dict[int, np.ndarray]
    regions: dict[int, Region]
    aligned: frozenset[int]
    told: list[str]


def read_given(request: Request, clip: Video) -> Given:
    """Read and check what a call brings.

    Raises:
        UserError: all that does not fit the clip, together; or a picture does not tell where its edit is.
    """
    errors, edited, drawn, told, aligned = ErrorCollector(), {}, {}, [], set()
    for frame in request.pictures:
        with errors.catch():
            check_frame(f"--frame {frame}", frame, clip)
    for flag, pixels in (("--click", request.clicks), ("--not", request.background)):
        for frame in sorted(pixels):
            for x, y in pixels[frame]:
                with errors.catch():
                    _check_pixel(f"{flag} {frame}:{x},{y}", frame, (x, y), clip)
    for frame, path in sorted(request.edited.items()):
        with errors.catch():
            check_frame(f"edited picture of frame {frame}", frame, clip)
            picture = read_image(path)
            edited[frame] = at_source_size(path, picture, clip)
            if edited[frame] is not picture:
                told.append(f"{path.name}: scaled from {picture.shape[1]}x{picture.shape[0]} to {clip.size[0]}x{clip.size[1]}")
            if (off := alignment.slip(clip.frames[frame], edited[frame])) is not None:
                edited[frame] = alignment.moved(clip.frames[frame], edited[frame], off.matrix)
                aligned.add(frame)
                told.append(f"{path.name}: what it shows lies up to {off.pixels:.1f} pixels off its frame; brought into line")
    for frame in sorted({*request.boxes, *request.painted}):
        with errors.catch():
            check_frame(f"region of frame {frame}", frame, clip)
            drawn[frame] = _drawn(request, clip, frame)
    errors.raise_if_any()
    regions = drawn or {frame: _region_of_edit(request, clip, frame, picture) for frame, picture in edited.items()}
    return Given(edited, regions, frozenset(aligned), told)


def check_frame(what: str, frame: int, clip: Video) -> None:
    """Refuse a frame that the clip does not have, as a `UserError` about `what`."""
    if not 0 <= frame < len(clip.frames):
        raise UserError(f"{what}: the clip has frames 0 to {len(clip.frames) - 1}, counted from --start.")


def _check_pixel(what: str, frame: int, pixel: Point, clip: Video) -> None:
    check_frame(what, frame, clip)
    width, height = clip.size
    if not (0 <= pixel[0] < width and 0 <= pixel[1] < height):
        raise UserError(f"{what}: is outside the picture of {width}x{height} pixels; expected X from 0 to {width - 1} and Y "
                        f"from 0 to {height - 1}, counted from the left and the top.")  # fmt: skip


def at_source_size(path: Path, picture: np.ndarray, clip: Video) -> np.ndarray:
    """An edited picture at the source's size: image models give it back at one of their own.

    Raises:
        UserError: it has another aspect.
    """
    size = (picture.shape[1], picture.shape[0])
    if not alike(size, clip.size):
        raise UserError(f"{path}: is {size[0]}x{size[1]}, expected {clip.size[0]}x{clip.size[1]} as {clip.path.name}, or the "
                        "same aspect. Crop what was added, or export it at that size.")  # fmt: skip
    return scaled(picture, clip.size)


def _drawn(request: Request, clip: Video, frame: int) -> Region:
    """The box or the painted picture of a frame."""
    size = clip.frames.shape[1:3]
    if frame in request.boxes and frame in request.painted:
        raise UserError(f"region of frame {frame}: given as a box and as a picture. Keep one.")
    if frame in request.boxes:
        region = from_box(request.boxes[frame], size)
        if not region.shape.any():
            raise UserError(f"box of frame {frame}: marks nothing inside the picture of {clip.size[0]}x{clip.size[1]} pixels.")
        return region
    grey = read_grey(request.painted[frame], clip)
    if grey.max() < masks.THRESHOLD:
        raise UserError(f"{request.painted[frame]}: marks nothing (brightest value {grey.max()}). Paint the region to edit "
                        f"white (>= {masks.THRESHOLD}).")  # fmt: skip
    return from_picture(grey >= masks.THRESHOLD)


def read_grey(path: Path, clip: Video) -> np.ndarray:
    """A mask picture of the clip's size as uint8 (H, W).

    Raises:
        UserError: it cannot be read, is coloured, or has another size.
    """
    picture = read_mask(path)
    check_mask(path, picture.shape[1::-1], None, clip)
    return grey_levels(path, picture[None])[0]


def _region_of_edit(request: Request, clip: Video, frame: int, edited: np.ndarray) -> Region:
    """A box around all that an edited picture changes."""
    touched = changed(clip.frames[frame], edited)
    share, path = float(touched.mean()), request.edited[frame]
    whose = f"frame {request.in_source(frame)} of {clip.path.name}"
    if not share:
        raise UserError(f"{path}: does not differ from {whose}. Is it another frame's edit (--start, --edited FRAME:PICTURE), "
                        "or not edited yet? Else give the region with --box.")  # fmt: skip
    if share > MOST_CHANGED:
        raise UserError(f"{path}: differs from {whose} in {share:.0%} of the picture, so it does not tell where the edit is. "
                        "Give the region with --box or --painted.")  # fmt: skip
    return from_box(box_around(touched), touched.shape)
