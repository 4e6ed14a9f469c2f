"""The benchmark as one HTML page: sortable tables, and each task's source, truth and results playing side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_text_atomic
from loraedit_ext.evaluation.pages import Film, environment, place_films
from loraedit_ext.evaluation.suite.claims import Claim, Results
from loraedit_ext.evaluation.suite.methods import METHODS
from loraedit_ext.evaluation.suite.report import GREY, MARGIN, cell, columns
from loraedit_ext.evaluation.suite.statistics import Estimate
from loraedit_ext.evaluation.suite.tasks import SuiteTask

PAGE, TEMPLATE, VIDEOS = "results.html", "suite.html.j2", "results_videos"
FPS = Fraction(8)
CRF = 16
"""Of films that are small and whose colours are what one compares."""
ARROWS = {"higher": "↑", "lower": "↓"}


def write_page(
    folder: Path, results: Results, found: Sequence[Claim], facts: Mapping[str, str], shown: Sequence[str],
    videos: Mapping[tuple[str, str], np.ndarray],
) -> Path:
    """Write results.html; the videos are part of it, or beside it if they are too large together.

    Args:
        found: the claims.
        facts: what the results are of, by name.
        shown: columns of the videos: source, truth and methods.
        videos: uint8 (F, H, W, 3) by task name and column; what is missing is grey.
    """
    height, width = next(iter(videos.values())).shape[1:3]
    films = place_films(folder, VIDEOS, (
        (task.name, Film(side_by_side([videos.get((task.name, title)) for title in shown], (height, width)), FPS, CRF))
        for task in results.tasks
    ))  # fmt: skip
    page = environment(Path(__file__).parent).get_template(TEMPLATE).render(
        facts=facts, films=films, shown=shown, width=len(shown) * (width + MARGIN), height=height,
        columns=[(title, ARROWS.get(better, "")) for _, title, better, _ in columns()],
        means=[(METHODS[method].title, _cells(results, method)) for method in METHODS if method in results.methods],
        claims=[(claim, _sortable(claim.found), cell(claim.found, 2)) for claim in found],
        rows=list(task_rows(results)),
    )  # fmt: skip
    write_text_atomic(folder / PAGE, page)
    return folder / PAGE


def side_by_side(videos: Sequence[np.ndarray | None], size: tuple[int, int]) -> np.ndarray:
    """One film of many.

    Args:
        videos: uint8 (F, H, W, 3) each, or None for grey.
        size: height and width of each.

    Returns:
        uint8 (F, H, columns * (W + MARGIN), 3).
    """
    frames = max(len(video) for video in videos if video is not None)
    height, width = size
    film = np.full((frames, height, len(videos) * (width + MARGIN), 3), 255, np.uint8)
    for column, video in enumerate(videos):
        left = column * (width + MARGIN)
        film[:, :, left : left + width] = GREY if video is None else video
    return film


def task_rows(results: Results) -> Iterator[tuple[SuiteTask, str, list[tuple[Any, str]]]]:
    """(task, title of the method, cells), methods in the order of the table."""
    for task in results.tasks:
        for method in (method for method in METHODS if method in results.methods):
            cells = _cells(results, method, task)
            if any(shown != cell(None, 0) for _, shown in cells):
                yield task, METHODS[method].title, cells


def _cells(results: Results, method: str, only: SuiteTask | None = None) -> list[tuple[Any, str]]:
    """(value to sort by, text) of each column, over all tasks or one."""
    cells = []
    for key, _, _, digits in columns():
        value = results.estimate(method, key, lambda task: only is None or task == only)
        cells.append((_sortable(value), cell(value, digits)))
    return cells


def _sortable(value: Estimate | None) -> float | None:
    return None if value is None or math.isnan(value.mean) else value.mean
