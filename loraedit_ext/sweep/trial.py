"""One trial of a sweep, step by step into its record; every engine runs its trials with it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import with_parent
from common.files import write_json_atomic
from loraedit_ext.sweep.results import RECORD, Trial
from loraedit_ext.training.state import LATEST

ROOT = Path(__file__).resolve().parents[2]


class TrialRun:
    """Runs what is left of a trial, each step a process with a log of its own.

    Args:
        trial: what to run.
        steps: verbs, in order; those that its record has as done are left out.
        environment: of the processes.
    """

    def __init__(self, trial: Trial, steps: Sequence[str], environment: Mapping[str, str]) -> None:
        self.trial = trial
        self.steps = steps
        self.environment = dict(environment)
        self._process: subprocess.Popen | None = None
        self._stopping = False
        self._lock = threading.Lock()

    def run(self) -> dict[str, Any]:
        """Run; returns the record, `status` being done, failed or interrupted."""
        before = self.trial.record()
        record = self.trial.facts() | {
            "done": before.get("done", []), "attempts": before.get("attempts", 0) + 1, "host": platform.node(),
            "pid": os.getpid(), "status": "running",
        }  # fmt: skip
        try:
            self._run_steps(record)
        except BaseException:
            write_json_atomic(self.trial.folder / RECORD, record | {"status": "interrupted"})
            raise
        if record["status"] == "running":
            record["status"] = "interrupted" if self._stopping else "done"
        write_json_atomic(self.trial.folder / RECORD, record)
        return record

    def _run_steps(self, record: dict[str, Any]) -> None:
        for step in self.steps:
            if step in record["done"]:
                continue
            write_json_atomic(self.trial.folder / RECORD, record)
            code = self._command(step)
            if self._stopping:
                return
            if code:
                record |= {"status": "failed", "failed": step, "exit_status": code}
                return
            record["done"] = [*record["done"], step]

    def stop(self) -> None:
        """End the step that runs, and start no other; may be called from any thread."""
        with self._lock:
            self._stopping = True
            if self._process:
                self._process.terminate()

    def _command(self, step: str) -> int:
        """Run one of the verbs to its log; its exit status."""
        trial = self.trial
        program = [sys.executable, str(ROOT / f"{step}.py"), "--config", str(trial.config), *trial.overrides()]
        if step == "train" and list(trial.runs.glob(f"*/{LATEST}")):
            program.append("resume_from_checkpoint=true")
        with open(trial.log(step), "w", encoding="utf-8") as log:
            with self._lock:
                if self._stopping:
                    return 0
                self._process = subprocess.Popen(
                    with_parent.command(program), stdout=log, stderr=subprocess.STDOUT, env=self.environment
                )
            try:
                # Never long in a system call: Ray interrupts a task between two lines of Python.
                while (code := self._poll()) is None:
                    pass
                return code
            except BaseException:
                self.stop()
                self._process.wait()
                raise

    def _poll(self) -> int | None:
        try:
            return self._process.wait(1)
        except subprocess.TimeoutExpired:
            return None
