"""What a run will do, told before it does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from dataset.job import EditJob
from dataset.triple import Triple
from loraedit_ext import forecast, regimes
from loraedit_ext.config import ATTENTION, OFFLOAD, EditSettings, RunConfig, StageSettings
from loraedit_ext.editing import guidance, pieces
from loraedit_ext.editing.compositing import is_laid_back, result_size
from loraedit_ext.editing.sampling import computed_steps
from loraedit_ext.training.optim import lr_factor
from models.base import I2VModel
from models.blocks import piece_count
from models.layers import PipelineLayer
from models.offload import ON_DEVICE
from models.streaming import BUFFERS, streamed_blocks

GB = 1e9
STREAM_BYTES = 4
"""Of the fp32 residual stream, per token and channel."""
KEPT_ROWS = 27.3
"""Rows kept per block without activation checkpointing, where a row is one activation of the model's width in the compute
dtype (benchmarks/activations.md has this and the following ones)."""
ATTENTION_ROWS = 1.02
"""Rows of attention's result and of what its backward needs beside it."""
WORKING_ROWS, PIECE_ROWS, INTEGER_ROWS = 10.7, 22.5, 13.6
"""Rows alive at the peak of a block's backward: for all tokens, for a piece of them, and more if it multiplies integers."""
ATTENDING_ROWS = 14.4
"""Rows alive in the backward of attention, which are the most if there are many pieces."""
PLAIN_ROWS = 7.5
"""The same beside what is kept of the block, if nothing is recomputed."""
OPTIMIZER_BYTES = 16
"""Per LoRA weight: fp32 weight, gradient, and AdamW's two moments."""
HEADROOM = 0.92
"""Share of a device's memory that a run may be predicted to need: the rest is the CUDA context's and the allocator's."""

FASTER = 1.5
"""Times the rate that a model was trained at, beyond which a clip's motion is plainly slower than what it knows."""


def stages(config: RunConfig, job: EditJob) -> list[StageSettings]:
    """The configured stages, or the paper's: 100 steps of motion, then 100 with appearance if later frames were edited.

    Raises:
        UserError: a stage mixes in appearance, but no frame behind the first was edited.
    """
    later = any(edited.index > 0 for edited in job.edited_frames)
    chosen = list(config.stage)
    if not chosen:
        chosen = [StageSettings(name="motion", steps=100, mix={"motion": 1})]
        if later:
            chosen.append(StageSettings(name="appearance", steps=100, mix={"motion": 1, "appearance": 9}))
    if any("appearance" in stage.mix for stage in chosen) and not later:
        raise UserError(
            f"job {job.name}: a stage trains on appearance, but no frame behind the first is edited. "
            "Add an [[edited_frame]] with frame > 0, or take appearance out of the mix."
        )
    return chosen


def remaining(chosen: Sequence[StageSettings], done: int) -> list[StageSettings]:
    """The stages with the steps alone that are left of them behind step `done` of the run."""
    ends = accumulate(stage.steps for stage in chosen)
    return [
        stage.model_copy(update={"steps": min(stage.steps, max(0, end - done))})
        for stage, end in zip(chosen, ends, strict=True)
    ]


def triples(job: EditJob, chosen: Sequence[StageSettings]) -> dict[regimes.Regime, list[Triple]]:
    """The samples of every regime that a stage uses."""
    used = [regime for regime in regimes.REGIMES if any(regime in stage.mix for stage in chosen)]
    return {regime: regimes.BUILDERS[regime](job) for regime in used}


@dataclass(frozen=True)
class Memory:
    """Predicted device memory of one training process, in bytes; arithmetic, not measurement."""

    weights: float
    adapter: float
    activations: float
    host: float = 0.0
    """Host memory of the streamed blocks' weights."""
    streamed: int = 0
    """Blocks that `blocks_to_swap` streams."""
    copied: float = 0.0
    """Bytes of them that go to the device for each micro-batch of a training step."""
    inputs: float = 0.0
    """Host memory of blocks' inputs that wait for their recomputation."""
    offloaded: float = 0.0
    """Bytes of them that leave the device for each micro-batch; all but the last two come back."""

    @property
    def total(self) -> float:
        return self.weights + self.adapter + self.activations

    @property
    def on_host(self) -> float:
        """Host memory beside what any run takes."""
        return self.host + self.inputs


def predict_memory(
    config: RunConfig, model: I2VModel, transformer: nn.Module, tokens: int, width: int, blocks: int
) -> Memory:
    """Predict the memory of the fullest pipeline stage.

    Args:
        transformer: with the LoRA injected, on any device.
        tokens: video tokens of the largest sample.
        width, blocks: of the transformer.

    Raises:
        UserError: the model has too few blocks for `blocks_to_swap`.
    """
    layers = transformer.layers()
    sizes = [_frozen_bytes(layer, config, model) for layer in streamed_blocks(layers, config.blocks_to_swap)]
    frozen = sum(_frozen_bytes(layer, config, model) for layer in layers) - sum(sizes) + BUFFERS * max(sizes, default=0)
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    compute = torch.finfo(getattr(torch, config.model.dtype)).bits // 8
    values = tokens * width * config.micro_batch_size_per_gpu
    share, pieces = 1 / config.pipeline_stages, piece_count(tokens)
    kept, inputs, offloaded = _kept(config, values * compute, values * STREAM_BYTES, blocks)
    of_piece = PIECE_ROWS + INTEGER_ROWS * config.model.int8_matmul
    working = values * compute * max(WORKING_ROWS + of_piece / pieces, ATTENDING_ROWS)
    if pieces > 1 and not config.model.int8_matmul:
        working += compute * max(_eight_bit_weights(layer, config, model) for layer in layers[1:-1])
    return Memory(
        weights=frozen * share,
        adapter=trained * OPTIMIZER_BYTES * share,
        activations=kept + (working if config.activation_checkpointing else values * compute * PLAIN_ROWS),
        host=sum(sizes), streamed=len(sizes), copied=sum(sizes[BUFFERS:]) + sum(sizes[:-BUFFERS]),
        inputs=inputs, offloaded=offloaded,
    )


def _kept(config: RunConfig, row: float, stream: float, blocks: int) -> tuple[float, float, float]:
    """Bytes kept between forward and backward on the device and on the host, and those offloaded for each micro-batch.

    Args:
        row: bytes of one activation of the model's width in the compute dtype, such as a block's input.
        stream: bytes of the residual stream between two layers.
    """
    stages = config.pipeline_stages
    in_flight = min(stages, config.gradient_accumulation_steps)
    held = blocks / stages * in_flight
    if not config.activation_checkpointing:
        return row * KEPT_ROWS * held, 0.0, 0.0
    bounds = 2 * in_flight * stream if stages > 1 else 0.0  # DeepSpeed holds what a stage got and what it sent on
    if config.activation_checkpointing != OFFLOAD:
        attention = ATTENTION_ROWS if config.activation_checkpointing == ATTENTION else 0.0
        return row * (1 + attention) * held + bounds, 0.0, 0.0
    return row * min(ON_DEVICE, held) + bounds, row * held, row * blocks / stages


def _frozen(layer: PipelineLayer, config: RunConfig, model: I2VModel) -> Iterator[tuple[int, int]]:
    """Numbers and bytes a number of each frozen parameter."""
    dtype, linears = config.model.storage
    for name, parameter in layer.original_parameters():
        if not parameter.requires_grad:
            yield parameter.numel(), model.dtype_of(name.replace(".base_layer", ""), dtype, linears).itemsize


def _frozen_bytes(layer: PipelineLayer, config: RunConfig, model: I2VModel) -> int:
    return sum(count * size for count, size in _frozen(layer, config, model))


def _eight_bit_weights(layer: PipelineLayer, config: RunConfig, model: I2VModel) -> int:
    """Weights of a block that are stored in 8 bits: while its pieces are computed they are there upcast as well."""
    return sum(count for count, size in _frozen(layer, config, model) if size == 1)


@dataclass(frozen=True)
class Machine:
    """What a process may use here, in bytes; None where it is not known."""

    device: float | None = None
    host: float | None = None
    rate: float | None = None
    """FLOP/s of large products in bf16."""


def advice(config: RunConfig, predict: Callable[[RunConfig], Memory], blocks: int, machine: Machine) -> Iterator[str]:
    """What to change if a run will not fit.

    Args:
        predict: memory of the same run with another configuration.
        blocks: of the transformer.
    """
    memory = predict(config)
    if machine.host is not None and memory.on_host > machine.host:
        yield _host_advice(config, memory, machine.host)
    if machine.device is None or memory.total <= HEADROOM * machine.device:
        return
    yield f"will not fit: the device has {machine.device / GB:.1f} GB, of which {HEADROOM:.0%} can be used; what helps:"
    if config.activation_checkpointing in (False, ATTENTION):
        yield f"- activation_checkpointing = true: {_needs(predict(_with(config, activation_checkpointing=True)))}"
    if config.activation_checkpointing != OFFLOAD:
        yield f"- activation_checkpointing = '{OFFLOAD}': {_needs(predict(_with(config, activation_checkpointing=OFFLOAD)))}"
    if config.pipeline_stages > 1:
        yield "- more pipeline_stages (blocks_to_swap needs one)"
    elif config.activation_checkpointing:
        yield _swap_advice(config, predict, blocks, machine.device)
    if config.model.transformer_dtype not in ("float8", "int8"):
        yield _float8_advice(config, predict, blocks, machine.device)
    yield "- fewer tokens: a smaller size or fewer frames in the job, or its clip_frames"


def room(config: RunConfig, predict: Callable[[RunConfig], Memory], machine: Machine) -> Iterator[str]:
    """What a device has room for that saves time."""
    if config.activation_checkpointing is not True or config.blocks_to_swap or machine.device is None:
        return
    more = predict(_with(config, activation_checkpointing=ATTENTION))
    if more.total <= HEADROOM * machine.device:
        yield f"there is room for activation_checkpointing = '{ATTENTION}', which is faster: {_needs(more)}"


def _float8_advice(config: RunConfig, predict: Callable[[RunConfig], Memory], blocks: int, device: float) -> str:
    """8 bits, and what they need beside them for the run to fit."""
    eight = _with(config, model=config.model.model_copy(update={"transformer_dtype": "float8"}))
    advised, alone = "- model.transformer_dtype = 'float8'", predict(eight)
    if alone.total <= HEADROOM * device or config.pipeline_stages > 1 or not config.activation_checkpointing:
        return f"{advised}: {_needs(alone)}"
    return f"{advised}, {_swap_advice(eight, predict, blocks, device).removeprefix('- ')}"


def _swap_advice(config: RunConfig, predict: Callable[[RunConfig], Memory], blocks: int, device: float) -> str:
    """The fewest blocks to swap with which the run fits, with inputs offloaded if it must be, or that none are enough."""
    for keeping in dict.fromkeys((config.activation_checkpointing, OFFLOAD)):
        beside = "" if keeping == config.activation_checkpointing else f" with activation_checkpointing = '{keeping}'"
        for count in range(config.blocks_to_swap + 1, blocks - BUFFERS + 1):
            found = predict(_with(config, blocks_to_swap=count, activation_checkpointing=keeping))
            if found.total <= HEADROOM * device:
                return f"- blocks_to_swap = {count}{beside}: {_needs(found)}"
    return f"- blocks_to_swap, but not alone: {max(0, blocks - BUFFERS)}, the most, are not enough"


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    return config.model_copy(update=changes)


def _needs(memory: Memory) -> str:
    beside = f", and {memory.on_host / GB:.1f} GB of host memory" if memory.on_host else ""
    return f"about {memory.total / GB:.1f} GB{beside}"


def _host_advice(config: RunConfig, memory: Memory, available: float) -> str:
    """What to change if host memory is too small."""
    causes, cures = [], []
    if memory.inputs:
        causes.append(f"activation_checkpointing = '{OFFLOAD}' ({memory.inputs / GB:.1f} GB)")
        cures.append("set activation_checkpointing = true")
    if memory.host:
        causes.append(f"blocks_to_swap = {config.blocks_to_swap} ({memory.host / GB:.1f} GB)")
        cures.append("lower blocks_to_swap, or set model.transformer_dtype = 'float8'")
    return (f"{' and '.join(causes)} needs {memory.on_host / GB:.1f} GB of host memory a process, "
            f"{available / GB:.1f} GB are available: {', or '.join(cures)}")


def clip_notes(job: EditJob, model: I2VModel, at_once: int) -> Iterator[str]:
    """In what the clip is unlike what the model was trained on, and what to change.

    Args:
        at_once: frames of the longest piece that is trained on or edited.
    """
    rate, count = float(job.fps), len(job.frames)
    if rate > FASTER * model.trained_fps:
        every = round(rate * job.every / model.trained_fps)
        slower = rate * job.every / every
        yield (f"{model.family} was trained on {model.trained_fps} frames a second; at {rate:.4g} the {count} frames are "
               f"{count / rate:.1f} s, of motion that looks slow to it: every = {every} in the job makes it {slower:.4g}, "
               f"and {count} frames {count / slower:.1f} s; prepare.py --every {every} makes the masks for it")  # fmt: skip
    if at_once > model.trained_frames:
        yield (f"{at_once} frames at once are beyond the {model.trained_frames} that {model.family} was trained on: what is "
               "made may repeat itself or fall apart. Train on clips (`clip_frames` in the job) and edit in pieces "
               "(edit.clip_frames), take fewer frames, or cover the same time with a larger `every`")  # fmt: skip


def warmup_notes(config: RunConfig, chosen: Sequence[StageSettings]) -> Iterator[str]:
    """A warm-up that does not end within the run."""
    if config.warmup_steps > (total := sum(stage.steps for stage in chosen)):
        reached = config.optimizer.lr * lr_factor(total - 1, total, config.lr_scheduler, config.warmup_steps)
        yield (f"warmup_steps = {config.warmup_steps} is longer than the run, {total} steps: its learning rate grows to "
               f"{reached:.2g}, not to optimizer.lr = {config.optimizer.lr:g}; lower warmup_steps")  # fmt: skip


def describe(
    config: RunConfig, job: EditJob, model: I2VModel, chosen: Sequence[StageSettings],
    samples: Mapping[regimes.Regime, Sequence[Triple]], cached: int, transformer: nn.Module, replicas: int,
    machine: Machine, done: int = 0,
) -> str:
    """The plan, as text; of a run that is resumed at step `done` with the work that is left."""
    names = {regime: [t.name for t in group] for regime, group in samples.items()}
    per_step = config.micro_batch_size_per_gpu * config.gradient_accumulation_steps * replicas
    trained = sum(p.numel() for p in transformer.parameters() if p.requires_grad)
    width, height = job.size
    tokens = forecast.count_tokens(model.geometry, (max(len(c) for c in job.clips), height, width))
    blocks = len(transformer.layers()) - 2

    def predict(changed: RunConfig) -> Memory:
        return predict_memory(changed, model, transformer, tokens, transformer.config.dim, blocks)

    memory = predict(config)
    planned = pieces.plan(job, config.edit.clip_frames, model.geometry.temporal_stride)
    at_once = max(map(len, (*planned, *job.clips)))
    total = len([t for group in samples.values() for t in group])
    left = remaining(chosen, done)
    lines = [
        f"model     {config.model.type} from {config.model.source}: "
        + ", ".join(f"{k} {v}" for k, v in model.describe().items() if k != "family"),
        f"layout    {model.checkpoint.describe_layout()}",
        *([f"levels    noise levels from {config.model.min_t:g} to {config.model.max_t:g}"] * bool(config.model.expert)),
        *(f"job       {choice}" for choice in job.choices),
        describe_sampling(config.edit), describe_result(job, config.edit), *pieces.describe(planned),
        *(f"note      {note}" for note in (*clip_notes(job, model, at_once), *warmup_notes(config, chosen))),
        *(f"samples   {regime}: {', '.join(group)}" for regime, group in names.items()),
        f"latents   {tokens} tokens in the largest sample; cache: {cached} of {total} samples are there",
        *(f"stage     {stage.name}: {stage.steps} steps{f', {rest.steps} left' if done else ''}, {per_step} sample(s) a "
          "step, mix " + ", ".join(f"{r} {weight:g}" for r, weight in stage.mix.items())
          for stage, rest in zip(chosen, left, strict=True)),
        f"lora      rank {config.adapter.rank}, {trained:,} trainable weights; {config.optimizer.type}, "
        f"lr {config.optimizer.lr:g}",
        f"processes {config.pipeline_stages} pipeline stage(s) x {replicas} replica(s)",
        f"memory    about {memory.total / GB:.2f} GB a process (weights {memory.weights / GB:.2f}, LoRA and optimizer "
        f"{memory.adapter / GB:.2f}, activations {memory.activations / GB:.2f})",
        *([f"swapped   {memory.streamed} of {blocks} blocks take turns in two buffers on the device: {memory.host / GB:.2f} GB "
           f"of host memory a process, {memory.copied / GB:.2f} GB copied for each micro-batch"] * bool(memory.streamed)),
        *([f"offloaded the blocks' inputs wait in host memory: {memory.inputs / GB:.2f} GB a process, "
           f"{memory.offloaded / GB:.2f} GB copied out for each micro-batch, and back"] * bool(memory.inputs)),
        *(f"memory    {line}" for line in advice(config, predict, blocks, machine)),
        *(f"memory    {line}" for line in room(config, predict, machine)),
        *forecast.describe(
            forecast.training(config, model, left, samples, replicas), forecast.editing(config, model, job), machine.rate,
            config.pipeline_stages * replicas, f"training from step {done} on" if done else "training",
        ),
    ]
    return "\n".join(lines)


def describe_result(job: EditJob, settings: EditSettings) -> str:
    """The size that the edited video will have."""
    width, height = result_size(job, settings)
    if job.fit.whole:
        why = "as the source"
    elif is_laid_back(job, settings):
        (w, h), (left, top, *crop) = job.size, job.crop
        scaled = "" if (w, h) == (*crop,) else f" is scaled from {w}x{h} to {crop[0]}x{crop[1]} and"
        why = f"as the source: what is made{scaled} is laid over the source's own frames at ({left}, {top})"
    else:
        why = "the size that the model works at, as " + ("edit.size" if settings.composite else "edit.composite") + " asks"
    return f"result    {width}x{height}, {why}"


def check_passes(settings: EditSettings, processes: int) -> None:
    """Refuse more processes than an edit has work for.

    Raises:
        UserError: one would have no pass.
    """
    if processes > (passes := guidance.count(settings)):
        raise UserError(
            f"{processes} processes for an edit of {passes} pass(es) a step: each process takes a pass of guidance, so start "
            f"at most {passes} (edit.guidance and edit.source_guidance take one each unless they are 1)."
        )


def describe_sampling(settings: EditSettings, processes: int = 1) -> str:
    """How often an edit will ask the model."""
    computed = sum(computed_steps(settings))
    of = "" if computed == settings.steps else f" of {settings.steps}"
    turns = f" on {processes} devices" if processes > 1 else ""
    return f"sampling  {computed}{of} steps x {guidance.count(settings)} pass(es){turns}, {settings.sampler}"


def describe_resume(folder: Path, done: int, chosen: Sequence[StageSettings]) -> str:
    """From which step of how many a run goes on."""
    left = max(0, sum(stage.steps for stage in chosen) - done)
    return f"resumes   {folder}, at step {done}: steps left: {left or 'none'}"


def describe_files(run: Path, chosen: Sequence[StageSettings], done: int = 0) -> str:
    """Files that the run will write from step `done` on."""
    ends = [end for end in accumulate(stage.steps for stage in chosen) if end > done]
    steps = [*(f"step{end}/ and global_step{end}/" for end in ends), *(["latest"] * bool(ends))]
    return f"writes    {run}: " + ", ".join([*steps, "config.json", "metrics.jsonl", "tensorboard events"])
