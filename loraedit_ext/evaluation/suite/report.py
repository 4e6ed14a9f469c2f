"""What the benchmark leaves for people: tables and claims as Markdown, and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from loraedit_ext.evaluation.suite.claims import Claim, Results, Where
from loraedit_ext.evaluation.suite.methods import METHODS
from loraedit_ext.evaluation.suite.scores import BY_KEY, SCORES
from loraedit_ext.evaluation.suite.statistics import Estimate
from loraedit_ext.evaluation.suite.tasks import SuiteTask

GROUPS: dict[str, Where] = {
    "static": lambda task: not task.panning, "panning": lambda task: task.panning,
    "one object": lambda task: task.objects == 1, "several": lambda task: task.objects > 1,
    **{f"{kind}": (lambda task, kind=kind: task.motion == kind)
       for kind in ("translating", "rotating", "turning", "emerging")},
    **{f"{kind}": (lambda task, kind=kind: task.edit == kind) for kind in ("recolour", "retexture", "reshape")},
}  # fmt: skip
SHEET_FRAMES = (4, 9)
"""Frames on the contact sheet; none of them is a reference."""
MARGIN, LABEL, GREY = 4, 14, 200
"""Pixels between pictures, height of a line of writing, enlargement of a frame, and what is missing."""


def markdown(results: Results, found: Sequence[Claim], facts: Mapping[str, str]) -> str:
    """The whole of results.md."""
    parts = ["# Benchmark: edits of procedural scenes", "", *(f"- {name}: {text}" for name, text in facts.items())]
    parts += ["", "Mean over tasks of the means over seeds, with 95 % confidence intervals; frame 0 is left out. "
              "Learned methods before compositing.", "", *main_table(results)]  # fmt: skip
    for score in ("edit_psnr", "preserved_psnr", "object_gain"):
        parts += ["", f"## {BY_KEY[score].title} by kind of task", "", *group_table(results, score)]
    return "\n".join([*parts, "", "## Claims", "", *claims_table(found), ""])


def main_table(results: Results) -> list[str]:
    """One row a method."""
    rows = [
        [METHODS[method].title, *(cell(results.estimate(method, key), digits) for key, _, _, digits in columns())]
        for method in METHODS if method in results.methods
    ]
    return _table(["method", *(title for _, title, _, _ in columns())], rows)


def columns() -> list[tuple[str, str, str, int]]:
    """(key, title, which is better, digits) of every column of numbers."""
    scores = [(score.key, score.title, score.better, score.digits) for score in SCORES]
    return [*scores, ("steps", "LoRA steps", "", 0), ("seconds", "seconds", "lower", 1)]


def group_table(results: Results, score: str) -> list[str]:
    """One row a method, one column a kind of task."""
    digits = BY_KEY[score].digits
    rows = [
        [METHODS[method].title,
         *(cell(results.estimate(method, score, where), digits, interval=False) for where in GROUPS.values())]
        for method in METHODS if method in results.methods
    ]  # fmt: skip
    return _table(["method", *GROUPS], rows)


def claims_table(found: Sequence[Claim]) -> list[str]:
    rows = [[claim.statement, f"{claim.bound:g}", cell(claim.found, 2), claim.verdict] for claim in found]
    return _table(["claim", "at least", "found", "verdict"], rows)


def cell(value: Estimate | None, digits: int, interval: bool = True) -> str:
    """A number of the table; identical pictures have an infinite PSNR."""
    if value is None or math.isnan(value.mean):
        return "–"
    if math.isinf(value.mean):
        return "exact" if value.mean > 0 else "−∞"
    text = f"{value.mean:.{digits}f}"
    return text if not interval or not value.half_width > 0 else f"{text} ± {value.half_width:.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def contact_sheet(
    tasks: Sequence[SuiteTask], columns: Sequence[str], videos: Mapping[tuple[str, str], np.ndarray]
) -> np.ndarray:
    """Rows are tasks, columns source, truth and methods; two frames each that were no reference.

    Args:
        columns: titles from left to right.
        videos: uint8 (F, H, W, 3) by task name and column; what is missing stays grey.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = next(iter(videos.values())).shape[1:3]
    cell_height, cell_width = height + LABEL, width * len(SHEET_FRAMES) + MARGIN
    sheet = np.full((LABEL + len(tasks) * cell_height, len(columns) * cell_width, 3), 255, np.uint8)
    for column, title in enumerate(columns):
        _write(sheet, title, column * cell_width, 0)
        for row, task in enumerate(tasks):
            top, left = LABEL + row * cell_height, column * cell_width
            if column == 0:
                _write(sheet, task.name, left, top)
            picture = _cell_picture(videos.get((task.name, title)), height, width)
            sheet[top + LABEL : top + cell_height, left : left + cell_width - MARGIN] = picture
    return sheet


def _cell_picture(video: np.ndarray | None, height: int, width: int) -> np.ndarray:
    if video is None:
        return np.full((height, width * len(SHEET_FRAMES), 3), GREY, np.uint8)
    return np.concatenate([video[index] for index in SHEET_FRAMES], axis=1)


def _write(sheet: np.ndarray, text: str, left: int, top: int) -> None:
    cv2.putText(sheet, text, (left + 1, top + LABEL - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.35, (0, 0, 0), 1, cv2.LINE_AA)
