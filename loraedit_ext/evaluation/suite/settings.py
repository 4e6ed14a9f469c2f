"""Settings of the benchmark: overrides `suite.KEY=value` of `evaluate.py --suite scenes`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import Field, field_validator

from common.errors import UserError
from common.settings import Settings, load_settings
from loraedit_ext.config import apply_override
from loraedit_ext.evaluation.suite.methods import DEFAULT_METHODS, METHODS, Budget

QUICK = {"tasks": "quick", "seeds": [0]}
"""What `--quick` sets unless an override says otherwise. Its results are part of the whole benchmark's."""


class SuiteSettings(Settings):
    """[suite]: what the benchmark runs."""

    checkpoint: Path = Path("checkpoints/tiny-wan-i2v")
    """Folder of the model, relative to the current folder."""
    tasks: str | list[str] = "benchmark"
    """`benchmark`, `replication` (24 others), `both`, `validation` (for choosing defaults), `quick`, or names of tasks."""
    methods: list[str] = list(DEFAULT_METHODS)
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Each seeds the LoRA's training and the noise of the edit."""
    steps: int = Field(150, ge=1)
    """Of the naive and of the motion stage."""
    appearance_steps: int = Field(150, ge=1)
    """Of the appearance stage, behind the motion stage."""
    appearance_share: float = Field(0.9, gt=0, le=1)
    """Of the appearance stage's steps; the rest is motion."""
    source_guidance: float = Field(2.0, gt=1)
    """`edit.source_guidance` of the methods that have it."""
    report_only: bool = False
    """Tables of what the results folder has; nothing is computed."""
    jobs: int | None = Field(None, ge=1)
    """Processes side by side, dealt out over the GPUs if there are any. Default: one a core."""

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        if unknown := [name for name in methods if name not in METHODS]:
            raise ValueError(f"no method `{unknown[0]}`; there are: {', '.join(METHODS)}")
        return methods

    @property
    def processes(self) -> int:
        return self.jobs or os.cpu_count() or 1

    @property
    def budget(self) -> Budget:
        return Budget(self.steps, self.appearance_steps, self.appearance_share, self.source_guidance)


def load_suite(overrides: Iterable[str], quick: bool = False) -> tuple[SuiteSettings, list[str]]:
    """The settings, and the overrides that are left for every run's TOML.

    Raises:
        UserError: an override is unknown or of the wrong type, or sets what the methods themselves set.
    """
    values: dict = {"suite": dict(QUICK) if quick else {}}
    rest = []
    for override in overrides:
        if override.startswith("suite."):
            apply_override(values, override)
        elif override.startswith(("stage", "edit.condition", "edit.seed", "seed", "model.ckpt_path", "output_dir",
                                  "dataset")):  # fmt: skip
            raise UserError(f"override `{override}`: the benchmark sets this itself; see suite.steps, suite.seeds, "
                            "suite.checkpoint and --out.")  # fmt: skip
        elif override.startswith("model.expert"):
            raise UserError(f"override `{override}`: the benchmark edits with one transformer, and Wan2.2 needs two. "
                            "Use a Wan2.1 checkpoint.")  # fmt: skip
        else:
            rest.append(override)
    return load_settings(SuiteSettings, Path("command line"), values["suite"]), rest
