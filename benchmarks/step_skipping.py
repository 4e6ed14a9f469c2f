"""Sampling in fewer passes of the model: `python -m benchmarks.step_skipping --out runs/step_skipping`.

On the validation scenes, with a LoRA of 150 motion steps each and the settings of [edit] that Wan has by default (30 steps,
shift 5, guidance 5): how near the result of fewer passes is to that of all, when steps follow from others on a line
(`edit.compute_every`), when the same steps repeat the last velocity, when EasyCache decides, and with fewer steps. Run again
to go on; LoRAs are kept. Writes OUT/step_skipping.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.by_task import BUDGET, compare
from loraedit_ext import flow, launch, lora, regimes
from loraedit_ext.editing import sampling, skipping
from loraedit_ext.editing.editor import Editor
from loraedit_ext.editing.skipping import Predict
from loraedit_ext.evaluation import metrics
from loraedit_ext.evaluation.suite.methods import METHODS, config_of, train, write_config
from loraedit_ext.evaluation.suite.statistics import estimate
from loraedit_ext.evaluation.suite.tasks import SuiteTask, TaskMedia, write
from loraedit_ext.pipeline import alone

STEPS = 30
SETTINGS = (f"edit.steps={STEPS}", "edit.shift=5.0", "edit.guidance=5.0", "edit.negative_prompt=''")
WORLD = alone(torch.device("cpu"))
Wrap = Callable[[Predict, Sequence[float]], Predict]
"""A velocity and the noise levels of the steps, to a velocity that asks for it less often."""


class Repeating(skipping.Skipping):
    """The same steps are computed; the others repeat the last velocity."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if next(self._plan):
            self._known.append((t, self.predict(x, t)))
        return self._known[-1][1]


class EasyCache:
    """EasyCache (arXiv 2507.02860, algorithm 1): repeats v - x until the change that it expects adds up to a threshold.

    Args:
        predict: the model.
        steps: of the sampling; the first fifth, as in the paper (10 of 50), and the last one are computed.
        threshold: sum of relative changes.
    """

    def __init__(self, predict: Predict, steps: int, threshold: float) -> None:
        self.predict, self.steps, self.threshold = predict, steps, threshold
        self.number = 0
        self.expected = self.rate = 0.0
        self.last_x = self.last_v = self.offset = torch.zeros(())

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        moved = (x - self.last_x).abs().mean()
        self.expected += (self.rate * moved / self.last_v.abs().mean()).item() if self.number else 0.0
        optional = self.steps // 5 <= self.number < self.steps - 1
        if optional and self.expected < self.threshold:
            v = x + self.offset
        else:
            v = self.predict(x, t)
            self.rate = ((v - self.last_v).abs().mean() / moved).item()
            self.expected, self.offset = 0.0, v - x
        self.number += 1
        self.last_x, self.last_v = x, v
        return v


@dataclass(frozen=True)
class Way:
    """One row: how steps are saved, how many steps there are, and what becomes of the velocity."""

    name: str
    wrap: Wrap = lambda predict, _sigmas: predict
    steps: int = STEPS


def _every(kind: type[skipping.Skipping], every: int) -> Wrap:
    return lambda predict, sigmas: kind(predict, skipping.computed(sigmas, every))


def _easy(threshold: float) -> Wrap:
    return lambda predict, sigmas: EasyCache(predict, len(sigmas), threshold)


ALL = Way("all steps")
WAYS = (
    ALL,
    *(Way(f"`edit.compute_every={every}`", _every(skipping.Skipping, every)) for every in (2, 3, 4, 5)),
    *(Way(f"the same steps, velocity repeated ({every})", _every(Repeating, every)) for every in (2, 3, 4, 5)),
    *(Way(f"EasyCache, threshold {threshold:g}", _easy(threshold)) for threshold in (0.05, 0.1, 0.2, 0.4)),
    *(Way(f"`edit.steps={steps}`", steps=steps) for steps in (17, 13, 11, 10)),
)


class Sampler:
    """A task's LoRA, ready to edit it in several ways."""

    def __init__(self, task: SuiteTask, folder: Path, checkpoint: Path, seed: int) -> None:
        write(task, folder)
        config = config_of(write_config(folder, checkpoint), METHODS["motion"], seed, BUDGET, SETTINGS)
        self.settings, self.model = config.edit, launch.build_model(config, WORLD.device)
        job = launch.open_job(config, self.model)
        editor = Editor(config, self.model, lora.read(train(config), self.model), WORLD, launch.cache_of(config))
        self.told, self.forward = editor.told(job), editor.transformers.begin()
        self.shape = self.model.geometry.latent_shape(*job.frames.shape[:3])

    def __call__(self, way: Way) -> tuple[np.ndarray, int]:
        """The frames that a way makes, uint8 (F, H, W, 3), and how many steps asked the model."""
        settings, asked = self.settings.model_copy(update={"steps": way.steps}), 0
        velocity = sampling.velocity(self.model, self.forward, self.told, settings, WORLD)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            nonlocal asked
            asked += 1
            return velocity(x, t)

        sigmas = flow.inference_sigmas(settings.steps, settings.shift, settings.sampler)[:-1].tolist()
        latents = sampling.follow(
            self.model, way.wrap(predict, sigmas), self.told[0][0], self.shape, settings, WORLD, way.name
        )
        return regimes.to_pixels(self.model.decode_video(latents)), asked


Scores = tuple[float, float, float]
"""Steps that asked the model; PSNR in dB of the region against the result of all steps, and against the truth."""


def run_task(task: SuiteTask, folder: Path, checkpoint: Path, seed: int) -> Iterator[tuple[Way, Scores]]:
    """Train, and edit in every way."""
    sampler, media = Sampler(task, folder / task.name, checkpoint.resolve(), seed), TaskMedia(task)
    whole, _ = sampler(ALL)
    for way in WAYS:
        video, asked = sampler(way)
        near, true = (metrics.quality(video[1:], other[1:], ~media.preserve[1:]).psnr for other in (whole, media.truth))
        yield way, (asked, near, true)


def table(found: dict[Way, dict[str, Scores]]) -> str:
    """Markdown: means over tasks."""
    lines = ["| | steps that ask the model | region against all steps (dB) | against the truth (dB) |", "|---|---|---|---|"]
    for way, by_task in found.items():
        asked, near, true = (
            estimate({task: [scores[index]] for task, scores in by_task.items()}).mean for index in range(3)
        )
        lines.append(f"| {way.name} | {asked:.1f} | {'–' if way is ALL else f'{near:.1f}'} | {true:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    compare(__doc__, "step_skipping", run_task, table)
