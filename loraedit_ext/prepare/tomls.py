"""job.toml and edit.toml as prepare.py writes them, and what becomes of those that a person edited."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Any

from common.errors import ErrorCollector, UserError
from common.settings import read_toml
from dataset.schema import load_job_settings
from loraedit_ext.config import load_config
from loraedit_ext.family import Family
from loraedit_ext.prepare.folder import JobFolder
from loraedit_ext.prepare.request import Request

JOB, EDIT, MASK = "job.toml", "edit.toml", "mask"
_WEIGHTS: dict[Family, str] = {"wan": "/models/Wan2.1-I2V-14B-480P", "hunyuan-video": "/models/HunyuanVideo-I2V/ckpts"}
_EDIT = """\
# The run. Paths are relative to this file; docs/configuration.md has every key.
output_dir = "runs"
dataset = "{job}"
# On a card of 24 GB switch on these two and transformer_dtype; train.py --dry_run predicts the memory, docs/memory.md has more.
# activation_checkpointing = "offload"
# blocks_to_swap = 4

[model]
type = "{family}"
{weights}
# transformer_dtype = "float8"
"""


def job_toml(request: Request, frames: int) -> str:
    """The job as TOML; paths are relative to its folder."""
    lines = [f"source = {_relative(request.source, request.out)}", f'mask = "{MASK}"', f"start = {request.start}",
             *([f"every = {request.every}"] * (request.every > 1)),
             f"frames = {frames}   # the mask is black beyond them"]  # fmt: skip
    captions = (("caption", request.caption), ("edited_caption", request.edited_caption))
    lines += [f"{key} = {_text(words.strip())}" for key, words in captions if words and words.strip()]
    for frame, picture in sorted(request.edited.items()):
        lines += ["", "[[edited_frame]]", f"image = {_relative(picture, request.out)}", f"frame = {frame}"]
    return "\n".join(lines) + "\n"


def edit_toml(request: Request) -> str:
    """A run of the job as TOML. Weights given by an absolute path keep it."""
    family = request.model or "wan"
    ckpt = request.ckpt
    if ckpt is None:
        weights = f"# ckpt_path = {_text(_WEIGHTS[family])}   # fill in: the folder of the weights (docs/checkpoints.md)"
    else:
        weights = f"ckpt_path = {_text(str(ckpt)) if ckpt.is_absolute() else _relative(ckpt, request.out)}"
    return _EDIT.format(job=JOB, family=family, weights=weights)


def plan_tomls(request: Request, folder: JobFolder, frames: int) -> dict[str, str]:
    """The TOMLs to write, name -> text: those that are not there, and those of ours that the call asks to be otherwise.

    Raises:
        UserError: one that a person edited contradicts the call; every key that does is told.
    """
    errors, texts = ErrorCollector(), {}
    with errors.catch():
        if _is_free(folder, JOB):
            texts[JOB] = job_toml(request, frames)
        else:
            _refuse(folder.path / JOB, _differences(job_toml(request, frames), folder.path / JOB))
    with errors.catch():
        names_model = request.ckpt is not None or request.model is not None
        if not (folder.path / EDIT).exists() or (names_model and folder.is_ours(EDIT)):
            texts[EDIT] = edit_toml(request)
        elif names_model:
            _refuse(folder.path / EDIT, _other_model(request, folder.path / EDIT))
    errors.raise_if_any()
    return texts


def no_longer_there(folder: JobFolder, text: str) -> list[str]:
    """What the job.toml that is there says and `text`, which is to replace it, does not: keys, and edited frames."""
    if not (folder.path / JOB).exists():
        return []
    former, new = read_toml(folder.path / JOB), tomllib.loads(text)
    frames = [{entry["frame"] for entry in values.pop("edited_frame", [])} for values in (former, new)]
    return [*(key for key in former if key not in new), *(f"edited frame {frame}" for frame in sorted(frames[0] - frames[1]))]


def _is_free(folder: JobFolder, name: str) -> bool:
    return not (folder.path / name).exists() or folder.is_ours(name)


def _refuse(path: Path, differences: list[str]) -> None:
    if differences:
        listed = "".join(f"\n    {difference}" for difference in differences)
        raise UserError(f"{path}: was written or edited by hand, and says otherwise than this call:{listed}\n"
                        "    Edit these lines, or remove the file to have a new one written.")  # fmt: skip


def _differences(text: str, path: Path) -> list[str]:
    """What the job at `path` has otherwise than `text` would; what `text` leaves out is free."""
    asked, found = {"every": 1} | tomllib.loads(text), load_job_settings(path)
    edited = {(_place(path, entry["image"]), entry["frame"]) for entry in asked.pop("edited_frame", [])}
    told = [
        f"{key} = {_shown(getattr(found, key))}; this call asks for {_shown(value)}" for key, value in asked.items()
        if not _agrees(path, getattr(found, key), value)
    ]
    missing = edited - {(_place(path, entry.image), entry.frame) for entry in found.edited_frame}
    return told + [
        f"no [[edited_frame]] with image = {_relative(image, path.parent)}, frame = {frame}"
        for image, frame in sorted(missing, key=lambda entry: entry[1])
    ]


def _agrees(path: Path, there: Any, asked: Any) -> bool:
    return _place(path, there) == _place(path, asked) if isinstance(there, Path) else there == asked


def _place(toml: Path, path: Path | str) -> Path:
    return (toml.parent / path).resolve()


def _other_model(request: Request, path: Path) -> list[str]:
    model, told = load_config(path).model, []
    if request.model not in (None, model.type):
        told.append(f"model.type = {_shown(model.type)}; this call asks for {_shown(request.model)}")
    if request.ckpt is not None and (model.ckpt_path is None or model.ckpt_path.resolve() != request.ckpt.resolve()):
        told.append(f"model.ckpt_path = {_shown(model.ckpt_path)}; this call asks for {_shown(request.ckpt)}")
    return told


def _shown(value: Any) -> str:
    return "(not set)" if value is None else _text(str(value)) if isinstance(value, str | Path) else str(value)


def _relative(path: Path, folder: Path) -> str:
    """As a TOML string. A link keeps its own name: what it leads to may be a store's, without an ending that says its kind."""
    return _text(os.path.relpath(path.parent.resolve() / path.name, folder.resolve()))


def _text(words: str) -> str:
    """A TOML string: JSON's, but that TOML wants DEL escaped too."""
    return json.dumps(words, ensure_ascii=False).replace("\x7f", r"\u007f")
