"""What evaluate.py calls: judge an edit, write evaluation.json and report.html, print the table."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch

from common.files import check_writable, write_json_atomic
from loraedit_ext import run as runs
from loraedit_ext.config import EvaluationSettings, RunConfig, load_config
from loraedit_ext.evaluation.judge import Evaluation, judge, table
from loraedit_ext.evaluation.report import write_report
from loraedit_ext.evaluation.subject import Files, Subject, from_edit, from_files, newest_edit
from loraedit_ext.training.tracking import summarise

RESULT = "evaluation.json"
FORMAT = 1
LIBRARIES = ("numpy", "opencv-python-headless", "torch", "transformers")


def evaluate_edit(config: RunConfig, config_path: Path, edit: Path | None, out: Path | None) -> Path:
    """Judge an edit of this project.

    Args:
        config: the run's config.
        config_path: where it came from, for the commands.
        edit: folder that inference.py wrote; default: what the newest LoRA made last.
        out: default: the edit's folder.

    Returns:
        The folder written to.
    """
    folder = edit or newest_edit(config)
    if not edit:
        print(f"edit      {folder}, made last; --edit FOLDER judges another", flush=True)
    check_writable(out or folder)
    subject = from_edit(config, folder)
    out = _evaluate(subject, config.evaluation, out or folder, commands_of(subject, config_path))
    values = json.loads((out / RESULT).read_text(encoding="utf-8"))["metrics"]
    found = {f"evaluation/{key}": value["value"] for key, value in values.items() if value["value"] is not None}
    if identity := summarise(subject.run, config.monitoring, found):
        print(f"wandb     {len(found)} numbers in the summary of run {identity}", flush=True)
    return out


def evaluate_files(files: Files, settings: EvaluationSettings, out: Path) -> Path:
    """Judge the output of any tool; returns the folder written to."""
    check_writable(out)
    return _evaluate(from_files(files), settings, out, [("evaluate", this_command())])


def _evaluate(
    subject: Subject, settings: EvaluationSettings, out: Path, commands: list[tuple[str, str]]
) -> Path:
    print(f"judging   {subject.name}: {len(subject.source)} frames, {subject.files['edited']}", flush=True)
    for note in subject.notes:
        print(f"note      {note}", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    evaluation = judge(subject, settings, device)
    write_json_atomic(out / RESULT, record(subject, evaluation))
    print(f"\n{table(evaluation)}\n", flush=True)
    for path in (out / RESULT, *write_report(out, subject, evaluation, commands)):
        print(f"wrote     {path}", flush=True)
    return out


def record(subject: Subject, evaluation: Evaluation) -> dict:
    """evaluation.json: numbers, and what they were computed from."""
    return {
        "format": FORMAT, "name": subject.name, "command": this_command(), "files": subject.files,
        "hashes": subject.hashes, "notes": list(subject.notes), "frames_judged": len(subject.source),
        "size": list(subject.source.shape[2:0:-1]), "versions": {name: version(name) for name in LIBRARIES},
        **evaluation.as_json(),
    }  # fmt: skip


def this_command() -> str:
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])


def commands_of(subject: Subject, config: Path) -> list[tuple[str, str]]:
    """(what it does, command) to make an edit of ours and its evaluation again."""
    assert subject.record is not None, "an edit of ours has its record"
    overrides = runs.overrides_of(subject.run, load_config(config)) if subject.run else []
    return [
        ("train", shlex.join(["deepspeed", "train.py", "--config", str(config), *overrides])),
        ("edit", shlex.join(subject.record["command"])),
        ("evaluate", this_command()),
    ]
