"""Means and confidence intervals over tasks. Seeds of one task are averaged first: they are no new tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks with its confidence interval."""

    mean: float
    half_width: float
    """Of the 95 % interval by Student's t; nan for fewer than two tasks or infinite values."""
    tasks: int

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def signed(self) -> str:
        """As a change: with its sign, and the interval."""
        return f"{self.mean:+.2f} ± {self.half_width:.2f}"

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def estimate(by_task: Mapping[str, Sequence[float]]) -> Estimate:
    """Mean over tasks of the means over seeds.

    Raises:
        ValueError: there is no task.
    """
    if not by_task:
        raise ValueError("an estimate needs at least one task")
    means = np.array([np.mean(values) for values in by_task.values()])
    count = len(means)
    if count < 2 or not np.isfinite(means).all():
        return Estimate(float(means.mean()), math.nan, count)
    return Estimate(float(means.mean()), t_quantile(count - 1) * float(means.std(ddof=1)) / math.sqrt(count), count)


def paired(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> Estimate:
    """first - second on the tasks that both have.

    Raises:
        ValueError: they share no task.
    """
    shared = [task for task in first if task in second]
    return estimate({task: [float(np.mean(first[task]) - np.mean(second[task]))] for task in shared})


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % quantile of Student's t, by integrating its density over x = sqrt(degrees) tan(angle).

    In that variable the density is cos(angle)^(degrees - 1), which is smooth and has no tail.
    """
    angle = np.linspace(0, np.pi / 2, 200_001)
    weight = np.cos(angle) ** (degrees - 1)
    share = np.concatenate([[0.0], np.cumsum(weight[1:] + weight[:-1])])
    return math.sqrt(degrees) * math.tan(float(np.interp(CONFIDENCE, share / share[-1], angle)))
