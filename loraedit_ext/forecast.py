"""How much a run computes, and about how long that takes: arithmetic over matrix products and attention."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from dataset.job import EditJob
from dataset.triple import Triple
from loraedit_ext import regimes
from loraedit_ext.config import ATTENTION, RunConfig, StageSettings
from loraedit_ext.editing import guidance, pieces
from loraedit_ext.editing.sampling import computed_steps
from models.base import Flops, Geometry, I2VModel

BACKWARD = Flops(1.0, 1.0, 2.5)
"""Work of a backward pass through frozen weights, of fused attention, in that of the forward pass."""
_UNITS = (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9))
PACE = 0.5
"""Share of the rate of large products that training steps of Wan2.1-14B reached on an H200 (benchmarks/gpu.md)."""


def count_tokens(geometry: Geometry, shape: tuple[int, int, int]) -> int:
    """Video tokens of (frames, height, width)."""
    return latent_tokens(geometry, geometry.latent_shape(*shape))


def latent_tokens(geometry: Geometry, shape: Sequence[int]) -> int:
    """Video tokens of latents (C, T, h, w)."""
    return math.prod(shape[1:]) // geometry.patch**2


def forward(model: I2VModel, shape: tuple[int, int, int]) -> float:
    """FLOPs of a forward pass over a clip of (frames, height, width)."""
    return sum(model.flops(count_tokens(model.geometry, shape)))


def training_sample(config: RunConfig, model: I2VModel, tokens: int) -> float:
    """FLOPs of forward pass, backward pass and recomputation of one sample; the LoRA's own are left out, about a hundredth."""
    work = model.flops(tokens)
    again = bool(config.activation_checkpointing)
    attention_again = again and config.activation_checkpointing != ATTENTION
    return with_backward(work) + work.linears * again + work.attention * attention_again


def with_backward(work: Flops) -> float:
    """FLOPs of forward and backward pass, with nothing recomputed."""
    return sum(part * (1 + back) for part, back in zip(work, BACKWARD, strict=True))


def training(
    config: RunConfig, model: I2VModel, stages: Sequence[StageSettings],
    samples: Mapping[regimes.Regime, Sequence[Triple]], replicas: int,
) -> float:
    """FLOPs of all stages, over all replicas."""
    per_step = config.micro_batch_size_per_gpu * config.gradient_accumulation_steps * replicas
    mean = {
        regime: sum(training_sample(config, model, count_tokens(model.geometry, tuple(triple.condition.shape[1:])))
                    for triple in group) / len(group)
        for regime, group in samples.items()
    }  # fmt: skip
    return sum(
        stage.steps * per_step * sum(weight * mean[regime] for regime, weight in stage.mix.items()) / sum(stage.mix.values())
        for stage in stages
    )


def editing(config: RunConfig, model: I2VModel, job: EditJob) -> float:
    """FLOPs of the transformer in an edit."""
    planned = pieces.plan(job, config.edit.clip_frames, model.geometry.temporal_stride)
    passes = sum(computed_steps(config.edit)) * guidance.count(config.edit)
    return sum(passes * forward(model, (len(piece), *job.frames.shape[1:3])) for piece in planned)


def describe(
    trained: float, edited: float, rate: float | None, devices: int, training: str = "training"
) -> Iterator[str]:
    """Lines of the plan.

    Args:
        trained, edited: FLOPs.
        rate: FLOP/s of large products on one device, if it was measured.
        devices: that train.
        training: what of it is counted.
    """
    yield f"work      {training} {_amount(trained)}, the edit {_amount(edited)}"
    if rate:
        training_time, editing_time = _time(trained / (PACE * rate * devices)), _time(edited / (PACE * rate))
        yield (f"time      {training} about {training_time}, the edit {editing_time}, at half of the {_amount(rate)}/s that "
               "large products reach here, as an H200 did; copies that do not hide behind computing come on top")  # fmt: skip


def _amount(flops: float) -> str:
    unit, size = next((each for each in _UNITS if flops >= each[1]), _UNITS[-1])
    return f"{flops / size:.3g} {unit}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the most that can be had."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        synchronise(device)
        started = time.perf_counter()
        a @ b
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def synchronise(device: torch.device) -> None:
    """Wait until a device has computed what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
