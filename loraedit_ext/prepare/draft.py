"""A job in the making: what the page has been told so far, and what it shows."""

from __future__ import annotations

import re
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, Self

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import UserError, first_line
from common.files import make_folder, write_atomic
from common.settings import read_toml
from dataset.images import as_png, read_image, write_png
from dataset.resize import Box
from loraedit_ext.prepare.folder import JobFolder
from loraedit_ext.prepare.given import at_source_size, check_frame, read_clip, read_given, read_grey
from loraedit_ext.prepare.job import mask_name, prepare
from loraedit_ext.prepare.prompts import prompts_of
from loraedit_ext.prepare.request import Point, Request
from loraedit_ext.prepare.tomls import JOB, MASK

if TYPE_CHECKING:
    from loraedit_ext.prepare.sam import Sam2

Kind = Literal["edited", "painted"]
"""Pictures that a request names by frame."""
_CAPTIONS = ("caption", "edited_caption")
_MARKS = ("boxes", "clicks", "background")
_JPEG = (cv2.IMWRITE_JPEG_QUALITY, 92)


class Sent(BaseModel):
    """What the page sends as JSON."""

    model_config = ConfigDict(extra="forbid")

    @classmethod
    def read(cls, text: bytes) -> Self:
        """
        Raises:
            UserError: the text is something else.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise UserError(f"the page sent what cannot be read ({first_line(error)}). Reload it.") from error


class Cut(Sent):
    """A part of the source, as in `Request`."""

    start: int
    every: int
    frames: int | None


class Drawn(Sent):
    """What is drawn and typed on the page; by frame of the clip, in the source's pixels."""

    boxes: dict[int, Box]
    clicks: dict[int, tuple[Point, ...]]
    background: dict[int, tuple[Point, ...]]
    margin: float
    caption: str
    edited_caption: str


class Draft:
    """One job, changed bit by bit. Safe to use from several threads.

    What is drawn lives on the page until `prepare` is called; pictures and masks lie in the job's folder at once, as a person's
    own files do.
    """

    def __init__(self, request: Request) -> None:
        """
        Raises:
            UserError: the call does not make sense, or its source cannot be read.
        """
        request.check()
        self.request = request
        self._clip = read_clip(request)
        self._changing = Lock()
        self._sam: Sam2 | None = None

    def facts(self) -> dict[str, Any]:
        """All that the page needs to begin with, and what of it has changed since."""
        request, clip = self.request, self._clip
        return {
            "source": clip.path.name,
            "out": str(request.out),
            "total": clip.total,
            "every": request.every,
            "length": request.frames,
            "frames": [request.in_source(frame) for frame in range(len(clip.frames))],
            "fps": float(clip.fps),
            "size": clip.size,
            "sam": request.sam is not None,
            "boxes": request.boxes,
            "clicks": request.clicks,
            "background": request.background,
            "margin": request.margin,
            "caption": request.caption or "",
            "edited_caption": request.edited_caption or "",
            "captioner": request.captioner is not None,
            "edited": {frame: path.name for frame, path in request.edited.items()},
            "painted": sorted(request.painted),
            "masks": all(self._mask(frame).is_file() for frame in range(len(clip.frames))),
            "by_hand": self._by_hand(),
        }

    def frame(self, frame: int) -> bytes:
        """A frame to look at, as JPEG."""
        return _jpeg(self._frame(frame))

    def picture(self, frame: int) -> bytes:
        """A frame to edit, as PNG."""
        return as_png(self._frame(frame))

    def edited(self, frame: int) -> bytes:
        """The edited picture of a frame, as JPEG of the source's size."""
        path = self._given("edited", frame)
        return _jpeg(at_source_size(path, read_image(path), self._clip))

    def painted(self, frame: int) -> bytes:
        """The painted region of a frame, as a layer."""
        return _layer(read_grey(self._given("painted", frame), self._clip))

    def mask(self, frame: int) -> bytes:
        """The mask of a frame, as a layer."""
        self._frame(frame)
        return _layer(read_grey(self._mask(frame), self._clip))

    def outline(self, frame: int, drawn: Drawn) -> bytes:
        """What SAM 2 takes for the object in a frame by the box and the clicks there, as a layer.

        Raises:
            UserError: there is no SAM 2, nothing is drawn there, or no object is found.
        """
        self._frame(frame)
        marks = {name: {at: mark for at, mark in getattr(drawn, name).items() if at == frame and mark} for name in _MARKS}
        asked = replace(self.request, edited={}, painted={}, **marks)
        asked.check()
        with self._changing:
            prompts = prompts_of(asked, read_given(asked, self._clip).regions)
            sam = self._loaded_sam()
            if sam is None or frame not in prompts:
                raise UserError(f"frame {frame}: needs --sam, and a box or a click on the object, to show its outline.")
            return _layer(sam.outline(self._clip.frames, frame, prompts[frame]).astype(np.uint8) * 255)

    def take(self, cut: Cut) -> None:
        """Take another part of the source. What was drawn in and brought for the one before is forgotten; files stay.

        Raises:
            UserError: the source has no such part; then all stays as it is.
        """
        fresh = replace(self.request, **dict(cut), edited={}, painted={}, boxes={}, clicks={}, background={}, pictures=())
        fresh.check()
        with self._changing:
            self._clip, self.request = read_clip(fresh), fresh

    def put_edited(self, frame: int, name: str, data: bytes) -> None:
        """Take an edited picture, under its own name behind the frame's.

        Raises:
            UserError: it is no picture, or not one of this clip.
        """
        self._frame(frame)
        stem, suffix = re.sub(r"[^\w-]+", "_", Path(name).stem), Path(name).suffix.lower()
        path = self.request.out / f"edited_{frame:05d}_{stem}{suffix}"
        with self._changing, tempfile.TemporaryDirectory() as folder:
            arrived = Path(folder) / path.name
            arrived.write_bytes(data)
            at_source_size(arrived, read_image(arrived), self._clip)
            make_folder(self.request.out, cure="Choose another --out.")
            write_atomic(path, lambda partial: partial.write_bytes(data) and None)
            self.request = replace(self.request, edited={**self.request.edited, frame: path})

    def put_painted(self, frame: int, data: bytes) -> None:
        """Take a painted region, a layer; one without paint is none.

        Raises:
            UserError: it is no picture of the clip's size.
        """
        self._frame(frame)
        grey = self._read_layer(data)
        if not grey.any():
            self.drop("painted", frame)
            return
        with self._changing:
            path = self.request.out / f"painted_{frame:05d}.png"
            make_folder(self.request.out, cure="Choose another --out.")
            write_png(path, grey)
            self.request = replace(self.request, painted={**self.request.painted, frame: path})

    def drop(self, kind: Kind, frame: int) -> None:
        """Forget a picture; its file stays."""
        with self._changing:
            left = {other: path for other, path in getattr(self.request, kind).items() if other != frame}
            self.request = replace(self.request, **{kind: left})

    def put_mask(self, frame: int, data: bytes) -> None:
        """Replace the mask of one frame, which then counts as made by hand.

        Raises:
            UserError: it is no picture of the clip's size.
        """
        self._frame(frame)
        grey = self._read_layer(data)
        with self._changing:
            make_folder(self._mask(frame).parent, cure="Choose another --out.")
            write_png(self._mask(frame), grey)

    def drop_mask(self, frame: int) -> None:
        """Remove a mask, so that the next preparing makes it."""
        self._frame(frame)
        with self._changing:
            self._mask(frame).unlink(missing_ok=True)

    def prepare(self, drawn: Drawn) -> list[str]:
        """Write the job; returns what a person should know, and the call that does the same.

        Raises:
            UserError: as `loraedit_ext.prepare.job.prepare`.
        """
        with self._changing:
            typed = drawn.model_dump()
            for caption in _CAPTIONS:
                typed[caption] = typed[caption].strip() or None
            for marks in _MARKS:
                typed[marks] = {frame: mark for frame, mark in typed[marks].items() if mark}
            self.request = replace(self.request, **typed)
            lines = prepare(self.request, self._loaded_sam())
            if self.request.captioner is not None:
                self._keep_captions()
            return [*lines, f"as typed  prepare.py {shlex.join(self.request.arguments())}"]

    def _keep_captions(self) -> None:
        """What the captioner wrote is shown and not asked for again."""
        job = self.request.out / JOB
        written = read_toml(job) if job.is_file() else {}
        found = {name: written[name] for name in _CAPTIONS if not getattr(self.request, name) and name in written}
        self.request = replace(self.request, **found)

    def _loaded_sam(self) -> Sam2 | None:
        """Loaded once: a large one takes seconds."""
        if self._sam is None and self.request.sam is not None:
            from loraedit_ext.prepare.sam import Sam2  # transformers takes seconds

            self._sam = Sam2(self.request.sam)
        return self._sam

    def _frame(self, frame: int) -> np.ndarray:
        check_frame(f"frame {frame}", frame, self._clip)
        return self._clip.frames[frame]

    def _given(self, kind: Kind, frame: int) -> Path:
        paths = getattr(self.request, kind)
        if frame not in paths:
            raise UserError(f"frame {frame}: has no {kind} picture.")
        return paths[frame]

    def _mask(self, frame: int) -> Path:
        return self.request.out / mask_name(self.request.in_source(frame))

    def _by_hand(self) -> list[int]:
        """Frames whose mask a person made or changed."""
        folder, request = JobFolder(self.request.out), self.request
        return [frame for frame in range(len(self._clip.frames)) if folder.keeps(mask_name(request.in_source(frame)))]

    def _read_layer(self, data: bytes) -> np.ndarray:
        """uint8 (H, W), white where the layer is opaque."""
        with tempfile.TemporaryDirectory() as folder:
            arrived = Path(folder) / f"{MASK}.png"
            arrived.write_bytes(data)
            return read_grey(arrived, self._clip)


def _jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), _JPEG)[1].tobytes()


def _layer(grey: np.ndarray) -> bytes:
    """A shape as white paint on a transparent layer, which a canvas can lay over a frame."""
    white = np.full_like(grey, 255)
    return cv2.imencode(".png", cv2.merge([white, white, white, grey]))[1].tobytes()
