"""What is judged: an edit of ours by its config and edited.json, or the files of any tool."""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import ErrorCollector, UserError
from dataset import images
from dataset.job import FIELDS_BEFORE, EditJob, grey_levels, load_job
from dataset.original import at_source_size
from dataset.resize import Grid
from dataset.video import FOLDER_FPS, hash_media, read_media
from dataset.video_writer import even_size
from loraedit_ext import masks, regimes
from loraedit_ext import run as runs
from loraedit_ext.config import EditSettings, RunConfig
from loraedit_ext.editing import results
from loraedit_ext.editing.compositing import is_laid_back


@dataclass(frozen=True, eq=False)
class Compared:
    """A video and what it is compared with, all of one size. Axes: F frames, H W pixels."""

    video: np.ndarray
    """uint8 (F, H, W, 3)."""
    source: np.ndarray
    """uint8 (F, H, W, 3)."""
    preserve: np.ndarray
    """bool (F, H, W), True outside the edit."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One edit with everything that it is compared with. Axes: F frames, H W pixels of the result."""

    name: str
    source: np.ndarray
    """uint8 (F, H, W, 3)."""
    edited: np.ndarray
    """uint8 (F, H, W, 3): the result as it was written."""
    preserve: np.ndarray
    """bool (F, H, W), True outside the edit."""
    reference: np.ndarray
    """uint8 (H, W, 3): the edited first frame."""
    generated: Compared | None
    """The result from before compositing, where that is known; at the size that the model works at."""
    truth: np.ndarray | None
    """uint8 (F, H, W, 3): what the edit should be, where that is known."""
    fps: Fraction
    files: dict[str, str]
    """Role to path."""
    hashes: dict[str, str]
    """Role to SHA-256."""
    notes: tuple[str, ...] = ()
    """What a reader should know, one sentence each."""
    run: Path | None = None
    """Run folder of the LoRA that made it."""
    record: dict[str, Any] | None = None
    """Its edited.json."""

    @property
    def result(self) -> Compared:
        return Compared(self.edited, self.source, self.preserve)


_NEEDED = ("job.size", "job.crop", "job.frames", "job.start", "job.hashes", "config.edit.output", "config.edit.composite",
           "lora.path", "command")  # fmt: skip
"""What of an edited.json is read here and for the report."""


def newest_edit(config: RunConfig) -> Path:
    """The edit that the newest LoRA in output_dir made last.

    Raises:
        UserError: that LoRA has made no edit yet.
    """
    adapter = runs.newest_lora(config.output_dir)
    found = results.all_beside(adapter)
    if not found:
        raise UserError(
            f"{adapter.parent / results.FOLDER}: no {results.RECORD} in it, so the newest LoRA has made no edit yet. "
            "Run inference.py first, or give --edit FOLDER."
        )
    return found[-1]


def from_edit(config: RunConfig, folder: Path) -> Subject:
    """An edit that inference.py wrote, against the job that it was made from.

    Raises:
        UserError: files are missing, or the job's files have changed since the edit.
    """
    record = _read_record(folder / results.RECORD)
    made = record["job"]
    kept = ("size", "crop", "frames", "start", "every", "keep_outside")
    job = load_job(config.dataset, Grid(), {key: (FIELDS_BEFORE | made)[key] for key in kept})
    _check_unchanged(job, made["hashes"], folder)
    if job.first_edit is None:
        raise UserError(f"{config.dataset}: has no edited frame 0, which this edit was made from. Put it back.")
    edited = folder / results.EDITED[record["config"]["edit"]["output"]]
    generated = folder / results.GENERATED
    files = {"source": job.source, "edited": edited, "mask": job.mask, "reference": job.first_edit.path}
    hashes = {role: job.hashes[key] for role, key in
              (("source", "source"), ("mask", "mask"), ("reference", "edited_frame.0"))}
    hashes["edited"] = hash_media(_existing(edited))
    if generated.is_file():
        files["generated"], hashes["generated"] = generated, hash_media(generated)
    edit = record["config"]["edit"]
    settings = EditSettings(composite=edit["composite"], size=edit.get("size", "model"))  # before there was `size`
    whole = at_source_size(job) if is_laid_back(job, settings) else job
    return Subject(
        name=job.name, source=whole.frames, edited=_frames(edited, whole.frames.shape),
        preserve=regimes.preserve_mask(whole).numpy(), reference=regimes.edited_picture(whole, whole.first_edit),
        generated=_generated(generated, job), truth=None, fps=job.fps,
        files={role: str(path) for role, path in files.items()}, hashes=hashes,
        run=_run_of(folder, Path(record["lora"]["path"])), record=record,
    )  # fmt: skip


def _generated(path: Path, job: EditJob) -> Compared | None:
    if not path.is_file():
        return None
    return Compared(_frames(path, job.frames.shape), job.frames, regimes.preserve_mask(job).numpy())


def _run_of(folder: Path, adapter: Path) -> Path:
    """The run folder: where the edit lies now, if it lies beside its LoRA, for run folders get moved."""
    beside = folder.resolve().parent / adapter.name
    return (beside if beside.is_file() else adapter).parent.parent


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        for keys in _NEEDED:
            reduce(getitem, keys.split("."), record)
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror}), expected what inference.py writes. Give the folder of "
                        "an edit, e.g. runs/RUN/stepN/edit.") from error  # fmt: skip
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: is not what inference.py writes ({error!r}). Give the folder of an edit, or run inference.py "
                        "again.") from error  # fmt: skip
    return record


def _check_unchanged(job: EditJob, then: dict[str, str], folder: Path) -> None:
    """Judging an edit against files that it was not made from would give numbers that mean nothing."""
    changed = [key for key in ("source", "mask", "edited_frame.0") if job.hashes.get(key) != then.get(key)]
    if changed:
        raise UserError(
            f"{folder}: the job's {' and '.join(changed)} changed since this edit was made. "
            "Run inference.py again, or bring the files back."
        )


@dataclass(frozen=True)
class Files:
    """What --source, --edited, ... name."""

    source: Path
    edited: Path
    mask: Path
    reference: Path
    generated: Path | None = None
    truth: Path | None = None

    def named(self) -> dict[str, Path]:
        """Role to path, of those that were given."""
        return {role: path for role, path in vars(self).items() if path is not None}


def from_files(files: Files) -> Subject:
    """The output of any tool.

    The edited video sets the length: where others are longer, their first frames count, and a note says so.

    Raises:
        UserError: everything that is missing or does not fit, together.
    """
    errors = ErrorCollector()
    videos: dict[str, np.ndarray] = {}
    rates: dict[str, Fraction] = {}
    notes = []
    for role, path in files.named().items():
        with errors.catch():
            if path.suffix.lower() in images.SUFFIXES:
                read = images.read_mask if role == "mask" else images.read_image
                videos[role] = read(_existing(path))[None]
                continue
            video = read_media(path, masks=role == "mask")
            videos[role] = video.frames
            rates |= {} if path.is_dir() else {role: video.fps}  # a folder has no rate of its own
            notes += [f"{role}: {note}." for note in video.notes]
    errors.raise_if_any()
    shape = videos["edited"].shape
    for role, frames in videos.items():
        with errors.catch():
            videos[role], note = _fitted(files.named()[role], role, frames, shape)
            notes += [note] if note else []
    errors.raise_if_any()
    fps = rates.get("edited") or rates.get("source") or FOLDER_FPS
    notes += [f"{role}: {float(rates[role]):.6g} frames a second, the edited video {float(fps):.6g}; frames are compared by "
              "their numbers, which may mean other moments." for role in ("source", "generated", "truth")
              if role in rates and abs(rates[role] / fps - 1) > 0.01]  # fmt: skip
    grey = grey_levels(files.mask, videos["mask"])
    source, preserve = videos["source"], masks.from_grey(torch.tensor(grey), str(files.mask), whole=True).numpy()
    return Subject(
        name=files.edited.stem, source=source, edited=videos["edited"], preserve=preserve, reference=videos["reference"][0],
        generated=Compared(videos["generated"], source, preserve) if "generated" in videos else None,
        truth=videos.get("truth"), fps=fps,
        files={role: str(path) for role, path in files.named().items()},
        hashes={role: hash_media(path) for role, path in files.named().items()}, notes=tuple(notes),
    )  # fmt: skip


def _fitted(
    path: Path, role: str, frames: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, str]:
    """Frames as many as the edited video has, and a note where some were left out."""
    if frames.shape[1:] != shape[1:]:
        raise UserError(
            f"{path}: {role} is {frames.shape[2]}x{frames.shape[1]}, the edited video {shape[2]}x{shape[1]}. "
            "Nothing is stretched; make them one size."
        )
    if role == "mask" and len(frames) == 1:
        return np.repeat(frames, shape[0], axis=0), ""
    wanted = 1 if role == "reference" else shape[0]
    if len(frames) < wanted:
        raise UserError(f"{path}: {role} has {len(frames)} frames, the edited video {shape[0]}. Give the whole clip.")
    return frames[:wanted], f"{role}: first {wanted} of {len(frames)} frames used." if len(frames) > wanted else ""


def _frames(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    frames = read_media(_existing(path)).frames
    if frames.shape[:3] == (shape[0], *map(even_size, shape[1:3])):
        frames = frames[:, : shape[1], : shape[2]]  # an mp4 pads odd sides
    if frames.shape != shape:
        raise UserError(f"{path}: has shape {frames.shape}, expected {shape} as the job has. Run inference.py again.")
    return frames


def _existing(path: Path) -> Path:
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.")
    return path
