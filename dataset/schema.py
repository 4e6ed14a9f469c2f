"""The edit job's TOML: closed, typed settings; paths in it are relative to the file itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, StringConstraints, model_validator

from common.files import placed
from common.settings import Settings, load_settings, read_toml

S = TypeVar("S", bound=Settings)
Count = Annotated[int, Field(gt=0)]
Index = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class EditedFrameSettings(Settings):
    """One edited picture and the moment of the clip that it replaces."""

    image: Path
    """The edited picture, of the source's size or the job's `size`; another one of about the source's aspect is scaled."""
    frame: Index | None = None
    """Its index in the used clip: 0 is the first used frame, 1 the second, `every` frames later in the source."""
    time: Seconds | None = None
    """Instead of `frame`: seconds in the source, as a player shows them; the nearest used frame is meant."""
    caption: Text | None = None
    """What the edited picture shows; default: the job's `edited_caption`."""
    caption_file: Path | None = None
    """Instead of `caption`: a text file that holds it."""

    @model_validator(mode="after")
    def _one_moment_one_caption(self) -> EditedFrameSettings:
        if (self.frame is None) == (self.time is None):
            raise ValueError("give exactly one of `frame` (index in the used clip) and `time` (seconds).")
        _at_most_one_caption(self)
        return self


class JobSettings(Settings):
    """One edit job: a video, the mask of the region to edit, and the edited frames."""

    elsewhere = dict.fromkeys(
        ("directory", "resolutions", "enable_ar_bucket", "min_ar", "max_ar", "num_ar_buckets", "ar_buckets", "frame_buckets",
         "size_buckets", "num_repeats", "caption_prefix", "shuffle_tags", "cache_shuffle_num"),
        "this is a key of diffusion-pipe's datasets; an edit job names one `source`, its `mask` and [[edited_frame]]s "
        "(prepare.py writes one).",
    ) | dict.fromkeys(
        ("output_dir", "dataset", "model", "adapter", "optimizer", "stage", "monitoring", "edit", "preview", "evaluation"),
        "this is of a run's TOML, which names an edit job's as its `dataset`.",
    )

    name: Text
    """What outputs are called; default: the stem of the TOML file."""
    source: Path
    """The video to edit: mp4, mov, webm, mkv, gif, or a folder of images."""
    mask: Path
    """White = edit: a video or a folder of images with one mask per source frame, or one still for all. With `every` also
    one mask per used frame."""
    caption: Text | None = None
    """What the first used frame of the source shows."""
    caption_file: Path | None = None
    """Instead of `caption`: a text file that holds it."""
    edited_caption: Text | None = None
    """Caption of edited frames that have none of their own; default: `caption`."""
    trigger: Annotated[str, StringConstraints(strip_whitespace=True)] = "p3rs0n,"
    """The special token p* (paper section 3.3) that starts every prompt of this job."""
    size: tuple[Count, Count] | None = None
    """[width, height] to work at; default: the source's own, or the nearest that the model can take."""
    crop: Literal["mask"] | tuple[Index, Index, Count, Count] | None = None
    """Work on a part of the picture: [left, top, width, height] in the source's pixels, or "mask", a part around all that is
    marked. The result is the whole picture all the same. For small regions of large pictures, see docs/editing.md."""
    start: Index = 0
    """Index of the first source frame to use."""
    every: Count = 1
    """Use every so many frames of the source, from `start` on: 60 fps and `every` = 4 give a result of 15 fps, in time."""
    frames: Count | None = None
    """How many frames to use; default: as many as the model can take, up to `max_frames`."""
    max_frames: Count = 49
    """Limit of the default of `frames`."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Frames per second of a source that is a folder of images, which has no rate of its own; default 16."""
    clip_frames: Count | None = None
    """Train on overlapping clips of this many frames instead of the whole video (paper section 4.5)."""
    keep_outside: bool = True
    """Use of each edited picture only what lies inside its frame's mask, and the source's pixels elsewhere; false: the whole
    picture. See docs/masks.md."""
    edited_frame: tuple[EditedFrameSettings, ...] = ()
    """The edited frames, as `[[edited_frame]]` tables; frame 0 is needed to edit, not to train on motion."""

    @model_validator(mode="after")
    def _one_caption(self) -> JobSettings:
        _at_most_one_caption(self)
        return self


def _at_most_one_caption(settings: JobSettings | EditedFrameSettings) -> None:
    if settings.caption is not None and settings.caption_file is not None:
        raise ValueError("`caption` and `caption_file` exclude each other; give one of them.")


def load_job_settings(path: Path, overrides: dict[str, Any] | None = None) -> JobSettings:
    """Read a job TOML; `overrides` replace its top-level keys. All paths of the result are absolute.

    Raises:
        UserError: the file is missing or malformed, or keys are unknown, missing or of the wrong type.
    """
    values = {"name": path.stem, **read_toml(path), **(overrides or {})}
    settings = load_settings(JobSettings, path, values)
    folder = path.resolve().parent
    edited = tuple(_absolute(frame, folder) for frame in settings.edited_frame)
    return _absolute(settings, folder).model_copy(update={"edited_frame": edited})


def _absolute(settings: S, folder: Path) -> S:
    paths = {key: placed(value, folder) for key, value in settings if isinstance(value, Path)}
    return settings.model_copy(update=paths)
