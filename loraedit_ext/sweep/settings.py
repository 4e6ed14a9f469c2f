"""sweep.toml, closed and typed: which runs to vary, and how."""

from __future__ import annotations

import itertools
import math
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from common.files import placed
from common.settings import Settings, load_settings, read_toml


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
