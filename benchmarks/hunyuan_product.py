"""Condition latents with or without the mask's product: `python -m benchmarks.hunyuan_product --latents DIR --out DIR`.

HunyuanVideo-I2V `latent_concat` is told a spatial mask through its mask channel, and the known pixels through the
latents of the grey-filled video. Whether these latents should be zero where the mask is (`product`) or be given
everywhere (`whole`, what the project does) is measured here. As no small released HunyuanVideo exists, a tiny one is
pretrained first, on the released first-frame input alone. Then each form trains its own motion LoRA per scene, from
the same weights with the same noise, and edits it; the truth is exact. Run again to go on; what is there is kept.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from common.files import write_atomic, write_text_atomic
from dataset.job import load_job
from dataset.resize import Grid
from dataset.triple import EncodedTriple
from loraedit_ext import flow, lora, masks, regimes
from loraedit_ext.config import AdapterSettings, EditSettings, OptimizerSettings
from loraedit_ext.editing.sampling import sample_latents
from loraedit_ext.encode import encode
from loraedit_ext.evaluation import metrics
from loraedit_ext.evaluation.suite.scores import scores
from loraedit_ext.evaluation.suite.statistics import Estimate, estimate, paired
from loraedit_ext.evaluation.suite.tasks import SIZE, SuiteTask, TaskMedia, chosen, write
from loraedit_ext.hunyuan import MaskedHunyuan
from loraedit_ext.objective import Objective
from loraedit_ext.pipeline import alone
from loraedit_ext.training import optim
from models.hunyuan.checkpoint import HunyuanTransformerFiles
from models.hunyuan.wrapper import HunyuanI2V
from models.wan.checkpoint import WanCheckpoint
from models.wan.encoders import WanTextEncoder, WanVAE
from pretraining import encoders, loop
from pretraining.evaluate import sheet
from pretraining.hunyuan import HunyuanTraining, Options, text_inputs
from pretraining.transformer import SHIFT

CPU = torch.device("cpu")
Form = Literal["released", "product", "whole"]
"""`released`: the first frame alone, as a measure of what the base does by itself."""
COLUMNS = {
    "preserved_psnr": "background PSNR", "told_psnr": "of it, in latents with mask 1", "cut_psnr": "with mask 0",
    "edit_psnr": "edit PSNR", "object_psnr": "object PSNR",
}  # fmt: skip
"""Score -> title, all in dB."""
WAN = Path("checkpoints/tiny-wan-i2v")


class Product(MaskedHunyuan):
    """The latents of the grey-filled video times the latent mask."""

    def encode_known(self, video: Tensor, cells: Tensor) -> Tensor:
        return HunyuanI2V.encode_known(self, video, cells)


class Words:
    """The tiny Wan's text features in place of LLaVA's and CLIP's."""

    def __init__(self, encoder: WanTextEncoder) -> None:
        self.encoder = encoder

    def encode(self, prompt: str, reference: Tensor) -> dict[str, Tensor]:
        """As `HunyuanTextEncoder.encode`; the picture is told by the condition latents alone."""
        features = self.encoder.encode(prompt).float()
        padded = torch.nn.functional.pad(features, (0, 0, 0, encoders.TEXT_LEN - len(features)))
        text, length, pooled = text_inputs(padded[None])
        return {"text": text[0], "text_length": length[0], "pooled": pooled[0]}


@dataclass(frozen=True)
class TinyHunyuan(HunyuanTransformerFiles):
    """The pretrained transformer with the tiny Wan's VAE and text encoder, on whose features it was trained."""

    wan: Path = WAN

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> WanVAE:
        return WanCheckpoint.open(self.wan).load_vae(device, dtype)

    def load_text_encoder(self, device: torch.device) -> Words:
        return Words(WanCheckpoint.open(self.wan).load_text_encoder(device))


@dataclass(frozen=True)
class Setup:
    """What is measured: everything but the tasks has the defaults of the committed table.

    Attributes:
        out: folder of the base's run, the tasks, the edits and the table.
        tasks: a list of the benchmark; `validation` is there for choosing defaults.
        seeds: each seeds the LoRA, its noise and the noise of the edit.
        steps, batch, lr, rank: of each LoRA.
        sampling: Euler steps of an edit.
    """

    out: Path
    tasks: Sequence[SuiteTask]
    seeds: int = 2
    steps: int = 100
    batch: int = 4
    lr: float = 1e-3
    rank: int = 16
    sampling: int = 25

    def edit_settings(self, seed: int) -> EditSettings:
        return EditSettings(steps=self.sampling, guidance=1.0, shift=3.0, sampler="euler", seed=seed)


@dataclass(frozen=True)
class Case:
    """One edit to make."""

    task: SuiteTask
    form: Form
    trained: bool
    seed: int

    @property
    def row(self) -> str:
        return f"{self.form}, {'LoRA' if self.trained else 'no LoRA'}"

    def path(self, out: Path) -> Path:
        return out / "edits" / f"{self.task.name}-{self.form}-{'lora' if self.trained else 'bare'}-{self.seed}.npy"


def cases(setup: Setup, task: SuiteTask) -> Iterator[Case]:
    """All edits of a task."""
    for seed in range(setup.seeds):
        for form in get_args(Form):
            yield Case(task, form, False, seed)
            if form != "released":
                yield Case(task, form, True, seed)


class Scene:
    """One task, encoded once for each form, and its edits."""

    def __init__(self, setup: Setup, models: Mapping[Form, MaskedHunyuan], task: SuiteTask) -> None:
        self.setup, self.models = setup, models
        folder = setup.out / "tasks" / task.name
        write(task, folder)
        geometry = MaskedHunyuan.geometry
        grid = Grid(geometry.temporal_stride, geometry.size_step, SIZE[0] * SIZE[1])
        self.job = load_job(folder / "job.toml", grid)
        self.samples: dict[Form, EncodedTriple] = {}
        self.conditions: dict[Form, dict[str, Tensor]] = {}
        for form, model in models.items():
            if form != "released":
                self.samples[form] = encode(model, regimes.motion(self.job)[0])
            triple = regimes.edit(self.job, "first_frame" if form == "released" else "motion")
            self.conditions[form] = encode(model, triple).condition

    def make(self, case: Case) -> None:
        """Train if asked for, edit, and write the frames as generated."""
        model = self.models[case.form]
        transformer = model.build_transformer()
        model.load_weights(transformer.layers(), torch.float32, CPU)
        if case.trained:
            self.train(model, transformer, case)
        condition, forward = self.conditions[case.form], partial(_forward, transformer)
        settings = self.setup.edit_settings(case.seed)
        latents = sample_latents(model, forward, [(condition, 0.0)], condition["known"].shape, settings, alone(CPU), case.row)
        frames = regimes.to_pixels(model.decode_video(latents))
        write_atomic(case.path(self.setup.out), lambda path: _save(path, frames))

    def train(self, model: MaskedHunyuan, transformer: nn.Module, case: Case) -> None:
        """The motion stage: noise, noise levels and the LoRA's start depend on the seed alone."""
        setup, layers = self.setup, transformer.layers()
        lora.inject(transformer, model, AdapterSettings(rank=setup.rank))
        lora.initialise(layers, case.seed, CPU)
        weights = list(lora.trainable(layers).values())
        optimizer = optim.build_optimizer(weights, OptimizerSettings(lr=setup.lr))
        objective = Objective(model, flow.TimestepSampler(shift=SHIFT), case.seed, stratified=True)
        for step in range(setup.steps):
            numbers = range(step * setup.batch, (step + 1) * setup.batch)
            inputs, labels = objective.batch("motion", [self.samples[case.form]] * setup.batch, numbers)
            objective.loss(_forward(transformer, inputs), labels).backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()


def _forward(transformer: nn.Module, inputs: tuple[Tensor, ...], _number: int = 0) -> Tensor:
    """The velocity as in pretraining: bf16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream: Any = inputs
        for layer in transformer.layers():
            stream = layer(stream)
    return stream


def make_missing(setup: Setup) -> None:
    """Make the edits that are not there yet, scene by scene."""
    files = TinyHunyuan(setup.out / "base" / "transformer.pt")
    product, whole = Product(files, CPU), MaskedHunyuan(files, CPU)  # type: ignore[arg-type]
    models: dict[Form, MaskedHunyuan] = {"released": product, "product": product, "whole": whole}
    for task in setup.tasks:
        missing = [case for case in cases(setup, task) if not case.path(setup.out).exists()]
        scene = Scene(setup, models, task) if missing else None
        for case in missing:
            scene.make(case)
            print(case.path(setup.out).stem, flush=True)


def _save(path: Path, frames: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, frames)


def measured(setup: Setup) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Score -> row of the table -> task -> a number a seed."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {key: {} for key in COLUMNS}
    for task in setup.tasks:
        media = TaskMedia(task)
        for case in cases(setup, task):
            values = _scores(np.load(case.path(setup.out)), media)
            for key in COLUMNS:
                found[key].setdefault(case.row, {}).setdefault(task.name, []).append(values[key])
    return found


def _scores(video: np.ndarray, media: TaskMedia) -> dict[str, float]:
    """The benchmark's, and how much of the background's the mask channel tells: latents may hold both."""
    told = told_pixels(torch.from_numpy(media.preserve)).numpy()
    parts = {"told_psnr": media.preserve & told, "cut_psnr": media.preserve & ~told}
    background = {key: metrics.quality(video[1:], media.source[1:], part[1:]).psnr for key, part in parts.items()}
    return scores(video, media) | background


def told_pixels(preserve: Tensor) -> Tensor:
    """bool (F, H, W): the pixels of the latents whose mask is 1, of a mask (F, H, W)."""
    cells = masks.latent_mask(masks.with_first_frame(preserve))[0].bool()
    frames = torch.cat([cells[:1], cells[1:].repeat_interleave(masks.FRAMES_PER_LATENT, 0)])
    return frames.repeat_interleave(masks.CELL, 1).repeat_interleave(masks.CELL, 2)


def table(setup: Setup) -> str:
    """Markdown: a mean a row, then `whole` against `product`, paired over scenes."""
    found = measured(setup)
    lines = [
        "| condition | " + " | ".join(COLUMNS.values()) + " |", "|---|" + "---|" * len(COLUMNS),
    ]  # fmt: skip
    for row in found["edit_psnr"]:
        lines.append(f"| {row} | " + " | ".join(f"{estimate(found[key][row]).mean:.2f}" for key in COLUMNS) + " |")
    for state in ("no LoRA", "LoRA"):
        cells = [
            _interval(paired(found[key][f"whole, {state}"], found[key][f"product, {state}"])) for key in COLUMNS
        ]
        lines.append(f"| **whole - product, {state}** | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(value: Estimate) -> str:
    return f"{value.mean:+.2f} ({value.low:+.2f} to {value.high:+.2f})"


def draw(setup: Setup) -> None:
    """A contact sheet of seed 0: source, truth, released input, then both forms with their LoRA."""
    rows = []
    for task in setup.tasks:
        media = TaskMedia(task)
        shown = [Case(task, "released", False, 0), Case(task, "product", True, 0), Case(task, "whole", True, 0)]
        videos = [media.source, media.truth, *(np.load(case.path(setup.out)) for case in shown)]
        rows.append([regimes.to_unit(video) for video in videos])
    sheet(rows, setup.out / "edits.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=Path, required=True, help="folder of encoded clips (pretraining.latents)")
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is made")
    parser.add_argument("--base-steps", type=int, default=4000, help="pretraining of the base")
    parser.add_argument("--base-batch", type=int, default=24)
    parser.add_argument("--compile", action="store_true", help="use torch.compile in pretraining")
    parser.add_argument("--tasks", nargs="+", default=["validation"], help="lists of the benchmark, or names of tasks")
    for name in ("seeds", "steps", "batch", "sampling"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Setup, name))
    parser.add_argument("--lr", type=float, default=Setup.lr)
    given = parser.parse_args(arguments)
    loop.limit_threads("cpu")
    base = Options(out=given.out / "base", steps=given.base_steps, latents=(given.latents,), batch=given.base_batch,
                   compile=given.compile)  # fmt: skip
    loop.run(HunyuanTraining(base))
    tasks = [task for name in given.tasks for task in chosen(name)]
    setup = Setup(given.out, tasks, given.seeds, given.steps, given.batch, given.lr, Setup.rank, given.sampling)
    make_missing(setup)
    draw(setup)
    text = table(setup)
    write_text_atomic(setup.out / "table.md", text)
    print(text)


if __name__ == "__main__":
    main()
