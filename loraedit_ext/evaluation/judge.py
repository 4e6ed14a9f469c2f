"""All metrics of one edit: which function sees which frames and which region, and what lies beside each number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.progress import progress
from loraedit_ext.config import EvaluationSettings
from loraedit_ext.evaluation import clip_metrics, external, metrics, motion
from loraedit_ext.evaluation.catalogue import METRICS, Value, computed, json_number, missing
from loraedit_ext.evaluation.subject import Subject

DEFAULT_CLIP = Path("checkpoints/clip-vit-large-patch14")
NO_GENERATED = "no video from before compositing was given or stored"
NO_TRUTH = "no ground truth was given"
PER_MILLE = 1000


@dataclass
class Evaluation:
    """Numbers of one edit."""

    values: list[Value] = field(default_factory=list)
    """One for each metric of the catalogue, in its order."""
    frames: dict[str, tuple[float, ...]] = field(default_factory=dict)
    """Numbers frame by frame, of F frames each; nan where a frame has none."""
    clip: clip_metrics.ClipResult | None = None

    def __getitem__(self, key: str) -> Value:
        return next(value for value in self.values if value.metric.key == key)

    def as_json(self) -> dict[str, Any]:
        return {
            "metrics": {value.metric.key: value.as_json() for value in self.values},
            "frames": {name: [json_number(number) for number in series] for name, series in self.frames.items()},
            "clip": self.clip.as_json() if self.clip else None,
        }


def judge(subject: Subject, settings: EvaluationSettings, device: torch.device) -> Evaluation:
    """Compute everything that can be computed; the rest says why not.

    Frame 0 is given, not generated, so it counts in no comparison of pixels; the step from it to frame 1 counts in
    the metrics over time.
    """
    evaluation = Evaluation()
    parts: tuple[Callable[[], list[Value]], ...] = (
        lambda: _clip(subject, settings.clip_path, device, evaluation),  # first, since weights that are none end it all
        lambda: _background(subject, evaluation), lambda: _edit_region(subject), lambda: _border(subject),
        lambda: _over_time(subject, evaluation), lambda: [_deqa(subject, settings, evaluation)],
    )  # fmt: skip
    with progress(len(parts), "judging", unit="group") as bar:
        for part in parts:
            evaluation.values += part()
            bar.update()
    order = {metric.key: index for index, metric in enumerate(METRICS)}
    evaluation.values.sort(key=lambda value: order[value.metric.key])
    return evaluation


def _background(subject: Subject, evaluation: Evaluation) -> list[Value]:
    values = []
    for clip, suffix in ((subject.generated, "_generated"), (subject.result, "")):
        keys = [f"preserved_{name}{suffix}" for name in ("psnr", "ssim", "max_error")]
        if clip is None:
            values += [missing(key, NO_GENERATED) for key in keys]
            continue
        found = metrics.preserved_quality(clip.video[1:], clip.source[1:], clip.preserve[1:])
        values += [computed(key, number) for key, number in
                   zip(keys, (found.psnr, found.ssim, found.max_error), strict=True)]
        evaluation.frames[f"preserved_psnr{suffix}"] = (math.nan, *found.frame_psnr)
    return values


def _edit_region(subject: Subject) -> list[Value]:
    if subject.truth is None:
        return [missing(key, NO_TRUTH) for key in ("edit_psnr", "edit_ssim")]
    found = metrics.edited_quality(subject.edited[1:], subject.truth[1:], subject.preserve[1:])
    return [computed("edit_psnr", found.psnr), computed("edit_ssim", found.ssim)]


def _border(subject: Subject) -> list[Value]:
    source, preserve = subject.source[1:], subject.preserve[1:]
    result = metrics.seam(subject.edited[1:], source, preserve)
    values = [computed("leak", result.leak), computed("seam_jump", result.jump, result.source_jump)]
    made = subject.generated
    if made is None:
        return [*values, missing("leak_generated", NO_GENERATED)]
    found = metrics.seam(made.video[1:], made.source[1:], made.preserve[1:])
    return [*values, computed("leak_generated", found.leak)]


def _over_time(subject: Subject, evaluation: Evaluation) -> list[Value]:
    keys = ("warping_inside", "warping_outside", "motion_inside", "motion_outside", "flicker_inside")
    shape = subject.source.shape
    if shape[0] < 2 or min(shape[1:3]) < motion.SMALLEST_SIDE:
        reason = f"needs two frames of at least {motion.SMALLEST_SIDE} pixels a side, got {shape[0]} of " \
                 f"{shape[2]}x{shape[1]}"
        return [missing(key, reason) for key in keys]
    source_flow = motion.flow(subject.source, "flow of the source")
    edit_flow = motion.flow(subject.edited, "flow of the edit")
    values = []
    for where, region in (("inside", ~subject.preserve), ("outside", subject.preserve)):
        edit, floor = (motion.warping(video, source_flow, region) for video in (subject.edited, subject.source))
        values.append(computed(f"warping_{where}", PER_MILLE * edit.error, PER_MILLE * floor.error))
        evaluation.frames[f"warping_{where}"] = (math.nan, *(PER_MILLE * error for error in edit.frame_errors))
        moved = motion.agreement(edit_flow, source_flow, region)
        values.append(computed(f"motion_{where}", moved.error, moved.frozen))
    still, floor = (metrics.flicker(video, ~subject.preserve) for video in (subject.edited, subject.source))
    return [*values, computed("flicker_inside", still, floor)]


def _clip(subject: Subject, given: Path | None, device: torch.device, evaluation: Evaluation) -> list[Value]:
    keys = ("clip_score", "clip_score_later", "input_similarity")
    folder = given or Path.cwd() / DEFAULT_CLIP
    if given is None and clip_metrics.find_weights(folder) is None:  # what was named must be there
        reason = f"looked for {folder / clip_metrics.WEIGHTS[0]}; set evaluation.clip_path"
        return [missing(key, reason) for key in keys]
    clip = clip_metrics.ClipImages(folder, device)
    evaluation.clip = clip_metrics.clip_scores(clip, subject.edited, subject.source, subject.reference)
    scores = evaluation.clip.crop
    evaluation.frames["clip_score"] = scores.frame_clip_score
    evaluation.frames["input_similarity"] = scores.frame_input_similarity
    return [
        computed("clip_score", scores.clip_score), computed("clip_score_later", scores.clip_score_later),
        computed("input_similarity", scores.input_similarity, scores.ceiling),
    ]  # fmt: skip


def _deqa(subject: Subject, settings: EvaluationSettings, evaluation: Evaluation) -> Value:
    if not settings.deqa_command:
        return missing("deqa_score", "evaluation.deqa_command is not set (docs/evaluation.md has the recipe)")
    try:
        scores = external.score_frames(settings.deqa_command, subject.edited, settings.deqa_timeout)
    except UserError as error:
        return missing("deqa_score", str(error))
    evaluation.frames["deqa_score"] = tuple(scores)
    return computed("deqa_score", _mean(scores))


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def table(evaluation: Evaluation) -> str:
    """The metrics as text, for a terminal."""
    rows = [(f"{value.metric.title} {value.metric.arrow}", value) for value in evaluation.values]
    wide = max(len(title) for title, _ in rows)
    number = max((len(value.text) for _, value in rows if value.value is not None), default=0)
    lines, group = [], ""
    for title, value in rows:
        if value.metric.group != group:
            group = value.metric.group
            lines += ["", group]
        text = value.text if value.value is None else f"{value.text:>{number}}"
        lines.append(f"  {title:<{wide}}  {text}  {value.beside_text}".rstrip())
    return "\n".join(lines).strip("\n")
