"""An edit job, read and checked: frames, mask and edited frames of one size, with every choice told.

Axes: F frames of the used clip, H W pixels at the working size.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from common.errors import ErrorCollector, UserError
from common.files import hash_json
from dataset import footage, images
from dataset.resize import Box, Fit, Grid, Size, alike, box_around, fit, scaled
from dataset.schema import EditedFrameSettings, JobSettings, load_job_settings
from dataset.video import Video, hash_media, nice_rate, read_media

FIELDS_BEFORE = {"every": 1, "keep_outside": False}
"""What `EditJob.fields` of older files meant where they lack these keys."""


@dataclass(frozen=True, eq=False)
class EditedFrame:
    """One edited picture at the working size."""

    index: int
    """Index in the used clip."""
    image: np.ndarray
    """uint8 (H, W, 3)."""
    caption: str
    path: Path
    rescaled: bool = False
    """Whether it was given at another size than this."""


@dataclass(frozen=True)
class AudioSpan:
    """The part of the source's audio that belongs to the used clip."""

    path: Path
    start: float
    """Seconds in the source."""
    seconds: float


@dataclass(frozen=True, eq=False)
class EditJob:
    """All that a job brings: pixels at the working size, words, and where they come from."""

    name: str
    frames: np.ndarray
    """uint8 (F, H, W, 3)."""
    grey_mask: np.ndarray
    """uint8 (F, H, W), white = edit; what grey means is decided above this room."""
    edited_frames: tuple[EditedFrame, ...]
    """In the order of their index; pictures as they came, whatever `keep_outside` says."""
    keep_outside: bool
    """Whether edited pictures count inside their frame's mask only."""
    caption: str
    trigger: str
    fps: Fraction
    """Of the used frames: the source's own rate, or its mean where `variable_rate`, divided by `every`."""
    variable_rate: bool
    times: np.ndarray
    """float64 (F,): seconds of each frame in the source."""
    source: Path
    mask: Path
    start: int
    """Index in the source of frame 0."""
    every: int
    """Step in the source from one used frame to the next."""
    original_size: Size
    """(width, height) of the source."""
    audio: AudioSpan | None
    clips: tuple[range, ...]
    """Frame ranges to train on: the whole clip, or overlapping pieces of `clip_frames`."""
    choices: tuple[str, ...]
    """One line for every choice that was made."""
    hashes: dict[str, str]
    """SHA-256 of the files as found: `source`, `mask`, and one `edited_frame.N` for each index N."""
    crop: tuple[int, int, int, int]
    """(left, top, width, height) of the source that is used."""

    @property
    def size(self) -> Size:
        """(width, height) of the working size."""
        return self.frames.shape[2], self.frames.shape[1]

    @property
    def fit(self) -> Fit:
        """How the source was cut and scaled to the working size."""
        return Fit(self.original_size, self.crop[:2], self.crop[2:], self.size)

    @property
    def first_edit(self) -> EditedFrame | None:
        """The edited frame 0, which inference needs; a job without it can train on motion."""
        return next((frame for frame in self.edited_frames if frame.index == 0), None)

    def fields(self) -> dict[str, Any]:
        """The job for people and for edited.json: names, sizes, words, file hashes; JSON-able."""
        return {
            "name": self.name, "source": str(self.source), "mask": str(self.mask), "start": self.start, "every": self.every,
            "frames": len(self.frames), "size": list(self.size), "original_size": list(self.original_size),
            "crop": list(self.crop), "fps": str(self.fps), "variable_rate": self.variable_rate,
            "caption": self.caption, "trigger": self.trigger,
            "clips": [[c.start, c.stop] for c in self.clips], "keep_outside": self.keep_outside,
            "edited_frames": [
                {"index": frame.index, "image": str(frame.path), "caption": frame.caption}
                for frame in self.edited_frames
            ],
            "hashes": self.hashes,
        }

    def identity(self) -> dict[str, Any]:
        """What determines the samples, by content and without names or places of files; JSON-able.

        `clip` covers all that motion samples depend on, `edited_frames` the rest, so that a new edited
        frame leaves the samples of the others valid.
        """
        return {
            "clip": {
                "source": self.hashes["source"], "mask": self.hashes["mask"],
                "frames": hash_pixels(self.frames), "grey_mask": hash_pixels(self.grey_mask),
                "start": self.start, "every": self.every, "crop": list(self.crop), "size": list(self.size),
                "caption": self.caption, "trigger": self.trigger,
                "clips": [[c.start, c.stop] for c in self.clips],
            },
            "edited_frames": [
                {
                    "index": frame.index, "file": self.hashes[f"edited_frame.{frame.index}"],
                    "image": hash_pixels(frame.image), "caption": frame.caption, "keep_outside": self.keep_outside,
                }
                for frame in self.edited_frames
            ],
        }


def hash_pixels(array: np.ndarray) -> str:
    """SHA-256 of an array's shape, type and values."""
    return hash_json([list(array.shape), str(array.dtype), hashlib.sha256(array.tobytes()).hexdigest()])


def split_clips(frames: int, length: int) -> tuple[range, ...]:
    """Cut `frames` into clips of `length` that share their end frames (paper section 4.5: 49 -> 4 of 13).

    Where that does not come out even, the last clip is moved back, so all have one length and every
    frame is in a clip.

    Raises:
        ValueError: `length` is below 2 or above `frames`.
    """
    if not 2 <= length <= frames:
        raise ValueError(f"clips of {length} frames cannot cover {frames} frames")
    starts = list(range(0, frames - length + 1, length - 1))
    if starts[-1] + length < frames:
        starts.append(frames - length)
    return tuple(range(start, start + length) for start in starts)


def load_job(path: Path, grid: Grid, overrides: dict[str, Any] | None = None) -> EditJob:
    """Read the job TOML at `path` and all its media, fit them to `grid`, and report all errors at once.

    Args:
        path: the job's TOML.
        grid: the sizes and frame counts that the model can take.
        overrides: values that replace top-level keys of the TOML.

    Raises:
        UserError: anything in the TOML or the media that the job cannot be done with.
    """
    return _Loader(path, grid, load_job_settings(path, overrides)).load()


class _Loader:
    """One reading of a job; gathers errors and choices on the way."""

    def __init__(self, path: Path, grid: Grid, settings: JobSettings) -> None:
        self.path = path
        self.grid = grid
        self.settings = settings
        self.errors = ErrorCollector()
        self.choices: list[str] = []
        self.hashes: dict[str, str] = {}

    def load(self) -> EditJob:
        settings = self.settings
        self._check_requests()
        caption = self._words(settings, "")
        source = self._source()
        count = self._count(source) if source else 0
        mask = self._mask(source, count)
        fitted = self._fit(source, mask if count else None) if source else None
        edits = self._edits(source, fitted, count, caption)
        clips = self._clips(count)
        self.errors.raise_if_any()
        assert source is not None, "a missing source has left an error"
        assert fitted is not None, "there is a fit wherever there is a source"
        assert mask is not None, "a missing mask has left an error"
        if not caption:
            self._say("no caption given: prompts hold the trigger alone; `caption` should say in one sentence who or what is "
                      "seen, doing what, and where")
        if not edits or edits[0].index:
            self._say("no edited frame 0: the job can be trained on, not edited with")
        return self._job(source, fitted, fitted.mask(mask), count, edits, clips, caption)

    def _job(
        self, source: Video, fitted: Fit, mask: np.ndarray, count: int, edits: tuple[EditedFrame, ...],
        clips: tuple[range, ...], caption: str,
    ) -> EditJob:
        settings = self.settings
        cover = mask.mean((1, 2)) / 2.55
        self._say(f"mask {settings.mask.name} marks {cover.mean():.1f} % of the picture as edit "
                  f"({cover.min():.1f} to {cover.max():.1f} %, by its grey values)")
        if empty := int(np.count_nonzero(~mask.any((1, 2)))):
            self._say(f"mask {settings.mask.name} marks nothing in {empty} of the {count} used frames")
        times = source.times[:count]
        span = float(times[-1] - times[0]) * count / (count - 1)
        audio = AudioSpan(settings.source, float(times[0]), span) if source.has_audio else None
        job = EditJob(
            name=settings.name, frames=fitted.frames(source.frames[:count]), grey_mask=mask,
            edited_frames=edits, keep_outside=settings.keep_outside, caption=caption, trigger=settings.trigger,
            fps=source.fps / settings.every, variable_rate=source.variable_rate, times=times,
            source=settings.source, mask=settings.mask, start=settings.start, every=settings.every,
            original_size=source.size, audio=audio, clips=clips, choices=tuple(self.choices), hashes=self.hashes,
            crop=(*fitted.offset, *fitted.crop),
        )
        for array in (job.frames, job.grey_mask, job.times, *(edit.image for edit in edits)):
            array.flags.writeable = False
        return job

    def _say(self, choice: str) -> None:
        self.choices.append(f"{self.settings.name}: {choice}.")

    def _fail(self, message: str) -> None:
        self.errors.add(f"{self.path}: {message}")

    def _hash(self, key: str, path: Path) -> None:
        self.hashes[key] = hash_media(path)

    def _check_requests(self) -> None:
        """Sizes and counts that the model cannot take, whatever the media are."""
        size, grid = self.settings.size, self.grid
        if size and not grid.takes_size(size):
            near = " or ".join(f"[{w}, {h}]" for w, h in grid.nearest_sizes(size))
            self._fail(f"`size` = {list(size)}: width and height must be multiples of {grid.size_step}; "
                       f"nearest: {near}.")
        for key in ("frames", "clip_frames"):
            value = getattr(self.settings, key)
            if value is not None and not grid.takes_frames(value):
                near = " or ".join(str(n) for n in grid.nearest_frames(value))
                self._fail(f"`{key}` = {value}: must be {grid.frame_step}n+1 with n >= 1; nearest: {near}.")
        if self.settings.max_frames <= grid.frame_step:
            self._fail(f"`max_frames` = {self.settings.max_frames}: must be at least {grid.frame_step + 1}.")

    def _words(self, settings: JobSettings | EditedFrameSettings, fallback: str) -> str:
        """The caption of a table, from the TOML or its text file, on one line."""
        if settings.caption_file is None:
            return settings.caption or fallback
        try:
            text = " ".join(settings.caption_file.read_text(encoding="utf-8-sig").split())
        except (OSError, UnicodeDecodeError) as error:
            self._fail(f"`caption_file` = {settings.caption_file}: could not be read as UTF-8 text: {error}.")
            return fallback
        if not text:
            self._fail(f"`caption_file` = {settings.caption_file}: is empty, expected a caption.")
        return text

    def _source(self) -> Video | None:
        """The source; only the frames that can be used are kept, but all are decoded and counted."""
        settings = self.settings
        path = settings.source
        with self.errors.catch():
            if path.suffix.lower() in images.SUFFIXES:
                raise UserError(f"{path}: is one picture; `source` must be a video or a folder of images.")
            rate = nice_rate(settings.fps) if settings.fps else None
            source = read_media(path, settings.start, settings.frames or settings.max_frames, rate, every=settings.every)
            if settings.fps and not path.is_dir():
                self._fail(f"`fps` = {settings.fps}: is for folders of images; {path.name} has its own rate. "
                           "Remove it.")
            self._hash("source", path)
            self._describe(source)
            return source
        return None

    def _describe(self, source: Video) -> None:
        kind = "variable rate, mean" if source.variable_rate else "constant"
        if source.path.is_dir() and not self.settings.fps:
            kind = "a folder has no rate of its own; set `fps` for another,"
        audio = "audio" if source.has_audio else "no audio"
        width, height = source.size
        every = self.settings.every
        rate = f"`every` = {every} makes it {float(source.fps / every):.6g} fps" if every > 1 else "no rate conversion"
        self._say(f"source {source.path.name}: {source.total} frames of {width}x{height}, {kind} "
                  f"{float(source.fps):.6g} fps, {audio}; {rate}")
        for note in (*source.notes, *footage.notes(source.frames, self.settings.start, every)):
            self._say(f"source {source.path.name}: {note}")

    def _count(self, source: Video) -> int:
        """How many frames from `start` are used; 0 with an error where that cannot be said."""
        settings, grid = self.settings, self.grid
        there = len(range(settings.start, source.total, settings.every))
        steps = f" in steps of `every` = {settings.every}" if settings.every > 1 else ""
        least = settings.frames or grid.frame_step + 1
        if there < least:
            largest = grid.frames_below(there) if there > 0 else 0
            most = f"at most {largest} can be used" if largest > grid.frame_step else "too few to use any"
            self._fail(f"{source.path} has {source.total} frames, {there} from `start` = "
                       f"{settings.start} on{steps}; expected at least {least}; {most}.")
            return 0
        count = settings.frames or grid.frames_below(min(there, settings.max_frames))
        if not grid.takes_frames(count):  # told by _check_requests
            return 0
        why = "as `frames` asks" if settings.frames else (
            f"the most of the form {grid.frame_step}n+1 "
            + (f"up to `max_frames` = {settings.max_frames}" if there > settings.max_frames else "there are")
        )
        last = settings.start + (count - 1) * settings.every
        self._say(f"uses {count} frames ({settings.start} to {last}{steps}), {why}; "
                  f"{source.total - count} of {source.total} unused")
        return count

    def _window(self, source: Video, mask: np.ndarray | None) -> Box:
        """The part of the source that is used."""
        crop, (width, height) = self.settings.crop, source.size
        whole = (0, 0, width, height)
        if crop == "mask":
            marked = None if mask is None else _bright(mask).any(0)
            return self.grid.window(whole if marked is None or not marked.any() else box_around(marked), source.size)
        if crop and (crop[0] + crop[2] > width or crop[1] + crop[3] > height):
            self._fail(f"`crop` = {list(crop)}: [left, top, width, height] reaches beyond {source.path.name}, which is "
                       f"{width}x{height}.")
            return whole
        return crop or whole

    def _fit(self, source: Video, mask: np.ndarray | None) -> Fit:
        window = self._window(source, mask)
        size = self.settings.size or self.grid.default_size(window[2:])
        fitted = fit(source.size, size, window)
        sx, sy = fitted.factors
        why = "as `size` asks" if self.settings.size else (
            "the source's own" if size == source.size
            else "the crop's own" if size == window[2:]
            else f"nearest to its aspect in multiples of {self.grid.size_step} "
            f"up to {self.grid.max_area} pixels"
        )
        self._say(f"works at {size[0]}x{size[1]} ({why}); scaled by {sx:.4g} and {sy:.4g}")
        if fitted.cropped:
            self._say_cropped(fitted, window, mask)
        if size[0] * size[1] > self.grid.max_area:
            self._say(f"{size[0] * size[1]} pixels a frame, more than the model's usual {self.grid.max_area}")
        return fitted

    def _say_cropped(self, fitted: Fit, window: Box, mask: np.ndarray | None) -> None:
        (left, top), (width, height) = fitted.offset, fitted.crop
        why = "another aspect than the source" if window == (0, 0, *fitted.source) else f"`crop` = {self.settings.crop!r}"
        self._say(f"{why}: frames, mask and edited frames are cut to {width}x{height} at ({left}, {top})")
        if mask is None:
            return
        bright = _bright(mask)
        inside = sum(int(np.count_nonzero(fitted.cut(marks))) for marks in bright)
        marked = int(np.count_nonzero(bright))
        if marked and not inside:
            self._fail(f"{why}: nothing that mask {self.settings.mask.name} marks lies in {width}x{height} at ({left}, {top}), "
                       "so nothing would be edited. Move `crop`, or leave it and `size` out.")  # fmt: skip
        elif lost := 1 - inside / max(1, marked):
            self._say(f"{lost:.1%} of what the mask marks lies outside of that and stays as it is")

    def _mask(self, source: Video | None, count: int) -> np.ndarray | None:
        """uint8 (count, H, W) at the source's size, or None with an error."""
        path = self.settings.mask
        with self.errors.catch():
            pictures, video = read_masks(path, self.settings.start, self.settings.every, max(1, count))
            self._hash("mask", path)
            for note in video.notes if video else ():
                self._say(f"mask {path.name}: {note}")
            if source is None:
                return None
            used = count if self.settings.every > 1 else None
            check_mask(path, pictures.shape[2:0:-1], video.total if video else None, source, used)
            if video is None:
                self._say(f"mask {path.name}: one still, holds for all frames")
            elif used == video.total:
                self._say(f"mask {path.name}: {used} masks, one for each used frame")
            grey = grey_levels(path, pictures)
            return np.repeat(grey, count, axis=0) if video is None else grey
        return None

    def _edits(
        self, source: Video | None, fitted: Fit | None, count: int, caption: str
    ) -> tuple[EditedFrame, ...]:
        found: dict[int, EditedFrame] = {}
        for edit in self.settings.edited_frame:
            image = None
            with self.errors.catch():
                image = images.read_image(edit.image)
            words = self._words(edit, self.settings.edited_caption or caption)
            if source is None or fitted is None or not count:
                continue
            index = self._index(edit, source.times[:count])
            if index is not None and index in found:
                self._fail(f"`edited_frame`: {edit.image.name} and {found[index].path.name} "
                           f"both edit frame {index}. Keep one.")
            elif index is not None and image is not None:
                with self.errors.catch():
                    found[index] = EditedFrame(index, _fit_edit(edit.image, image, fitted), words, edit.image)
                    self._hash(f"edited_frame.{index}", edit.image)
                    own = edit.caption or edit.caption_file or self.settings.edited_caption
                    note = "" if own or not caption else ", with the source's caption for want of its own"
                    if (size := (image.shape[1], image.shape[0])) not in (fitted.source, fitted.size):
                        note = f", scaled from {size[0]}x{size[1]}{note}"
                    self._say(f"edited frame {index}{self._place(index)} is {edit.image.name}{note}")
        return tuple(found[index] for index in sorted(found))

    def _place(self, index: int) -> str:
        """Where a used frame is in the source, if that is not plain."""
        settings = self.settings
        return f" (frame {settings.start + index * settings.every} of the source)" if settings.every > 1 else ""

    def _index(self, edit: EditedFrameSettings, times: np.ndarray) -> int | None:
        """The frame that an edited frame replaces, or None with an error."""
        if edit.frame is not None:
            if edit.frame < len(times):
                return edit.frame
            steps = " in steps of `every`; or give `time`" if self.settings.every > 1 else ""
            self._fail(f"`edited_frame`: {edit.image.name} is for frame {edit.frame}, but the clip has "
                       f"frames 0 to {len(times) - 1} (counted from `start`{steps}).")
            return None
        half = float(np.diff(times).mean()) / 2
        if not times[0] - half <= edit.time <= times[-1] + half:
            self._fail(f"`edited_frame`: {edit.image.name} is for {edit.time:g} s, but the clip goes from "
                       f"{times[0]:.3f} to {times[-1]:.3f} s of the source.")
            return None
        index = int(np.abs(times - edit.time).argmin())
        self._say(f"{edit.image.name}: {edit.time:g} s is frame {index}{self._place(index)}, shown at {times[index]:.4f} s")
        return index

    def _clips(self, count: int) -> tuple[range, ...]:
        length = self.settings.clip_frames
        if not count or length is None or not self.grid.takes_frames(length):
            return (range(count),)
        if length > count:
            self._fail(f"`clip_frames` = {length}: the clip has {count} frames; expected at most that.")
            return ()
        clips = split_clips(count, length)
        spans = ", ".join(f"{clip.start}-{clip.stop - 1}" for clip in clips)
        self._say(f"trains on {len(clips)} overlapping clips of {length} frames: {spans}")
        return clips


def _bright(mask: np.ndarray) -> np.ndarray:
    """Where a mask is clearly meant: a compressed one has some light everywhere."""
    return mask > mask.max() // 2


def read_masks(path: Path, start: int, every: int, count: int) -> tuple[np.ndarray, Video | None]:
    """The masks of `count` used frames, uint8 (F, H, W, 3), of a video or folder that has one for each frame of the source.

    One that has `count` masks in all, where `every` is above 1, has one for each used frame: it is taken as it is.

    Returns:
        The pictures and what they were read from; of a still the one picture, and None.
    """
    if path.suffix.lower() in images.SUFFIXES:
        return images.read_mask(path)[None], None
    video = read_media(path, start, count, every=every, masks=True)
    if every > 1 and video.total == count:
        video = read_media(path, masks=True)
    return video.frames, video


def check_mask(path: Path, size: tuple[int, ...], total: int | None, source: Video, used: int | None = None) -> None:
    """A mask must be as large as the source and, unless it is a still (`total` None), as long, or have `used` frames."""
    errors = ErrorCollector()
    if tuple(size) != source.size:
        errors.add(f"{path}: masks are {size[0]}x{size[1]}, expected {source.size[0]}x{source.size[1]} as "
                   f"{source.path.name}. Make masks at the source's size; they are never stretched.")
    if total not in (None, source.total, used):
        clip = f", or {used}, one for each used frame" if used else ""
        errors.add(f"{path}: has {total} masks, expected {source.total}, one for each frame of "
                   f"{source.path.name}{clip} (or one picture file for all).")
    errors.raise_if_any()


def grey_levels(path: Path, pictures: np.ndarray) -> np.ndarray:
    """uint8 (F, H, W, 3) -> (F, H, W); coloured masks are refused, because colour has no meaning here."""
    grey = np.empty(pictures.shape[:3], np.uint8)
    for index, picture in enumerate(pictures):
        low, high = images.channel_range(picture)
        if (high - low).max() > images.ONE_COLOUR:
            raise UserError(f"{path}: mask {index} is coloured, expected grey (white = edit).")
        grey[index] = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    return grey


def _fit_edit(path: Path, image: np.ndarray, fitted: Fit) -> np.ndarray:
    """An edited picture at the working size; image models give it back at a size of their own."""
    size = (image.shape[1], image.shape[0])
    if fitted.is_worked_on(size):
        return image
    if alike(size, fitted.source):
        return fitted.image(scaled(image, fitted.source))
    sizes = " or ".join(f"{w}x{h}" for w, h in dict.fromkeys([fitted.source, fitted.size]))
    raise UserError(f"{path}: edited frame is {size[0]}x{size[1]}, expected {sizes}, or the same aspect. Crop what was added, "
                    "or export it at that size.")
