"""Many trials without a server: `python -m loraedit_ext.sweep sweep.toml`, one process and one GPU a trial.

Trials are the project's own commands with `key=value` overrides, on this machine or placed by Ray. What is done is not
done again, and a trial that fails leaves the others alone.
"""

from __future__ import annotations

import argparse
import itertools
import signal
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from common.errors import ErrorCollector, UserError
from common.progress import progress
from loraedit_ext import cli
from loraedit_ext.config import load_config
from loraedit_ext.sweep import results
from loraedit_ext.sweep.local_engine import LocalEngine
from loraedit_ext.sweep.page import write_page
from loraedit_ext.sweep.ray_engine import RayEngine
from loraedit_ext.sweep.results import Trial, assignments
from loraedit_ext.sweep.settings import SweepSettings, combinations, load_sweep
from loraedit_ext.training.optim import check_optimizer

LOG_TAIL = 5
"""Lines of a failed trial's log that the terminal shows."""


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
        entries = results.write(self.settings.output_dir, self.trials)
        write_page(self.settings.output_dir, entries)
        return [trial for trial in self.trials if trial.record().get("status") != "done"]

    def _tell(self, trial: Trial) -> None:
        record = trial.record()
        print(f"{record['status']:<9} {trial.name}", flush=True)
        if record["status"] == "failed":
            log = trial.log(record["failed"])
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL:]
            print("\n".join([f"          {log}", *(f"          | {line}" for line in tail)]), flush=True)
        results.write(self.settings.output_dir, self.trials)


def open_engine(settings: SweepSettings) -> LocalEngine | RayEngine:
    """What places and runs the trials."""
    if settings.engine == "ray":
        return RayEngine(settings.address or "auto", settings.jobs)
    return LocalEngine(settings.jobs)


def run_sweep(path: Path, overrides: Mapping[str, Any] | None = None) -> list[Trial]:
    """Run or continue a sweep, print its table; returns the trials that failed."""
    settings = load_sweep(path, overrides)
    failed = Sweep(settings).run()
    print("\n" + (settings.output_dir / results.TABLE).read_text(encoding="utf-8"), flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Parse, run; 1 if a trial failed."""
    parser = argparse.ArgumentParser(
        "python -m loraedit_ext.sweep", description="Grid or random search over any keys and over several edit jobs."
    )
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
