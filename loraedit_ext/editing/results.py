"""What an edit leaves behind: the edited video, comparison.mp4, contact_sheet.png, generated.mkv, and edited.json.

generated.mkv holds what the model made, before compositing and without loss; edited.json all that is needed to make it
again. The edited video has the size that [edit] asks for, the other pictures the one that the model works at. Results of
other settings lie side by side: edit, edit_2, edit_3 ...
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from common.files import hash_file, write_json_atomic
from common.settings import chosen
from dataset.images import write_png
from dataset.job import EditJob
from dataset.video_writer import write_images, write_lossless, write_video
from loraedit_ext.config import RunConfig
from loraedit_ext.editing.compositing import finished_at_source_size, is_laid_back, result_size
from loraedit_ext.editing.editor import Edit
from loraedit_ext.editing.pictures import contact_sheet, overlaid, side_by_side
from loraedit_ext.lora import LoraFile

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "deepspeed")
EDITED = {"mp4": "edited.mp4", "prores": "edited.mov", "png": "edited"}
"""The edited video, by `edit.output`; a folder of frames in the last case."""
GENERATED, RECORD = "generated.mkv", "edited.json"
COMPARISON, SHEET = "comparison.mp4", "contact_sheet.png"
FOLDER = "edit"


def all_beside(adapter: Path) -> list[Path]:
    """The folders with a result beside a LoRA file, the one that was written last at the end."""
    found = [folder for folder in adapter.parent.glob(f"{FOLDER}*")
             if re.fullmatch(rf"{FOLDER}(_\d+)?", folder.name) and (folder / RECORD).is_file()]
    return sorted(found, key=lambda folder: ((folder / RECORD).stat().st_mtime_ns, folder.name))


def folder_beside(job: EditJob, config: RunConfig, adapter: LoraFile) -> Path:
    """Where a result goes: the first folder beside the LoRA that holds none, or one of the same job, LoRA and settings."""
    mine = _as_json(_made_from(_inputs(job, config, adapter)))
    names = chain([FOLDER], (f"{FOLDER}_{number}" for number in count(2)))
    folders = (adapter.path.parent / name for name in names)
    return next(folder for folder in folders
                if not (folder / RECORD).is_file() or _made_as_recorded(folder / RECORD) == mine)


def _made_from(record: dict[str, Any]) -> list[Any]:
    """What of an edited.json decides the result."""
    config = record["config"]
    return [record["job"], record["lora"]["sha256"], chosen(config["edit"]), chosen(config["model"]), config["mask_rule"]]


def _made_as_recorded(path: Path) -> list[Any] | None:
    """The same of an edited.json on disk; None, which equals no other, if it is none."""
    try:
        return _made_from(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _as_json(value: Any) -> Any:
    """A value as it comes back from a file."""
    return json.loads(json.dumps(value, default=str))


def write(folder: Path, edit: Edit, job: EditJob, config: RunConfig, adapter: LoraFile) -> list[str]:
    """Write everything into `folder`, made if need be; one line a file.

    Raises:
        UserError: a file cannot be written, or a result of the source's size is asked for and the job's files have changed.
    """
    lines = []
    times = job.times if job.variable_rate else None
    (folder / RECORD).unlink(missing_ok=True)  # it does not tell of the files that are replaced from here on
    write_lossless(folder / GENERATED, edit.generated, job.fps)
    frames = edit.frames
    if is_laid_back(job, config.edit):
        frames = finished_at_source_size(job, edit.generated, config.edit)
    edited = folder / EDITED[config.edit.output]
    if config.edit.output == "png":
        write_images(edited, frames)
        lines.append(str(edited))
    else:
        audio = {} if job.audio is None else {
            "audio_from": job.audio.path, "audio_start": job.audio.start, "audio_seconds": job.audio.seconds
        }  # fmt: skip
        notes = write_video(edited, frames, job.fps, times=times, **audio)
        lines += [str(edited), *notes]
    shown = panels(job, edit)
    write_video(folder / COMPARISON, side_by_side(shown), job.fps, times=times)
    write_png(folder / SHEET, contact_sheet(shown))
    write_json_atomic(folder / RECORD, record(edit, job, config, adapter))
    return [*lines, *(str(folder / name) for name in (COMPARISON, SHEET, GENERATED, RECORD))]


def panels(job: EditJob, edit: Edit) -> list[np.ndarray]:
    """Source, mask laid over it, and result: uint8 (F, H, W, 3) each."""
    return [job.frames, overlaid(job.frames, job.grey_mask), edit.frames]


def record(edit: Edit, job: EditJob, config: RunConfig, adapter: LoraFile) -> dict[str, Any]:
    """All that is needed to make the result again."""
    return _inputs(job, config, adapter) | {
        "command": [sys.executable.rsplit("/", 1)[-1], *sys.argv],
        "size": list(result_size(job, config.edit)),
        "facts": edit.facts,
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _inputs(job: EditJob, config: RunConfig, adapter: LoraFile) -> dict[str, Any]:
    return {
        "config": config.model_dump(mode="json"),
        "job": job.fields(),
        "lora": {"path": str(adapter.path), "sha256": hash_file(adapter.path), "metadata": adapter.metadata},
    }
