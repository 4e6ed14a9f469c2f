"""Many trials without a server: `python -m loraedit_ext.sweep sweep.toml`, one process and one GPU a trial.

Trials are the project's own commands with `key=value` overrides. What is done is not done again, and a trial that
fails leaves the others alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from common.errors import ErrorCollector, UserError
from common.files import write_json_atomic
from common.progress import progress
from common.settings import Settings, load_settings, read_toml
from loraedit_ext import cli, sweep_results
from loraedit_ext.config import load_config
from loraedit_ext.evaluation.sweep_page import write_page
from loraedit_ext.state import LATEST
from loraedit_ext.sweep_results import RECORD, Trial, assignments

ROOT = Path(__file__).resolve().parents[1]
LOG_TAIL = 5
"""Lines of a failed trial's log that the terminal shows."""


class Range(Settings):
    """Where a random search draws a number from."""

    min: float
    max: float
    log: bool = False
    """Evenly over the logarithm."""
    whole: bool = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min >= self.max or (self.log and self.min <= 0):
            raise ValueError("needs min < max, and min > 0 with log = true")
        return self

    def draw(self, chance: random.Random) -> float | int:
        low, high = (math.log(self.min), math.log(self.max)) if self.log else (self.min, self.max)
        value = chance.uniform(low, high)
        value = math.exp(value) if self.log else value
        return round(value) if self.whole else float(f"{value:.4g}")


class SweepSettings(Settings):
    """sweep.toml: which runs to vary, and how."""

    configs: list[Path] = Field(min_length=1)
    """Run TOMLs, one for each edit job; every combination is tried on each."""
    output_dir: Path
    """Trials and the table of results."""
    method: Literal["grid", "random"] = "grid"
    trials: int | None = Field(None, ge=1)
    """Random search: combinations to draw."""
    seed: int = 0
    """Of the random search."""
    jobs: int | None = Field(None, ge=1)
    """Trials at a time; default: one for each GPU, or one on a CPU."""
    edit: bool = True
    """Run inference.py after the training."""
    evaluate: bool = True
    """Run evaluate.py after that."""
    overrides: list[str] = []
    """`key=value` for all trials."""
    parameters: dict[str, list[Any] | Range]
    """Key of the run's TOML to the values of a grid, or to a list or { min, max } of a random search."""

    @field_validator("parameters", mode="before")
    @classmethod
    def _flat(cls, values: Any) -> Any:
        """`optimizer.lr` without quotes is a nested table in TOML; it means the same here."""
        return dict(_flatten("", values)) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _consistent(self) -> SweepSettings:
        ranges = [key for key, choice in self.parameters.items() if isinstance(choice, Range)]
        if self.method == "grid" and (ranges or self.trials):
            found = f"`{ranges[0]}` is a range" if ranges else "`trials` is set"
            raise ValueError(f"a grid tries every listed value, but {found}; set method = 'random'")
        if self.method == "random" and self.trials is None:
            raise ValueError("a random search needs `trials`, the number of combinations to draw")
        if empty := [key for key, choice in self.parameters.items() if choice == []]:
            raise ValueError(f"`parameters.{empty[0]}` lists no value")
        if self.evaluate and not self.edit:
            raise ValueError("evaluate = true needs edit = true; there is nothing to judge otherwise")
        return self


def _flatten(prefix: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and not value.keys() & Range.model_fields.keys():
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def load_sweep(path: Path) -> SweepSettings:
    """Read sweep.toml; its paths are relative to it.

    Raises:
        UserError: anything that is wrong with it.
    """
    settings = load_settings(SweepSettings, path, read_toml(path))
    base = path.resolve().parent
    return settings.model_copy(update={
        "configs": [_absolute(base, config) for config in settings.configs],
        "output_dir": _absolute(base, settings.output_dir),
    })  # fmt: skip


def _absolute(base: Path, path: Path) -> Path:
    return Path(os.path.normpath(base / path.expanduser()))


def combinations(settings: SweepSettings) -> list[dict[str, Any]]:
    """What each trial of a job sets, the same for every job."""
    if settings.method == "grid":
        values = [list(choice) for choice in settings.parameters.values() if isinstance(choice, list)]
        return [dict(zip(settings.parameters, chosen, strict=True)) for chosen in itertools.product(*values)]
    chance = random.Random(settings.seed)
    return [
        {key: choice.draw(chance) if isinstance(choice, Range) else chance.choice(choice)
         for key, choice in settings.parameters.items()}
        for _ in range(settings.trials or 0)
    ]  # fmt: skip


def plan_trials(settings: SweepSettings) -> list[Trial]:
    """All trials, each checked as far as its configuration goes, before any is started.

    Raises:
        UserError: an override that no run accepts, or a run that needs several processes.
    """
    errors = ErrorCollector()
    trials: dict[str, Trial] = {}
    for config, values in itertools.product(settings.configs, combinations(settings)):
        with errors.catch():
            resolved = load_config(config, [*settings.overrides, *assignments(values)])
            if resolved.pipeline_stages > 1:
                raise UserError(f"{config}: pipeline_stages = {resolved.pipeline_stages}, but a trial is one process on "
                                "one GPU. Add \"pipeline_stages=1\" to the sweep's overrides.")
            trial = Trial.of(settings.output_dir, config, values, settings.overrides, resolved)
            trials.setdefault(trial.name, trial)
    errors.raise_if_any()
    return list(trials.values())


def slots(settings: SweepSettings) -> list[str | None]:
    """One entry for each trial that may run at a time: the GPU it sees, or None on a CPU.

    Raises:
        UserError: more trials at a time than GPUs.
    """
    gpus = _gpus()
    if not gpus:
        return [None] * (settings.jobs or 1)
    if settings.jobs and settings.jobs > len(gpus):
        raise UserError(f"jobs = {settings.jobs}, but there are {len(gpus)} GPUs, and a trial takes one of its own.")
    return list(gpus[: settings.jobs])


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name for name in (visible or "").split(",") if name]
    count = torch.cuda.device_count()
    return named[:count] if visible is not None else [str(index) for index in range(count)]


class Sweep:
    """Runs the trials that are not done, and keeps the table of results.

    Args:
        settings: with absolute paths.
    """

    def __init__(self, settings: SweepSettings) -> None:
        self.settings = settings
        self.trials = plan_trials(settings)
        self.slots = slots(settings)
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for slot in self.slots:
            self._free.put(slot)
        self._running: set[subprocess.Popen] = set()
        self._stopping = False

    def run(self) -> list[Trial]:
        """Run what is left; returns the trials that failed."""
        waiting = [trial for trial in self.trials if not self._is_done(trial)]
        print(f"sweep     {len(self.trials)} trials, {len(self.trials) - len(waiting)} done before; "
              f"{len(self.slots)} at a time; results in {self.settings.output_dir}", flush=True)
        pool = ThreadPoolExecutor(len(self.slots))
        try:
            futures = {pool.submit(self._run_trial, trial): trial for trial in waiting}
            with progress(len(waiting), "trials", unit="trial") as bar:
                for future in as_completed(futures):
                    self._tell(futures[future], future)
                    bar.update()
        finally:
            self._stopping = True
            for process in list(self._running):
                process.terminate()
            pool.shutdown(cancel_futures=True)
        entries = sweep_results.write(self.settings.output_dir, self.trials)
        write_page(self.settings.output_dir, entries)
        return [trial for trial in self.trials if trial.record().get("status") != "done"]

    def _steps(self) -> list[str]:
        wanted = {"train": True, "inference": self.settings.edit, "evaluate": self.settings.evaluate}
        return [step for step, is_wanted in wanted.items() if is_wanted]

    def _is_done(self, trial: Trial) -> bool:
        return set(self._steps()) <= set(trial.record().get("done", []))

    def _run_trial(self, trial: Trial) -> None:
        gpu = self._free.get()
        try:
            record = trial.facts() | {"done": trial.record().get("done", []), "status": "running"}
            for step in self._steps():
                if step in record["done"] or self._stopping:
                    continue
                write_json_atomic(trial.folder / RECORD, record)
                code = self._command(trial, step, gpu)
                if code:
                    record |= {"status": "failed", "failed": step, "exit_status": code}
                    break
                record["done"] = [*record["done"], step]
            if self._stopping:
                record["status"] = "interrupted"
            elif record["status"] == "running":
                record["status"] = "done"
            write_json_atomic(trial.folder / RECORD, record)
        finally:
            self._free.put(gpu)

    def _command(self, trial: Trial, step: str, gpu: str | None) -> int:
        """Run one of the verbs to its log; its exit status."""
        command = [sys.executable, str(ROOT / f"{step}.py"), "--config", str(trial.config), *trial.overrides()]
        if step == "train" and list(trial.runs.glob(f"*/{LATEST}")):
            command.append("resume_from_checkpoint=true")
        environment = dict(os.environ)
        if gpu is None:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(self.slots))))
        else:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with open(trial.log(step), "w", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            self._running.add(process)
            try:
                return process.wait()
            finally:
                self._running.discard(process)

    def _tell(self, trial: Trial, future: Future) -> None:
        future.result()
        record = trial.record()
        print(f"{record['status']:<9} {trial.name}", flush=True)
        if record["status"] == "failed":
            log = trial.log(record["failed"])
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
            print("\n".join([f"          {log}", *(f"          | {line}" for line in tail)]), flush=True)
        sweep_results.write(self.settings.output_dir, self.trials)


def run_sweep(path: Path) -> list[Trial]:
    """Run or continue a sweep, print its table; returns the trials that failed."""
    settings = load_sweep(path)
    failed = Sweep(settings).run()
    print("\n" + (settings.output_dir / sweep_results.TABLE).read_text(encoding="utf-8"), flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Parse, run; 1 if a trial failed."""
    parser = argparse.ArgumentParser(description="Grid or random search over any keys and over several edit jobs.")
    parser.add_argument("sweep", type=Path, metavar="sweep.toml", help="what to vary (see examples/sweep.toml)")
    options = parser.parse_args(arguments)
    # As if by Ctrl-C, so that trials are ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: list[Trial] = []
    status = cli.guarded(lambda: failed.extend(run_sweep(options.sweep)), traceback=False)
    return status or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
