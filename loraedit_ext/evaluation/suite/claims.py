"""The paper's claims as numbers: paired differences over tasks, each with its bound and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraedit_ext.evaluation.suite.statistics import Estimate, estimate, paired
from loraedit_ext.evaluation.suite.tasks import SuiteTask

Where = Callable[[SuiteTask], bool]
VISIBLE_FAILURE = 1.0
"""dB in the edit region that we take for a visible difference; the paper gives no number."""


class Results:
    """All scores of a run of the benchmark.

    Args:
        tasks: the tasks that count.
        records: lines of the results file.
    """

    def __init__(self, tasks: Sequence[SuiteTask], records: Iterable[Mapping[str, Any]]) -> None:
        self.tasks = tasks
        self.records = list(records)
        self.methods = {record["method"] for record in self.records}

    def values(self, method: str, score: str, where: Where = lambda _: True) -> dict[str, list[float]]:
        """Scores of the seeds of each task; `score` may also be steps or seconds."""
        names = {task.name for task in self.tasks if where(task)}
        found: dict[str, list[float]] = {}
        for record in self.records:
            if record["method"] == method and record["task"] in names:
                value = record["scores"][score] if score in record["scores"] else record[score]
                found.setdefault(record["task"], []).append(float(value))
        return found

    def estimate(self, method: str, score: str, where: Where = lambda _: True) -> Estimate | None:
        """Mean and interval, or None where there is nothing."""
        found = self.values(method, score, where)
        return estimate(found) if found else None

    def difference(self, first: str, second: str, score: str, where: Where) -> Estimate | None:
        a, b = self.values(first, score, where), self.values(second, score, where)
        return paired(a, b) if a.keys() & b.keys() else None


@dataclass(frozen=True)
class Claim:
    """A statement, what was measured, and from which value on it holds."""

    statement: str
    found: Estimate | None
    bound: float

    @property
    def verdict(self) -> str:
        """shown: the whole interval is at or above the bound; likely: the mean is; refuted: the whole interval is below."""
        if self.found is None:
            return "not computed"
        if math.isnan(self.found.half_width):
            return "one task" if math.isfinite(self.found.mean) else "infinite"
        if self.found.low >= self.bound:
            return "shown"
        if self.found.high < self.bound:
            return "refuted"
        return "likely" if self.found.mean >= self.bound else "not shown"


def open_background(task: SuiteTask) -> bool:
    return task.open_background


def fixed_background(task: SuiteTask) -> bool:
    return not task.open_background


def seen_at_first(task: SuiteTask) -> bool:
    """The object is in view in the edited first frame, so that its look is known."""
    return task.motion != "emerging"


def hard(task: SuiteTask) -> bool:
    """Panning, rotating (in the plane or in depth) or disoccluding."""
    return task.panning or task.motion != "translating"


def claims(results: Results) -> list[Claim]:
    """The claims that the project makes, in the order of the method's parts."""
    difference = results.difference
    return [
        Claim("background: motion above naive, where the first frame leaves the background open (dB)",
              difference("motion", "naive", "preserved_psnr", open_background), 3.0),
        Claim("background: motion not below naive by more than 0.5 dB where nothing else moves (dB)",
              difference("motion", "naive", "preserved_psnr", fixed_background), -0.5),
        Claim("the LoRA is needed: motion above the masked condition without LoRA, edit region (dB)",
              difference("motion", "masked", "edit_psnr", lambda _: True), VISIBLE_FAILURE),
        *_carries_the_edit(results, "motion", "motion carries the edit"),
        *_carries_the_edit(results, "motion_guided", "with source guidance"),
        Claim("source guidance costs no more than 0.5 dB of the edit region (dB)",
              difference("motion_guided", "motion", "edit_psnr", lambda _: True), -0.5),
        Claim("references help: motion + appearance above motion, edit region of frames without reference (dB)",
              difference("appearance", "motion", "edit_psnr_unseen", lambda _: True), 3.0),
        Claim("the same against as many steps of motion alone (dB; needs `motion_long`)",
              difference("appearance", "motion_long", "edit_psnr_unseen", lambda _: True), 3.0),
        *_against_baselines(results),
    ]  # fmt: skip


def _carries_the_edit(results: Results, method: str, title: str) -> list[Claim]:
    return [
        Claim(f"{title}: edit region above naive's (dB)",
              results.difference(method, "naive", "edit_psnr", lambda _: True), 0.0),
        Claim(f"{title}: object nearer to the edit than to the source (dB)",
              results.estimate(method, "object_gain"), 0.0),
        Claim("the same, where the first frame shows the object (dB)",
              results.estimate(method, "object_gain", seen_at_first), 0.0),
    ]  # fmt: skip


def best_setting(results: Results) -> str:
    """The one of the method's settings that has the best edit region on the hard tasks."""
    scored = {
        method: found.mean for method in ("motion", "motion_guided", "appearance", "appearance_guided")
        if (found := results.estimate(method, "edit_psnr", hard))
    }
    return max(scored, key=lambda method: scored[method]) if scored else "appearance"


def _against_baselines(results: Results) -> list[Claim]:
    best = best_setting(results)
    return [
        Claim(f"{best} above {baseline}, edit region of panning, rotating and disoccluding tasks (dB)",
              results.difference(best, baseline, "edit_psnr", hard), 0.0)
        for baseline in ("source", "static_paste", "tracked_paste")
    ]  # fmt: skip
