"""Trials of a sweep and their results: one JSON and one table with everything that was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import hash_file, hash_json, write_json_atomic, write_text_atomic
from loraedit_ext import run as runs
from loraedit_ext.config import RunConfig
from loraedit_ext.editing import results
from loraedit_ext.training import tracking

RECORD, RESULTS, TABLE = "trial.json", "results.json", "results.md"
EVALUATION = "evaluation.json"
FORMAT = 1
SHOWN = 4
"""Significant digits in the table; results.json has all."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: a run TOML and what is set in it."""

    folder: Path
    config: Path
    values: Mapping[str, Any]
    """The sweep's parameters."""
    common: tuple[str, ...]
    """Overrides that all trials share."""

    @classmethod
    def of(
        cls, output_dir: Path, config: Path, values: Mapping[str, Any], common: Sequence[str], resolved: RunConfig
    ) -> Trial:
        """A trial whose folder is named by its content: what is done is found again, and a changed TOML is new.

        Args:
            resolved: `config` with everything set; decides, with the text of the job's TOML.
        """
        job = hash_file(resolved.dataset) if resolved.dataset.is_file() else ""
        digest = hash_json([resolved.model_dump(mode="json", exclude={"output_dir"}), job])[:10]
        return cls(output_dir / "trials" / f"{config.parent.name}-{config.stem}-{digest}", config, values,
                   tuple(common))

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def runs(self) -> Path:
        """`output_dir` of its run."""
        return self.folder / "runs"

    def log(self, step: str) -> Path:
        return self.folder / f"{step}.log"

    def overrides(self) -> list[str]:
        """`key=value` for the verbs."""
        return [*self.common, *assignments(self.values), f"output_dir={self.runs}"]

    def facts(self) -> dict[str, Any]:
        """What it is, without what became of it."""
        return {"name": self.name, "config": str(self.config), "values": dict(self.values),
                "overrides": list(self.common)}

    def record(self) -> dict[str, Any]:
        """What became of it so far; empty before it was started.

        Raises:
            UserError: the record cannot be read.
        """
        path = self.folder / RECORD
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}). Remove the folder to run the trial again.") from error


def assignments(values: Mapping[str, Any]) -> list[str]:
    """Values as `key=value`, in a spelling that `config.parse_value` reads back as the same value."""
    return [f"{key}={value!r}" for key, value in values.items()]


def result(trial: Trial) -> dict[str, Any]:
    """One trial's entry in results.json: what was set, what came out, where it lies."""
    record = trial.record()
    status = record.get("status", "waiting")
    entry = trial.facts() | {"status": status, "log": None, "run": None, "edit": None, "metrics": {}}
    if status == "failed":
        entry["log"] = str(trial.log(record["failed"]))
    if "train" in record.get("done", []):
        adapter = runs.newest_lora(trial.runs)
        entry["run"], entry["edit"] = str(adapter.parent.parent), str(_edit_of(adapter))
        entry["metrics"] = measured(adapter)
    return entry


def measured(adapter: Path) -> dict[str, float]:
    """The last logged losses of a LoRA's run, and the metrics of its edit where it was judged."""
    found: dict[str, float] = {}
    for row in tracking.history(adapter.parent.parent):
        found |= {key: value for key, value in row.items() if key.endswith("/loss")}
        found["steps"] = row["step"]
    judged = _edit_of(adapter) / EVALUATION
    if judged.is_file():
        values = json.loads(judged.read_text(encoding="utf-8"))["metrics"]
        found |= {key: value["value"] for key, value in values.items() if value["value"] is not None}
    return found


def _edit_of(adapter: Path) -> Path:
    """The folder of what a LoRA made last, or will make."""
    return (results.all_beside(adapter) or [adapter.parent / results.FOLDER])[-1]


def write(output_dir: Path, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Write results.json and results.md; returns the entries."""
    entries = [result(trial) for trial in trials]
    write_json_atomic(output_dir / RESULTS, {"format": FORMAT, "trials": entries})
    write_text_atomic(output_dir / TABLE, table(entries))
    return entries


def columns(entries: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(parameters, tracking) that any entry has, in the order of their first mention."""
    parameters = dict.fromkeys(key for entry in entries for key in entry["values"])
    measures = dict.fromkeys(key for entry in entries for key in entry["metrics"])
    return list(parameters), list(measures)


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as a markdown table, one line a trial."""
    parameters, measures = columns(entries)
    lines = ["| " + " | ".join(["trial", "status", *parameters, *measures]) + " |",
             "|" + "---|" * (2 + len(parameters) + len(measures))]
    for entry in entries:
        cells = [entry["name"], entry["status"], *(text(entry["values"].get(key)) for key in parameters),
                 *(text(entry["metrics"].get(key)) for key in measures)]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def text(value: Any) -> str:
    """A value in a cell; nothing where there is none."""
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.{SHOWN}g}"
    return "" if value is None else str(value)
