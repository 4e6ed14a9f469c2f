"""One HTML page that shows an edit: videos side by side, metrics, loss curve, configuration, commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from markupsafe import Markup

from common.files import write_text_atomic
from common.progress import progress
from loraedit_ext.evaluation.catalogue import BY_KEY
from loraedit_ext.evaluation.charts import Series, line_chart
from loraedit_ext.evaluation.judge import Evaluation
from loraedit_ext.evaluation.pages import Film, environment, place_films
from loraedit_ext.evaluation.subject import Subject
from loraedit_ext.run import CONFIG_COPY
from loraedit_ext.training.tracking import history

PAGE, TEMPLATE, VIDEOS = "report.html", "report.html.j2", "report_videos"
GAIN = 4
CRF = 18
OVERLAY = (255, 0, 80)


@dataclass(frozen=True)
class Panel:
    """One video of the page."""

    slug: str
    title: str
    caption: str
    frames: np.ndarray
    """uint8 (F, H, W, 3)."""


def panels(subject: Subject) -> list[Panel]:
    """What is shown side by side, in reading order."""
    shown = [
        Panel("source", "Source", "as the edit was made from", subject.source),
        Panel("mask", "Mask", "tinted: the region that may change", overlay(subject.source, subject.preserve)),
        Panel("result", "Result", "as written, after compositing and video coding", subject.edited),
    ]
    made = subject.generated
    if made is not None:
        shown.append(Panel("generated", "Before compositing", "what the model made, background too", made.video))
    if subject.truth is not None:
        shown.append(Panel("truth", "Ground truth", "what the edit should be", subject.truth))
    judged, name = (subject.result, "result") if made is None else (made, "model's output")
    shown.append(Panel("difference", f"Difference ×{GAIN}", f"{name} from source; outlined: the region",
                       difference(judged.video, judged.source, judged.preserve)))
    return shown


def overlay(video: np.ndarray, preserve: np.ndarray) -> np.ndarray:
    """The region tinted and outlined: uint8 (F, H, W, 3)."""
    out = video.copy()
    for frame, mask in zip(out, preserve, strict=True):
        frame[~mask] = np.rint(0.55 * frame[~mask] + 0.45 * np.array(OVERLAY)).astype(np.uint8)
        _outline(frame, mask)
    return out


def difference(video: np.ndarray, source: np.ndarray, preserve: np.ndarray) -> np.ndarray:
    """Largest difference of a channel, amplified, on a dark-to-bright scale, the region outlined."""
    out = np.empty_like(video)
    for index, (frame, original, mask) in enumerate(zip(video, source, preserve, strict=True)):
        error = np.abs(frame.astype(np.int16) - original).max(-1)
        colours = cv2.applyColorMap(np.clip(GAIN * error, 0, 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
        out[index] = colours[..., ::-1]
        _outline(out[index], mask)
    return out


def _outline(frame: np.ndarray, mask: np.ndarray) -> None:
    contours, _ = cv2.findContours((~mask).astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(frame, contours, -1, (255, 255, 255), 1)


def write_report(
    folder: Path, subject: Subject, evaluation: Evaluation, commands: Sequence[tuple[str, str]]
) -> list[Path]:
    """Write report.html, and videos beside it if they are too large to be part of it.

    Args:
        folder: exists or is made.
        commands: (what it does, command line), in the order to run them.

    Returns:
        The files and folders written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shown = panels(subject)
    with progress(len(shown), "videos of the report", unit="video") as bar:
        sources = place_films(folder, VIDEOS, _films(shown, subject.fps, bar.update))
    page = environment().get_template(TEMPLATE).render(
        subject=subject, evaluation=evaluation, panels=[(panel, sources[panel.slug]) for panel in shown],
        frames=len(subject.source), size=subject.source.shape[2:0:-1], fps=float(subject.fps),
        coverage=100 * float((~subject.preserve).mean()), groups=_groups(evaluation),
        loss=loss_chart(subject.run), charts=frame_charts(evaluation), commands=commands, worst=worst(evaluation),
        config=json.dumps(subject.record["config"], indent=2) if subject.record else "",
        facts=_facts(subject, evaluation), json=evaluation.as_json(),
    )  # fmt: skip
    write_text_atomic(folder / PAGE, page)
    return [path for path in (folder / PAGE, folder / VIDEOS) if path.exists()]


def _films(shown: Sequence[Panel], fps: Fraction, done: Callable[[], object]) -> Iterator[tuple[str, Film]]:
    for panel in shown:
        yield panel.slug, Film(panel.frames, fps, CRF)
        done()


def _groups(evaluation: Evaluation) -> list[tuple[str, list[Any]]]:
    return [(group, list(values)) for group, values in groupby(evaluation.values, lambda v: v.metric.group)]


def loss_chart(run: Path | None) -> Markup | None:
    """Training and evaluation losses from the run's metrics.jsonl, or None where there are none."""
    if run is None or not (rows := history(run)):
        return None
    series = [_column(rows, "train/loss", Series("training loss, each step", [], [], faint=True))]
    regimes = sorted({key.removesuffix("/loss") for row in rows for key in row if key.endswith("/loss")} - {"train"})
    for colour, regime in enumerate(regimes, 1):
        blank = Series(f"{regime}: mean over fixed noise levels", [], [], dots=True, colour=colour)
        series.append(_column(rows, f"{regime}/loss", blank))
    series = [line for line in series if any(map(math.isfinite, line.ys))]
    return line_chart(series, "step", "loss", _stages(run / CONFIG_COPY)) if series else None


def _stages(config: Path) -> list[tuple[float, str]]:
    """(step, name) where each configured stage begins."""
    stages = json.loads(config.read_text(encoding="utf-8"))["config"]["stage"] if config.is_file() else []
    steps = [stage["steps"] for stage in stages]
    return [(sum(steps[:index]), stage["name"]) for index, stage in enumerate(stages)]


def _column(rows: list[dict[str, float]], key: str, blank: Series) -> Series:
    points = [(row["step"], row[key]) for row in rows if key in row]
    return Series(blank.name, [x for x, _ in points], [y for _, y in points], blank.faint, blank.dots, blank.colour)


def frame_charts(evaluation: Evaluation) -> list[tuple[str, Markup]]:
    """(title, chart) of what is known frame by frame."""
    wanted = (
        ("Background PSNR", "dB", (("preserved_psnr_generated", "before compositing"), ("preserved_psnr", "result"))),
        ("Warping error", BY_KEY["warping_inside"].unit,
         (("warping_inside", "edited region"), ("warping_outside", "background"))),
        ("CLIP cosine", "cosine", (("clip_score", "to the edited first frame"), ("input_similarity", "to the source"))),
        ("DeQA score", "score", (("deqa_score", "result"),)),
    )  # fmt: skip
    charts = []
    for title, unit, lines in wanted:
        series = [
            Series(name, range(len(evaluation.frames[key])), evaluation.frames[key], dots=True, colour=colour)
            for colour, (key, name) in enumerate(lines, 1)
            if key in evaluation.frames and any(map(math.isfinite, evaluation.frames[key]))
        ]
        if series:
            charts.append((title, line_chart(series, "frame", unit, frames=True)))
    return charts


def worst(evaluation: Evaluation) -> list[tuple[str, int]]:
    """(what, frame) of the frames that a reader should look at first."""
    found = []
    for key, words, pick in (
        ("preserved_psnr_generated", "background furthest off", min),
        ("preserved_psnr", "result's background worst", min),
        ("warping_inside", "edit jumps most", max), ("clip_score", "least like the first frame", min),
    ):  # fmt: skip
        finite = [(y, x) for x, y in enumerate(evaluation.frames.get(key, ())) if math.isfinite(y)]
        if finite:
            found.append((words, pick(finite)[1]))
    return found


def _facts(subject: Subject, evaluation: Evaluation) -> list[tuple[str, str]]:
    facts = [(role, f"{path} (sha256 {subject.hashes[role][:12]}…)") for role, path in subject.files.items()]
    if subject.record:
        adapter, versions = subject.record["lora"], subject.record["versions"]
        facts.append(("LoRA", f"{adapter['path']} (sha256 {adapter['sha256'][:12]}…)"))
        facts.append(("libraries", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if evaluation.clip:
        facts.append(("CLIP", f"{evaluation.clip.variant} (sha256 {evaluation.clip.sha256[:12]}…)"))
    return facts
