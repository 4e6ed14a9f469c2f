"""Training: from a configuration to a LoRA, step by step, resumable at every checkpoint."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from common.files import write_json_atomic
from common.progress import progress
from dataset.job import EditJob
from dataset.loader import PipelineLoader, SampleSchedule, Share
from dataset.triple import EncodedTriple
from loraedit_ext import flow, forecast, lora
from loraedit_ext import run as runs
from loraedit_ext.config import ATTENTION, OFFLOAD, RunConfig, StageSettings
from loraedit_ext.objective import Objective
from loraedit_ext.pipeline import Engine, World, check_world, split, stage_of
from loraedit_ext.training import state, tracking
from loraedit_ext.training.optim import GradientGuard, averaged, build_optimizer, lr_factor
from loraedit_ext.training.patience import Patience
from loraedit_ext.training.preview import FOLDER as PREVIEWS
from loraedit_ext.training.preview import Preview, Previewer
from models.base import I2VModel
from models.layers import PipelineLayer, speed_up
from models.offload import HostInputs

QUANTILES = tuple(k / 10 for k in range(1, 10))
SIGNALS = ("save", "save_quit")


@dataclass(frozen=True)
class StageRun:
    """One training stage, placed on the run's step axis."""

    settings: StageSettings
    first: int
    """Global step before its first one."""
    loader: PipelineLoader

    @property
    def last(self) -> int:
        return self.first + self.settings.steps


def checkpoint_activations(layers: Iterable[PipelineLayer], how: bool | str, device: torch.device) -> None:
    """Let a process's layers keep for their backward pass what `activation_checkpointing` says."""
    inputs = HostInputs(device) if how == OFFLOAD else None
    for layer in layers:
        layer.recompute, layer.keep_attention, layer.inputs = bool(how), how == ATTENTION, inputs


class Trainer:
    """One training run on this process's share of the model.

    Args:
        config: the run.
        job: for the LoRA's metadata.
        model: with the conditioning of this project.
        samples: encoded triples by name.
        groups: names of the triples of each regime.
        stages: the run's stages.
        world: this process among the others.
        resume: folder of the full state to continue from: in its run's folder, or in a new one if that run has gone on since.
        preview: what to render on the way, its samples among `samples`.
    """

    def __init__(
        self, config: RunConfig, job: EditJob, model: I2VModel, samples: Mapping[str, EncodedTriple],
        groups: Mapping[str, Sequence[str]], stages: Sequence[StageSettings], world: World, resume: Path | None,
        preview: Preview | None = None,
    ) -> None:
        self.config, self.job, self.model, self.samples, self.groups = config, job, model, samples, groups
        self.world = world
        sampler = flow.TimestepSampler(
            config.model.timestep_sample_method, config.model.sigmoid_scale, config.model.shift or 1.0,
            config.model.min_t, config.model.max_t,
        )  # fmt: skip
        self.objective = Objective(
            model, sampler, config.seed, config.model.stratified, config.model.guidance or 1.0
        )
        self._build_engine()
        self.stages = list(self._place(stages))
        self.total = self.stages[-1].last
        self.step = self._resume(resume) if resume else 0
        self.claim = ExitStack()  # until the training ends
        self.run = Path(world.broadcast(self._folder(resume)))
        self.trackers = self._open_trackers(resume)
        self.patience = Patience(config.early_stop_patience, list(self.stages[-1].settings.mix), self.stages[-1].first)
        self.patience.replay(tracking.history(self.run) if world.is_main else [])
        self.previewer = Previewer(preview, model, samples, self.engine.device) if preview else None
        self.saved_at = time.monotonic()

    def _build_engine(self) -> None:
        """Weights of this process's layers, LoRA, optimizer, engine."""
        config, world = self.config, self.world
        replicas = check_world(world, config.pipeline_stages)
        transformer = self.model.build_transformer()
        layers = transformer.layers()
        stage = stage_of(world, config.pipeline_stages)
        bounds = split(layers, config.pipeline_stages, config.partition_method, config.partition_split)
        self.owned = dict(list(enumerate(layers))[bounds[stage] : bounds[stage + 1]])
        dtype, linears = config.model.storage
        self.model.load_weights(list(self.owned.values()), dtype, world.device, linears, config.blocks_to_swap)
        lora.inject(transformer, self.model, config.adapter)
        lora.initialise(self.owned.values(), config.seed, world.device)
        self.weights = lora.trainable(self.owned.values())
        self.scale = config.adapter.effective_alpha / config.adapter.rank
        self._start_from_existing()
        checkpoint_activations(self.owned.values(), config.activation_checkpointing, world.device)
        speed_up(list(self.owned.values()), world.device, config.model.int8_matmul, config.compile)
        for layer in self.owned.values():
            for parameter in layer.parameters():
                parameter.model_parallel = True
        self.optimizer = build_optimizer(self.weights.values(), config.optimizer)
        self.engine = Engine(
            layers, bounds, self.optimizer, self.objective.loss, config.micro_batch_size_per_gpu,
            config.gradient_accumulation_steps, getattr(torch, config.model.dtype),
        )  # fmt: skip
        self.guard = GradientGuard(config.gradient_clipping, self.engine.sum_over_stages)
        self.guard.attach(self.optimizer)
        self.share = Share(
            config.micro_batch_size_per_gpu, config.gradient_accumulation_steps, self.engine.replica, replicas
        )

    def _start_from_existing(self) -> None:
        if existing := self.config.adapter.init_from_existing:
            lora.start_from(existing, self.model, self.weights, self.scale, partial=self.config.pipeline_stages > 1)

    def _place(self, stages: Sequence[StageSettings]) -> Iterator[StageRun]:
        first = 0
        for settings in stages:
            schedule = SampleSchedule(self.groups, settings.mix, settings.steps, self.share.samples_per_step)

            def collate(samples: Sequence[EncodedTriple], numbers: Sequence[int], name: str = settings.name) -> Any:
                return self.objective.batch(name, samples, numbers)

            yield StageRun(settings, first, PipelineLoader(schedule, self.samples, self.share, collate))
            first += settings.steps

    def _resume(self, folder: Path) -> int:
        adapter, optimizer = self.config.adapter, type(self.optimizer).__name__
        facts = state.check(folder, self.model.describe(), adapter.rank, adapter.effective_alpha, optimizer)
        state.load(folder, self._weights_by_layer(), self.optimizer)
        return facts["step"]

    def _weights_by_layer(self) -> dict[int, dict[str, torch.nn.Parameter]]:
        return {index: lora.trainable([layer]) for index, layer in self.owned.items()}

    def _folder(self, resume: Path | None) -> str:
        """Of the run, as the main process decides: what a run made behind the resumed state is not written over."""
        if not self.world.is_main:
            return ""
        goes_on = resume is not None and state.is_newest(resume)
        run = resume.parent if resume and goes_on else runs.create(self.config.output_dir)
        self.claim.enter_context(runs.claimed(run))
        if resume and not goes_on:
            self._say(f"{resume}: its run went on from here and stays as it is; this one goes on in {run}.")
        return str(run)

    def _open_trackers(self, resume: Path | None) -> tracking.Trackers:
        if not self.world.is_main:
            return tracking.Trackers([])
        origin = resume if resume and resume.parent != self.run else None
        runs.write_config(self.run, self.config, self.job.fields(), origin)
        for name in SIGNALS:
            (self.run / name).unlink(missing_ok=True)
        trackers = tracking.open_trackers(
            self.run, self.config.monitoring, self.config.model_dump(mode="json"), self.step
        )
        for row in tracking.history(origin.parent) if origin else []:
            if (step := row.pop("step")) <= self.step:
                trackers.log(step, row)
        return trackers

    def train(self) -> None:
        """Run every step that is left; export and checkpoint on the way."""
        try:
            if self.step == 0 and self.config.eval_every_n_steps and self.config.eval_before_first_step:
                self.evaluate()
            self._loop()
            final = self.run / f"step{self.step}" / lora.EXPORT_NAME
            if self.world.is_main and final.is_file():
                self.trackers.lora(self.step, final)
        finally:
            self.trackers.close()
            self.claim.close()

    def _loop(self) -> None:
        with progress(self.total, "training", unit="step", initial=self.step, disable=not self.world.is_main) as bar:
            while self.step < self.total:
                values = self._one_step()
                bar.set_postfix_str(
                    f"loss {values['train/loss']:.4f} | {values['train/step_seconds']:.2f} s/step | "
                    f"{values['train/tflops']:.3g} TFLOP/s | {values['train/memory_gb']:.1f} GB",
                    refresh=False,
                )
                bar.update()
                if reason := self._after_step():
                    self._say(f"{self.run}: stopped at step {self.step}: {reason}.")
                    break

    def _after_step(self) -> str | None:
        """Whatever is due after a step; returns why to stop here, or None."""
        signal = self._signal()
        if self._due(self.config.eval_every_n_steps):
            self.evaluate()
        reason = "signal file" if signal == "save_quit" else self._out_of_patience()
        # The state comes last: a run that is resumed from it does not come back to what was due before.
        if self._due(self.config.save_every_n_steps) or self._stage_ends() or signal or reason:
            self.export()
        if self._due_checkpoint() or signal or reason:
            self.save_state()
        if self._due(self.config.sample_every_n_steps):
            self.render_preview()
        return reason

    def _out_of_patience(self) -> str | None:
        """Why to stop early, decided by the main process, or None."""
        if not self._due(self.config.eval_every_n_steps) or self.step == self.total:
            return None
        return self.world.broadcast(str(self.patience) if self.patience.exhausted else None)

    def _one_step(self) -> dict[str, float]:
        stage = next(s for s in self.stages if self.step < s.last)
        local = self.step - stage.first
        factor = lr_factor(self.step, self.total, self.config.lr_scheduler, self.config.warmup_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor
        # Dropout's only source of chance; a resumed run draws the same.
        torch.manual_seed(flow.generator_for(self.config.seed, self.step, self.engine.stage, self.engine.replica)
                          .initial_seed())
        started = time.perf_counter()
        regime = stage.loader.schedule.group_of_step[local]
        try:
            loss = self.engine.train_step(stage.loader.step(local), (regime, self.config.micro_batch_size_per_gpu))
        except FloatingPointError as error:
            raise UserError(
                f"step {self.step + 1} ({regime}): {error}. The last checkpoint is intact. Lower optimizer.lr "
                f"(now {self.config.optimizer.lr:g}), or add warmup_steps."
            ) from error
        self.step += 1
        seconds = time.perf_counter() - started
        values = {
            "train/loss": loss, "train/grad_norm": self.guard.norm, "train/lr": self.config.optimizer.lr * factor,
            "train/step_seconds": seconds, "train/tflops": self._work(stage, local) / seconds / 1e12,
            "train/memory_gb": memory_gb(self.engine.device), f"train/{regime}_loss": loss,
        }  # fmt: skip
        if self._due(self.config.logging_steps) or self.step == self.total:
            self.trackers.log(self.step, values)
        return values

    def _work(self, stage: StageRun, step: int) -> float:
        """FLOPs of a process in a step of a stage, by the plan's arithmetic."""
        shapes = [self.samples[draw.name].target.shape for draw in stage.loader.schedule.draws(step)]
        tokens = [forecast.latent_tokens(self.model.geometry, shape) for shape in shapes]
        return sum(forecast.training_sample(self.config, self.model, count) for count in tokens) / self.world.size

    def evaluate(self) -> None:
        """Loss of each regime at nine fixed quantiles of the timesteps, with fixed noise (diffusion-pipe's names)."""
        started = time.perf_counter()
        with averaged(self.optimizer):
            values = self._losses()
        self.patience.add(self.step, values)
        values["eval/eval_time_sec"] = time.perf_counter() - started
        self.trackers.log(self.step, values)

    def _losses(self) -> dict[str, float]:
        """Of each regime at each quantile, and their means."""
        values: dict[str, float] = {}
        for regime, names in self.groups.items():
            group = [self.samples[name] for name in names]
            for quantile in QUANTILES:
                batches = (self.objective.at_quantile([sample], quantile) for sample in group)
                loss = self.engine.evaluate(batches, len(group), (regime, 1))
                values[f"{regime}/loss_quantile_{quantile:.2f}"] = loss
            losses = [values[f"{regime}/loss_quantile_{quantile:.2f}"] for quantile in QUANTILES]
            values[f"{regime}/loss"] = sum(losses) / len(losses)
        return values

    def render_preview(self) -> None:
        """The edit with the LoRA as it is, to `previews/stepN.mp4` and the trackers.

        Every process of a pipeline samples with the others; the main one decodes.
        """
        assert self.previewer is not None, "previews are planned wherever they are due"
        started = time.perf_counter()
        with averaged(self.optimizer):
            latents = self.previewer.sample(self._forward)
        if self.world.is_main:
            path = self.run / PREVIEWS / f"step{self.step}.mp4"
            self.trackers.video(self.step, "preview", self.previewer.write(latents, path))
            self.trackers.log(self.step, {"preview/seconds": time.perf_counter() - started})
        self.world.barrier()

    def _forward(self, inputs: tuple[torch.Tensor, ...], number: int) -> torch.Tensor:
        assert self.previewer is not None, "called by the previewer"
        return self.engine.predict(inputs, (1, *self.previewer.shape), ("preview", number))

    def save_state(self) -> None:
        """Full training state, resumable on any number of stages and replicas."""
        facts = {
            "model": self.model.describe(), "rank": self.config.adapter.rank, "alpha": self.config.adapter.effective_alpha,
            "seed": self.config.seed, "optimizer": type(self.optimizer).__name__,
        }  # fmt: skip
        state.save(
            self.run, self.step, self._weights_by_layer(), self.optimizer, self.engine.replica == 0, self.world, facts
        )
        self.saved_at = time.monotonic()

    def export(self) -> None:
        """The LoRA, as `stepN/adapter_model.safetensors`."""
        weights = self._gathered()
        if self.world.is_main:
            folder = self.run / f"step{self.step}"
            dtype = getattr(torch, self.config.save_dtype)
            lora.save(folder / lora.EXPORT_NAME, weights, self.model, self.metadata(), self.scale, dtype)
            write_json_atomic(folder / runs.CONFIG_COPY, self.config.model_dump(mode="json"))
        self.world.barrier()

    def _gathered(self) -> dict[str, torch.Tensor]:
        """The weights of all stages as they are meant to be used, on the main process."""
        with averaged(self.optimizer):
            mine = {name: weight.detach().to("cpu", copy=True) for name, weight in self.weights.items()}
        return {name: weight for part in self.engine.gather_stages(mine) for name, weight in part.items()}

    def metadata(self) -> dict[str, Any]:
        """What an exported LoRA says of itself."""
        config = self.config
        return {
            "model": self.model.describe(), "base_model": config.model.source.name,
            "rank": config.adapter.rank, "alpha": config.adapter.effective_alpha,
            "alpha_is_baked_in": True, "trigger": self.job.trigger,
            "mask_convention": "files: white = edit; condition: 1 = preserve", "mask_rule": config.mask_rule,
            "steps": self.step, "stages": [s.settings.model_dump(mode="json") for s in self.stages],
            "seed": config.seed, "job": self.job.fields(), "config": config.model_dump(mode="json"),
        }  # fmt: skip

    def _due(self, every: int | None) -> bool:
        return bool(every) and self.step % every == 0

    def _stage_ends(self) -> bool:
        return any(self.step == stage.last for stage in self.stages)

    def _due_checkpoint(self) -> bool:
        minutes = self.config.checkpoint_every_n_minutes
        late = minutes is not None and self.world.broadcast(time.monotonic() - self.saved_at > minutes * 60)
        return self._stage_ends() or self._due(self.config.checkpoint_every_n_steps) or late

    def _signal(self) -> str | None:
        """A signal file in the run folder, seen by the main process and told to all, so that none is left behind."""
        found = None
        if self.world.is_main:
            found = next((name for name in reversed(SIGNALS) if (self.run / name).exists()), None)
            if found:
                (self.run / found).unlink()
        return self.world.broadcast(found)

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, file=sys.stderr)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process: on the device, or resident where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def group_names(triples: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """Names of the triples of each regime."""
    return {regime: [triple.name for triple in group] for regime, group in triples.items()}
