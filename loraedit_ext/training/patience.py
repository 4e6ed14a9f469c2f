"""Early stopping: how long the evaluation loss has not improved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence


class Patience:
    """Counts evaluations without a new best.

    Args:
        limit: evaluations to wait for one; None: for ever.
        regimes: whose losses are averaged.
        first: step from which evaluations count.
    """

    def __init__(self, limit: int | None, regimes: Sequence[str], first: int) -> None:
        self.limit, self.regimes, self.first = limit, regimes, first
        self.best, self.best_step, self.waited = math.inf, first, 0

    def replay(self, rows: Iterable[Mapping[str, float]]) -> None:
        """Take in the evaluations that a resumed run has behind it, from its metrics.jsonl."""
        for row in rows:
            if all(f"{regime}/loss" in row for regime in self.regimes):
                self.add(int(row["step"]), row)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Take in one evaluation."""
        if step < self.first:
            return
        loss = sum(values[f"{regime}/loss"] for regime in self.regimes) / len(self.regimes)
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1

    @property
    def exhausted(self) -> bool:
        return self.limit is not None and self.waited >= self.limit

    def __str__(self) -> str:
        return f"no better evaluation loss than {self.best:.5f} (step {self.best_step}) in {self.waited} evaluations"
