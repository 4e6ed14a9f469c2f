"""A run's folder: made once, found again by resume and by inference."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import make_folder, write_json_atomic
from loraedit_ext import lora
from loraedit_ext.config import RunConfig, parse_value
from loraedit_ext.training import state

CONFIG_COPY, RESUMED_FROM = "config.json", "resumed_from"


def create(output_dir: Path) -> Path:
    """A new folder named by UTC time, as diffusion-pipe does."""
    make_folder(output_dir)
    first = folder = output_dir / datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
    for suffix in itertools.count(2):
        try:
            folder.mkdir()
            break
        except FileExistsError:  # of another run that began in the same second
            folder = first.with_name(f"{first.name}_v{suffix}")
    return folder


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keep other processes from training in a run's folder; where the file system has no locks, go without.

    Raises:
        UserError: one does already.
    """
    descriptor = os.open(run, os.O_RDONLY)
    try:
        with suppress(OSError):
            _lock(descriptor, run)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, run: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(
            f"{run}: another process trains in it, and two would write over each other's states. Wait for its end, or stop "
            "it; an earlier global_stepN of it, if you name one to resume, goes on in a new run folder."
        ) from error


def age(run: Path) -> tuple[bool, str]:
    """Sort key of run folders, the newest last; one that a person named is older than all that are named by their time."""
    return bool(re.fullmatch(r"\d{8}_\d\d-\d\d-\d\d(_v\d+)?", run.name)), run.name


def to_resume(config: RunConfig) -> Path | None:
    """The full state to resume from, or None for a new run.

    `resume_from_checkpoint` is true (the newest run in output_dir that has a state), the name or path of a run, or of
    one of its `global_stepN`.
    """
    wanted = config.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is True:
        runs = sorted((path.parent for path in config.output_dir.glob(f"*/{state.LATEST}")), key=age)
        if not runs:
            raise UserError(f"{config.output_dir}: no run to resume in it: no folder holds a file `{state.LATEST}`.")
        return state.find(runs[-1])
    folder = Path(wanted) if Path(wanted).is_dir() else config.output_dir / str(wanted)
    return folder if (folder / "state.json").is_file() else state.find(folder)


def write_config(folder: Path, config: RunConfig, job_fields: dict, resumed_from: Path | None = None) -> None:
    """The resolved configuration and what became of the job; holds no secret, because none is accepted.

    Args:
        resumed_from: state of another run that this one begins with; a run keeps the one that it has.
    """
    before = resumed_from and str(resumed_from.resolve())
    write_json_atomic(folder / CONFIG_COPY, {
        "config": config.model_dump(mode="json"), "job": job_fields,
        RESUMED_FROM: before or _config_copy(folder).get(RESUMED_FROM),
    })


def _config_copy(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_COPY
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}). It is a copy: remove it, or undo what was changed.") from error


def overrides_of(folder: Path, config: RunConfig) -> list[str]:
    """`key=value` for all in which a run's configuration differs from `config`: with them its TOML makes the run again.

    Args:
        folder: of the run; one without a copy of its configuration has no differences.
        config: what the TOML alone says.
    """
    saved = _config_copy(folder)
    if not saved:
        return []
    there = config.model_dump(mode="json")
    # Where it was interrupted does not matter: a resumed run equals the whole one. What another run gave it does.
    begun = saved.get(RESUMED_FROM) or there["resume_from_checkpoint"]
    return _differences(saved["config"] | {"resume_from_checkpoint": begun}, there)


def _differences(wanted: Mapping[str, Any], there: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in dict.fromkeys([*wanted, *there]):
        value, other = wanted.get(key), there.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found += _differences(value, other, f"{prefix}{key}.")
        elif value != other:
            plain = isinstance(value, str) and parse_value(value) == value
            found.append(f"{prefix}{key}={value if plain else repr(value)}")
    return found


def lora_at(path: Path) -> Path:
    """A LoRA file or a folder that holds one as it is; of any other folder, an output_dir, the newest LoRA.

    Raises:
        UserError: there is none.
    """
    holds_none = path.is_dir() and not any((path / name).is_file() for name in lora.FILE_NAMES)
    return newest_lora(path) if holds_none and not any(path.glob("*.safetensors")) else path


def newest_lora(output_dir: Path) -> Path:
    """The LoRA of the newest run's last exported step.

    Raises:
        UserError: there is none.
    """
    exports = output_dir.glob(f"*/step*/{lora.EXPORT_NAME}")
    found = [path for path in exports if re.fullmatch(r"step\d+", path.parent.name)]
    if not found:
        raise UserError(
            f"{output_dir}: no trained LoRA in it (looked for */stepN/{lora.EXPORT_NAME}). "
            "Train first, or name what to use: inference.py --lora FILE, evaluate.py --edit FOLDER."
        )
    return max(found, key=lambda path: (age(path.parent.parent), int(path.parent.name.removeprefix("step"))))
