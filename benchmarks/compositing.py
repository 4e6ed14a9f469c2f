"""What compositing does to a seam: `python -m benchmarks.compositing runs/suite --tasks benchmark`.

Composites the videos that a run of the benchmark has kept (`evaluate.py --suite scenes`) in several ways, and prints for each
the step that it adds at the border of the region, in grey levels beside the source's own, and PSNR of region and object
against the exact truth, with their paired changes. No model is run.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.progress import progress
from dataset.video import read_video
from loraedit_ext.config import EditSettings
from loraedit_ext.editing.compositing import composite
from loraedit_ext.evaluation import metrics
from loraedit_ext.evaluation.suite.run import read_records, video_path
from loraedit_ext.evaluation.suite.statistics import estimate, paired
from loraedit_ext.evaluation.suite.tasks import LISTS, SuiteTask, TaskMedia, chosen

METHODS = ("vae", "naive", "motion", "appearance")
WAYS = ((0, 0), (2, 0), (8, 0), (2, 4), (2, 8), (2, 16), (8, 8))
"""(feather, color_match) in pixels of 128x128."""
PLAIN = (2, 0)
SCORES = ("step added at the border", "edit PSNR (dB)", "object PSNR (dB)")
Scores = tuple[float, ...]
Found = dict[tuple[str, tuple[int, int]], dict[str, Scores]]
"""By method and way: scores by task."""


def kept(out: Path, tasks: Iterable[SuiteTask]) -> Iterator[tuple[TaskMedia, str, np.ndarray]]:
    """Task, method and video, uint8 (F, H, W, 3) before compositing, of each result that there is a video of."""
    records = {(record["task"], record["method"], record["seed"]): record["key"] for record in read_records(out)}
    first = min((seed for *_, seed in records), default=0)
    for task in tasks:
        media = TaskMedia(task)
        for method in METHODS:
            key = records.get((task.name, method, first))
            if key and (path := video_path(out, key)).is_file():
                yield media, method, read_video(path).frames


def scores(video: np.ndarray, media: TaskMedia, feather: int, reach: int) -> Scores:
    """Of one way to composite a video; frame 0 is given and left out."""
    settings = EditSettings(feather=feather, color_match=reach)
    made = composite(media.source[1:], video[1:], media.preserve[1:], settings)
    region, seen = ~media.preserve[1:], media.object[1:]
    step = metrics.seam(made, media.source[1:], media.preserve[1:]).excess
    return (step, *(metrics.quality(made, media.truth[1:], where).psnr for where in (region, seen)))


def table(found: Found) -> str:
    """Markdown: means over tasks, and changes against `PLAIN` task by task, with 95 % intervals."""
    lines = ["| method | feather | color_match | " + " | ".join(f"{name} | change" for name in SCORES) + " |",
             "|---" * (3 + 2 * len(SCORES)) + "|"]  # fmt: skip
    for (method, way), by_task in found.items():
        cells = []
        for index in range(len(SCORES)):
            now, plain = ({task: [each[index]] for task, each in of.items()} for of in (by_task, found[method, PLAIN]))
            cells += [f"{estimate(now).mean:.2f}", "–" if way == PLAIN else paired(now, plain).signed]
        lines.append(f"| {method} | {way[0]} | {way[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="results folder of the benchmark")
    parser.add_argument("--tasks", choices=list(LISTS), default="benchmark", help="which of its tasks (default: %(default)s)")
    options = parser.parse_args()
    tasks = chosen(options.tasks)
    found: Found = {(method, way): {} for method in METHODS for way in WAYS}
    with progress(len(tasks) * len(METHODS), "compositing", unit="video", leave=False) as bar:
        for media, method, video in kept(options.out, tasks):
            for way in WAYS:
                found[method, way][media.task.name] = scores(video, media, *way)
            bar.update()
    found = {key: by_task for key, by_task in found.items() if by_task}
    if not found:
        raise SystemExit(f"{options.out}: no video of these tasks. `evaluate.py --suite scenes --out FOLDER` makes them.")
    print(table(found))


if __name__ == "__main__":
    main()
