"""A run's folder: made once, found again by resume and by inference."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path

from common.errors import UserError
from common.files import write_json_atomic
from loraedit_ext import lora, state
from loraedit_ext.config import RunConfig

CONFIG_COPY = "config.json"


def create(output_dir: Path) -> Path:
    """A new folder named by UTC time, as diffusion-pipe does."""
    folder = output_dir / datetime.now(UTC).strftime("%Y%m%d_%H-%M-%S")
    suffix = 1
    while folder.exists():
        suffix += 1
        folder = folder.with_name(f"{folder.name.split('_v')[0]}_v{suffix}")
    folder.mkdir(parents=True)
    return folder


def to_resume(config: RunConfig) -> Path | None:
    """The full state to resume from, or None for a new run.

    `resume_from_checkpoint` is true (the newest run in output_dir that has a state), the name or path of a run, or of
    one of its `global_stepN`.
    """
    wanted = config.resume_from_checkpoint
    if not wanted:
        return None
    if wanted is True:
        runs = sorted(path.parent for path in config.output_dir.glob(f"*/{state.LATEST}"))
        if not runs:
            raise UserError(f"{config.output_dir}: no run to resume in it: no folder holds a file `{state.LATEST}`.")
        return state.find(runs[-1])
    folder = Path(wanted) if Path(wanted).is_dir() else config.output_dir / str(wanted)
    return folder if (folder / "state.json").is_file() else state.find(folder)


def write_config(folder: Path, config: RunConfig, job_fields: dict) -> None:
    """The resolved configuration and what became of the job; holds no secret, because none is accepted."""
    write_json_atomic(folder / CONFIG_COPY, {"config": config.model_dump(mode="json"), "job": job_fields})


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
            "Train first, or give --lora FILE."
        )
    return max(found, key=lambda path: (path.parent.parent.name, int(path.parent.name.removeprefix("step"))))
