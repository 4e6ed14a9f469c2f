"""What a person asks of prepare.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from common.errors import ErrorCollector, UserError
from dataset.resize import Box
from loraedit_ext.family import Family

MARGIN = 0.1
_PLAIN = ("sam", "margin", "start", "every", "frames", "caption", "edited_caption", "captioner", "model", "ckpt")
"""Fields that a flag of their name gives once."""
Point = tuple[int, int]
"""x and y of a pixel, from the left and from the top."""
T = TypeVar("T")


@dataclass(frozen=True)
class Request:
    """One call. Frames of the clip are counted from `start`, in steps of `every`.

    Attributes:
        source: the video to edit, or a folder of images.
        out: the job's folder.
        edited: frame of the clip -> its edited picture; without any they are still to be made.
        pictures: frames of the clip to write as pictures, besides frame 0.
        boxes: frame of the clip -> region drawn as a box.
        painted: frame of the clip -> region painted as a picture, white = edit.
        sam: folder of a SAM 2 checkpoint that follows the regions; None: optical flow does.
        clicks: frame of the clip -> pixels on the object, for SAM 2.
        background: frame of the clip -> pixels that are not on it, for SAM 2.
        margin: share of the region's size by which the mask is wider on every side.
        start: source frame that is the clip's frame 0.
        every: the clip takes every so manyth source frame.
        frames: length of the clip; None: what a job takes by default.
        caption, edited_caption: for job.toml.
        captioner: folder of a vision-language model that writes those that are not given; None: they stay out.
        model: family of the model, for edit.toml; None: Wan, or what edit.toml says already.
        ckpt: folder of its weights, for edit.toml.
        overwrite: pictures that were changed by hand may be replaced.
    """

    source: Path
    out: Path
    edited: Mapping[int, Path] = field(default_factory=dict)
    pictures: tuple[int, ...] = ()
    boxes: Mapping[int, Box] = field(default_factory=dict)
    painted: Mapping[int, Path] = field(default_factory=dict)
    sam: Path | None = None
    clicks: Mapping[int, tuple[Point, ...]] = field(default_factory=dict)
    background: Mapping[int, tuple[Point, ...]] = field(default_factory=dict)
    margin: float = MARGIN
    start: int = 0
    every: int = 1
    frames: int | None = None
    caption: str | None = None
    edited_caption: str | None = None
    captioner: Path | None = None
    model: Family | None = None
    ckpt: Path | None = None
    overwrite: bool = False

    def in_source(self, frame: int) -> int:
        """The source's frame that is `frame` of the clip."""
        return self.start + frame * self.every

    def arguments(self) -> list[str]:
        """The call as it is typed behind `prepare.py`."""
        by_frame = [
            *(("--edited", frame, path) for frame, path in sorted(self.edited.items())),
            *(("--painted", frame, path) for frame, path in sorted(self.painted.items())),
            *(("--box", frame, _numbers(box)) for frame, box in sorted(self.boxes.items())),
            *(("--click", frame, _numbers(pixel)) for frame, pixels in sorted(self.clicks.items()) for pixel in pixels),
            *(("--not", frame, _numbers(pixel)) for frame, pixels in sorted(self.background.items()) for pixel in pixels),
        ]
        words = ["--source", str(self.source), "--out", str(self.out)]
        words += [word for flag, frame, value in by_frame for word in (flag, f"{frame}:{value}")]
        words += [word for frame in self.pictures for word in ("--frame", str(frame))]
        for name in _PLAIN:
            value = getattr(self, name)
            if value is not None and value != getattr(type(self), name):
                words += [f"--{name}", str(value)]
        return [*words, "--overwrite"] if self.overwrite else words

    def check(self) -> None:
        """What can be told before the source is read.

        Raises:
            UserError: numbers that mean nothing.
        """
        errors = ErrorCollector()
        if self.start < 0:
            errors.add(f"--start {self.start}: must be 0 or more; source frames are counted from 0.")
        if self.every < 1:
            errors.add(f"--every {self.every}: must be 1 or more; 2 takes every other source frame.")
        if not 0 <= self.margin < float("inf"):
            errors.add(f"--margin {self.margin:g}: must be 0 or more, a share of the region's size.")
        if (self.clicks or self.background) and self.sam is None:
            errors.add("--click, --not: say to SAM 2 where the object is, and there is no --sam. Add --sam FOLDER, or give the "
                       "region with --box or --painted.")  # fmt: skip
        errors.raise_if_any()


def _numbers(values: Iterable[int]) -> str:
    """A box or a pixel as its flag has it."""
    return ",".join(map(str, values))


def grouped(pairs: Iterable[tuple[int, T]]) -> dict[int, tuple[T, ...]]:
    """All that a flag gave, by frame of the clip."""
    found: dict[int, tuple[T, ...]] = {}
    for frame, value in pairs:
        found[frame] = (*found.get(frame, ()), value)
    return found


def by_frame(flag: str, pairs: Iterable[tuple[int, T]]) -> dict[int, T]:
    """What a flag gave, by frame of the clip.

    Raises:
        UserError: it was given twice for one frame.
    """
    found: dict[int, T] = {}
    for frame, value in pairs:
        if frame in found:
            raise UserError(f"{flag}: given twice for frame {frame}; expected once. Keep one, or name the other's frame: "
                            f"{flag} FRAME:...")  # fmt: skip
        found[frame] = value
    return found
