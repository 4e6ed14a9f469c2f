"""Makes an edit job of a video: the frame to edit, then the mask that follows the edit, and job.toml.

Two calls, as a person works: without an edited picture only the frame to edit is written; with one, all else.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from common.errors import ErrorCollector, UserError
from common.files import write_text_atomic
from dataset.images import read_image, write_png
from dataset.job import check_mask, grey_levels
from dataset.resize import Grid
from dataset.schema import JobSettings
from dataset.video import Video, read_media
from dataset.video_writer import write_images, write_mp4
from loraedit_ext import masks
from loraedit_ext.pictures import contact_sheet, overlaid
from loraedit_ext.prepare.difference import changed
from loraedit_ext.prepare.regions import Box, Region, box_around, from_box, from_picture, widened
from loraedit_ext.prepare.tracking import Track, track

FRAME, MASK, JOB, PREVIEW, SHEET = "frame.png", "mask", "job.toml", "preview.mp4", "preview.png"
MARGIN = 0.1
MOST_CHANGED = 0.6
"""Share of the picture above which a difference says nothing about a region."""
_LOST = 0.01
"""Share of an edit outside the mask from which on it is worth a word."""
_FRAMES = JobSettings.model_fields["max_frames"].default


@dataclass(frozen=True)
class Request:
    """What a person asks for.

    Attributes:
        source: the video to edit, or a folder of images.
        out: the job's folder.
        edited: the edited frame 0 of the clip; None: it is still to be made.
        boxes: frame of the clip -> region drawn as a box.
        painted: frame of the clip -> region painted as a picture, white = edit.
        margin: share of the region's size by which the mask is wider on every side.
        start: source frame that is the clip's frame 0.
        frames: length of the clip; None: what a job takes by default.
        caption, edited_caption: for job.toml.
    """

    source: Path
    out: Path
    edited: Path | None = None
    boxes: Mapping[int, Box] = field(default_factory=dict)
    painted: Mapping[int, Path] = field(default_factory=dict)
    margin: float = MARGIN
    start: int = 0
    frames: int | None = None
    caption: str | None = None
    edited_caption: str | None = None


def prepare(request: Request) -> list[str]:
    """Write what can be written; returns what a person should know, a line each.

    Raises:
        UserError: media that cannot be read or do not fit together, or a region that cannot be found.
    """
    clip = read_clip(request)
    lines = [f"clip      {request.source.name}: frames {clip.first} to {clip.first + len(clip.frames) - 1} of "
             f"{clip.total}, {clip.size[0]}x{clip.size[1]}"]  # fmt: skip
    edited = None if request.edited is None else _edited_picture(request.edited, clip)
    keys = _keys(request, clip)
    if not keys and edited is not None:
        keys = {0: _region_of_edit(request, clip, edited)}
    if not keys:
        write_png(request.out / FRAME, clip.frames[0])
        return [*lines, f"wrote     {request.out / FRAME}",
                "next      edit this picture with any image editor, keep its size, and run the same command with --edited "
                "PICTURE; or give the region with --box or --painted"]  # fmt: skip
    tracked = track(clip.frames, keys)
    grey = _masks(tracked, request.margin)
    lines += _told(keys, tracked, grey)
    if edited is not None:
        lines += _lost(clip.frames[0], edited, grey[0])
    return lines + _write(request, clip, edited, grey)


def read_clip(request: Request) -> Video:
    """The frames that the job will use: 4n+1 of them, as both families ask.

    Raises:
        UserError: the source cannot be read or has too few frames.
    """
    grid = Grid()
    if request.frames is not None and not grid.takes_frames(request.frames):
        near = " or ".join(map(str, grid.nearest_frames(request.frames)))
        raise UserError(f"--frames {request.frames}: must be {grid.frame_step}n+1 with n >= 1; nearest: {near}.")
    read = read_media(request.source, request.start, request.frames or _FRAMES)
    used = request.frames or grid.frames_below(max(1, len(read.frames)))
    if len(read.frames) < used or not grid.takes_frames(used):
        raise UserError(f"{request.source}: has {read.total} frames, {len(read.frames)} from frame {request.start} on; "
                        f"expected at least {request.frames or grid.frame_step + 1}.")  # fmt: skip
    return replace(read, frames=read.frames[:used], times=read.times[:used])


def _edited_picture(path: Path, clip: Video) -> np.ndarray:
    picture = read_image(path)
    if picture.shape != clip.frames[0].shape:
        height, width = picture.shape[:2]
        raise UserError(f"{path}: is {width}x{height}, expected {clip.size[0]}x{clip.size[1]} as {clip.path.name}. "
                        "Export it at that size.")  # fmt: skip
    return picture


def _keys(request: Request, clip: Video) -> dict[int, Region]:
    """The regions that the person gave, by frame; all mistakes are told at once."""
    errors, found = ErrorCollector(), {}
    for frame in sorted({*request.boxes, *request.painted}):
        with errors.catch():
            if not frame < len(clip.frames):
                raise UserError(f"region of frame {frame}: the clip has frames 0 to {len(clip.frames) - 1}, counted from "
                                "--start.")  # fmt: skip
            if frame in request.boxes and frame in request.painted:
                raise UserError(f"region of frame {frame}: given as a box and as a picture. Keep one.")
            found[frame] = _drawn(request, clip, frame)
    errors.raise_if_any()
    return found


def _drawn(request: Request, clip: Video, frame: int) -> Region:
    size = clip.frames.shape[1:3]
    if frame in request.boxes:
        region, what = from_box(request.boxes[frame], size), f"box of frame {frame}"
    else:
        path = request.painted[frame]
        picture = read_image(path)
        check_mask(path, picture.shape[1::-1], None, clip)
        region, what = from_picture(grey_levels(path, picture[None])[0] >= masks.THRESHOLD), str(path)
    if not region.shape.any():
        raise UserError(f"{what}: marks nothing inside the picture of {clip.size[0]}x{clip.size[1]} pixels.")
    return region


def _region_of_edit(request: Request, clip: Video, edited: np.ndarray) -> Region:
    """A box around all that the edited picture changes."""
    touched = changed(clip.frames[0], edited)
    share = float(touched.mean())
    if not share:
        raise UserError(f"{request.edited}: does not differ from frame {clip.first} of {clip.path.name}. Is it another "
                        "frame's edit (--start), or not edited yet? Else give the region with --box.")  # fmt: skip
    if share > MOST_CHANGED:
        raise UserError(f"{request.edited}: differs from frame {clip.first} of {clip.path.name} in {share:.0%} of the "
                        "picture, so it does not tell where the edit is. Give the region with --box or --painted.")  # fmt: skip
    return from_box(box_around(touched), touched.shape)


def _masks(tracked: Track, margin: float) -> np.ndarray:
    """uint8 (F, H, W), white = edit."""
    return np.stack([widened(shape, margin) if shape.any() else shape for shape in tracked.shapes]).astype(np.uint8) * 255


def _told(keys: Mapping[int, Region], tracked: Track, grey: np.ndarray) -> list[str]:
    lines = []
    for frame, region in sorted(keys.items()):
        left, top, width, height = box_around(region.shape)
        lines.append(f"region    frame {frame}: {width}x{height} at ({left}, {top})")
    cover = grey.mean((1, 2)) / 2.55
    lines.append(f"mask      {cover.mean():.1f} % of the picture on average, {cover.min():.1f} to {cover.max():.1f} %")
    if gone := [int(index) for index in np.flatnonzero(~grey.any((1, 2)))]:
        lines.append(f"note      nothing is marked in frames {_spans(gone)}: the region has left the picture")
    if doubtful := tracked.doubtful():
        lines.append(f"note      the motion is unclear in frames {_spans(doubtful)}: look at {SHEET} and {PREVIEW}; mend it "
                     "with --box FRAME:LEFT,TOP,WIDTH,HEIGHT for a frame where the mask is wrong")  # fmt: skip
    return lines


def _lost(before: np.ndarray, edited: np.ndarray, grey: np.ndarray) -> list[str]:
    """A word on edited pixels that the mask of frame 0 leaves out: they would be put back."""
    touched = changed(before, edited)
    outside = touched & (grey < masks.THRESHOLD)
    if outside.sum() <= _LOST * touched.sum():
        return []
    left, top, width, height = box_around(outside)
    share, place = outside.sum() / touched.sum(), f"({left}, {top}) to ({left + width}, {top + height})"
    return [f"note      {share:.0%} of what the edited picture changes is outside the mask, from {place}, and will be lost. "
            "Widen the region or --margin."]  # fmt: skip


def _spans(numbers: list[int]) -> str:
    """`3-5, 9` of 3, 4, 5, 9."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _write(request: Request, clip: Video, edited: np.ndarray | None, grey: np.ndarray) -> list[str]:
    """Masks for every frame of the source, the previews, and job.toml unless there is one; one line a file."""
    out = request.out
    write_png(out / FRAME, clip.frames[0])
    black = np.zeros_like(grey[0])
    behind = clip.total - clip.first - len(grey)
    write_images(out / MASK, [*[black] * clip.first, *grey, *[black] * behind])
    shown = clip.frames.copy()
    if edited is not None:
        shown[0] = edited
    shown = overlaid(shown, grey)
    write_mp4(out / PREVIEW, shown, clip.fps)
    write_png(out / SHEET, contact_sheet([shown]))
    written = [f"wrote     {out / name}" for name in (FRAME, MASK, PREVIEW, SHEET)]
    if (out / JOB).exists():
        return [*written, f"kept      {out / JOB}, which is there already; remove it to have a new one written"]
    write_text_atomic(out / JOB, job_toml(request, len(grey)))
    last = "" if edited is not None else f"; edit {FRAME} and add it as [[edited_frame]], or run again with --edited"
    return [*written, f"wrote     {out / JOB}{last}"]


def job_toml(request: Request, frames: int) -> str:
    """The job as TOML; paths are relative to its folder."""
    lines = [f"source = {_path(request.source, request.out)}", f'mask = "{MASK}"', f"start = {request.start}",
             f"frames = {frames}   # the mask is black beyond them"]  # fmt: skip
    captions = (("caption", request.caption), ("edited_caption", request.edited_caption))
    lines += [f"{key} = {json.dumps(words, ensure_ascii=False)}" for key, words in captions if words]
    if request.edited:
        lines += ["", "[[edited_frame]]", f"image = {_path(request.edited, request.out)}", "frame = 0"]
    return "\n".join(lines) + "\n"


def _path(path: Path, folder: Path) -> str:
    return json.dumps(os.path.relpath(path.resolve(), folder.resolve()), ensure_ascii=False)
