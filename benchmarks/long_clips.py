"""Clips longer than the model takes at once: `python -m benchmarks.long_clips --out runs/long_clips`.

The validation scenes with 25 frames, where the tiny model was pretrained on 13. One LoRA a task is trained on clips of 13
frames; it edits the whole clip at once and in two pieces. Without and with an edited frame where the second piece begins,
which is a LoRA of its own. Run again to go on; what is there is kept. Writes OUT/long_clips.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.by_task import BUDGET, compare
from dataset.video import read_media
from loraedit_ext import launch
from loraedit_ext.config import RunConfig
from loraedit_ext.editing.results import GENERATED
from loraedit_ext.evaluation import metrics
from loraedit_ext.evaluation.rendering import render
from loraedit_ext.evaluation.suite.methods import METHODS, config_of, train, write_config
from loraedit_ext.evaluation.suite.statistics import estimate, paired
from loraedit_ext.evaluation.suite.tasks import SIZE, SuiteTask, read_frames
from loraedit_ext.evaluation.tasks import TRUTH, edit_boxes, write_task

FRAMES, CLIP = 25, 13
SHARED = CLIP - 1
"""The frame that both pieces have."""
LORAS = {"edited frames 0, 6, 18": (6, 18), "edited frames 0, 6, 12, 18": (6, SHARED, 18)}
EDITS = {"whole": (), f"pieces of {CLIP}": (f"edit.clip_frames={CLIP}",)}
HALVES = {"frames 1-11": range(1, SHARED), "frames 13-24": range(CLIP, FRAMES)}
Scores = dict[str, float]
"""Of one edit: PSNR in dB of the region to edit, before compositing, by half of the clip."""


def run_task(task: SuiteTask, folder: Path, checkpoint: Path, seed: int) -> Iterator[tuple[tuple[str, str], Scores]]:
    """Train and edit one task in every way: (LoRA, edit) and its scores."""
    before, after = render(task.scene, FRAMES, SIZE), render(task.edited, FRAMES, SIZE)
    region = edit_boxes(before, after, task.scene.target) > 0
    for number, (name, references) in enumerate(LORAS.items()):
        place = folder / task.name / str(number)
        if not (place / "job.toml").is_file():
            write_task(place, task.name, task.scene, task.edited, FRAMES, SIZE, references)
            job = place / "job.toml"
            job.write_text(f"clip_frames = {CLIP}\n{job.read_text(encoding='utf-8')}", encoding="utf-8")
        path = write_config(place, checkpoint.resolve())
        truth = read_frames(place / TRUTH)
        for edit, overrides in EDITS.items():
            config = config_of(path, METHODS["appearance"], seed, BUDGET, overrides)
            video = generated(config, place / f"edit_{seed}_{len(overrides)}")
            yield (name, edit), {half: unseen_psnr(video, truth, region, frames, references) for half, frames in HALVES.items()}


def generated(config: RunConfig, out: Path) -> np.ndarray:
    """What the model makes, uint8 (F, H, W, 3); trains and edits unless it is there."""
    if not (out / GENERATED).is_file():
        launch.edit(config, train(config), out)
    return read_media(out / GENERATED).frames


def unseen_psnr(video: np.ndarray, truth: np.ndarray, region: np.ndarray, frames: range, shown: Sequence[int]) -> float:
    """PSNR in dB of a region (F, H, W) over those of the frames whose edit was not shown to the model."""
    unseen = [frame for frame in frames if frame not in shown]
    return metrics.quality(video[unseen], truth[unseen], region[unseen]).psnr


def table(found: dict[tuple[str, str], dict[str, Scores]]) -> str:
    """Markdown: means over tasks with 95 % intervals, and what pieces gain over the whole clip, task by task."""
    gains = [f"pieces' gain, {half}" for half in HALVES]
    lines = ["| LoRA | edited | " + " | ".join([*HALVES, *gains]) + " |", "|---" * (2 + 2 * len(HALVES)) + "|"]
    for (name, edit), by_task in found.items():
        values = [{task: [scores[half]] for task, scores in by_task.items()} for half in HALVES]
        whole = [{task: [scores[half]] for task, scores in found[name, "whole"].items()} for half in HALVES]
        means = [f"{estimate(each).mean:.1f}" for each in values]
        changes = [paired(each, other) for each, other in zip(values, whole, strict=True)]
        told = ["–" if edit == "whole" else each.signed for each in changes]
        lines.append(f"| {name} | {edit} | " + " | ".join([*means, *told]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    compare(__doc__, "long_clips", run_task, table)
