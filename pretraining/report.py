"""Progress of a training run: a line with ETA on stdout now and then, every line in log.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor


class Reporter:
    """Averages metrics between lines and estimates the time left from this run's own pace."""

    def __init__(self, log: Path, step: int, steps: int, seconds: float = 20.0) -> None:
        self.log = log
        self.steps = steps
        self.seconds = seconds
        self.first = step
        self.started = self.last = time.monotonic()
        self.sums: dict[str, Tensor | float] = {}
        self.count = 0

    def step(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Take the metrics of a finished step; print when the interval has passed, which waits for those on a GPU."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        if time.monotonic() - self.last > self.seconds:
            self.note(step, {name: float(value) / self.count for name, value in self.sums.items()})
            self.sums, self.count, self.last = {}, 0, time.monotonic()

    def note(self, step: int, metrics: dict[str, float]) -> None:
        """Print and log one line."""
        elapsed = time.monotonic() - self.started
        left = elapsed / max(step - self.first, 1) * (self.steps - step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"step {step}/{self.steps}  {text}  elapsed {elapsed / 60:.1f} min  left {left / 60:.1f} min", flush=True)
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "seconds": round(elapsed, 1), **metrics}) + "\n")
