"""What the comparisons that train a LoRA for each task share: their options, and tables over tasks that grow as they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from common.files import write_text_atomic
from loraedit_ext.evaluation.suite.settings import SuiteSettings
from loraedit_ext.evaluation.suite.tasks import SuiteTask, chosen

Row = TypeVar("Row")
Scores = TypeVar("Scores")
BUDGET = SuiteSettings().budget
"""Steps as the benchmark has them."""


def compare(
    description: str | None, name: str, run_task: Callable[[SuiteTask, Path, Path, int], Iterable[tuple[Row, Scores]]],
    table: Callable[[dict[Row, dict[str, Scores]]], str],
) -> None:
    """Run every task, and write OUT/NAME.md after each.

    Args:
        description: of the command, for its help.
        name: of the results folder and of the table.
        run_task: task, results folder, checkpoint and seed to the rows and their scores.
        table: scores by row and name of the task to Markdown.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="results folder; run again to go on")
    parser.add_argument("--checkpoint", type=Path, default=Path("checkpoints/tiny-wan-i2v"))
    parser.add_argument("--tasks", default="validation", help="list of tasks, or the name of one")
    parser.add_argument("--seed", type=int, default=0, help="of training and of the edits' noise")
    options = parser.parse_args()
    found: dict[Row, dict[str, Scores]] = {}
    written = options.out / f"{name}.md"
    for task in chosen(options.tasks):
        for row, scores in run_task(task, options.out, options.checkpoint, options.seed):
            found.setdefault(row, {})[task.name] = scores
        write_text_atomic(written, table(found))
    print(table(found), f"wrote     {written}", sep="\n")
