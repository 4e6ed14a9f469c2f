"""Many trials without a server: `python -m loraedit_ext.sweep sweep.toml`, one process and one GPU a trial.

Trials are the project's own commands with `key=value` overrides, on this machine or placed by Ray. What is done is not
done again, and a trial that fails leaves the others alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from common.errors import ErrorCollector, UserError
from common.files import placed
from common.progress import progress
from common.settings import Settings, load_settings, read_toml
from loraedit_ext import cli, sweep_results
from loraedit_ext.config import load_config
from loraedit_ext.evaluation.sweep_page import write_page
from loraedit_ext.optim import check_optimizer
from loraedit_ext.sweep_local import LocalEngine
from loraedit_ext.sweep_ray import RayEngine
from loraedit_ext.sweep_results import Trial, assignments

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
    """Trials at a time; default: one for each GPU, or one on a CPU (with Ray: one for each CPU)."""
    engine: Literal["local", "ray"] = "local"
    """`local`: this machine; `ray`: all hosts of a Ray cluster."""
    address: str | None = None
    """Of the Ray cluster: `host:port`; `auto` (default): the one that this host belongs to; `local`: of its own, here."""
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
        if self.address and self.engine != "ray":
            raise ValueError("`address` is that of a Ray cluster; set engine = 'ray', or leave it out")
        if (self.address or "").startswith("ray://"):
            raise ValueError("Ray Client (ray://) is not used; give host:port, and start the sweep on one of the hosts")
        if "output_dir" in (*self.parameters, *(override.partition("=")[0] for override in self.overrides)):
            raise ValueError("`output_dir` cannot vary: each trial gets its own in the sweep's; leave it out of `parameters` "
                             "and `overrides`")  # fmt: skip
        if self.evaluate and not self.edit:
            raise ValueError("evaluate = true needs edit = true; there is nothing to judge otherwise")
        return self


def _flatten(prefix: str, table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict) and not value.keys() & Range.model_fields.keys():
            yield from _flatten(f"{prefix}{key}.", value)
        else:
            yield f"{prefix}{key}", value


def load_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> SweepSettings:
    """Read sweep.toml; its paths are relative to it.

    Args:
        overrides: keys of it that the command line sets.

    Raises:
        UserError: anything that is wrong with it.
    """
    settings = load_settings(SweepSettings, path, read_toml(path) | dict(overrides or {}))
    base = path.resolve().parent
    return settings.model_copy(update={
        "configs": [_absolute(base, config) for config in settings.configs],
        "output_dir": _absolute(base, settings.output_dir),
    })  # fmt: skip


def _absolute(base: Path, path: Path) -> Path:
    return Path(os.path.normpath(placed(path, base)))


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
            check_optimizer(resolved.optimizer)
            if resolved.pipeline_stages > 1:
                raise UserError(f"{config}: pipeline_stages = {resolved.pipeline_stages}, but a trial is one process on "
                                "one GPU. Add \"pipeline_stages=1\" to the sweep's overrides.")
            trial = Trial.of(settings.output_dir, config, values, settings.overrides, resolved)
            trials.setdefault(trial.name, trial)
    errors.raise_if_any()
    return list(trials.values())


class Sweep:
    """Runs the trials that are not done, and keeps the table of results.

    Args:
        settings: with absolute paths.

    Raises:
        UserError: a trial or an engine that cannot be.
    """

    def __init__(self, settings: SweepSettings) -> None:
        self.settings = settings
        self.trials = plan_trials(settings)
        wanted = {"train": True, "inference": settings.edit, "evaluate": settings.evaluate}
        self.steps = [step for step, is_wanted in wanted.items() if is_wanted]

    def run(self) -> list[Trial]:
        """Run what is left; returns the trials that failed."""
        waiting = [trial for trial in self.trials if not set(self.steps) <= set(trial.record().get("done", []))]
        engine = open_engine(self.settings)
        print(f"sweep     {len(self.trials)} trials, {len(self.trials) - len(waiting)} done before; "
              f"{engine}; results in {self.settings.output_dir}", flush=True)
        with progress(len(waiting), "trials", unit="trial") as bar, closing(engine.run(waiting, self.steps)) as ended:
            for trial in ended:
                self._tell(trial)
                bar.update()
        entries = sweep_results.write(self.settings.output_dir, self.trials)
        write_page(self.settings.output_dir, entries)
        return [trial for trial in self.trials if trial.record().get("status") != "done"]

    def _tell(self, trial: Trial) -> None:
        record = trial.record()
        print(f"{record['status']:<9} {trial.name}", flush=True)
        if record["status"] == "failed":
            log = trial.log(record["failed"])
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
            print("\n".join([f"          {log}", *(f"          | {line}" for line in tail)]), flush=True)
        sweep_results.write(self.settings.output_dir, self.trials)


def open_engine(settings: SweepSettings) -> LocalEngine | RayEngine:
    """What places and runs the trials."""
    if settings.engine == "ray":
        return RayEngine(settings.address or "auto", settings.jobs)
    return LocalEngine(settings.jobs)


def run_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> list[Trial]:
    """Run or continue a sweep, print its table; returns the trials that failed."""
    settings = load_sweep(path, overrides)
    failed = Sweep(settings).run()
    print("\n" + (settings.output_dir / sweep_results.TABLE).read_text(encoding="utf-8"), flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Parse, run; 1 if a trial failed."""
    parser = argparse.ArgumentParser(description="Grid or random search over any keys and over several edit jobs.")
    parser.add_argument("sweep", type=cli.path, metavar="sweep.toml", help="what to vary (see examples/sweep.toml)")
    parser.add_argument("--engine", choices=["local", "ray"], help="instead of the one that sweep.toml names")
    parser.add_argument("--address", metavar="HOST:PORT", help="of the Ray cluster; also `auto`, or `local` for one's own")
    options = parser.parse_args(arguments)
    overrides = {key: value for key in ("engine", "address") if (value := getattr(options, key))}
    # As if by Ctrl-C, so that trials are ended too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed: list[Trial] = []
    status = cli.guarded(lambda: failed.extend(run_sweep(options.sweep, overrides)), traceback=False)
    return status or int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
