"""Flow matching: objective, timestep sampling and samplers, in one place so that they cannot drift apart.

x_t = (1 - t) x + t eps, the model predicts the velocity v = eps - x; t = 1 is noise, t = 0 is data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from models.base import TIMESTEPS

STRATA = 20
"""Bands of equal probability that stratified sampling visits equally often."""

TimestepMethod = Literal["logit_normal", "uniform"]
SamplerName = Literal["euler", "unipc", "dpm++"]


def add_noise(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t for t (B,) and x, noise (B, ...)."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    return (1 - t) * x + t * noise


def velocity(x: Tensor, noise: Tensor) -> Tensor:
    """What the model is to predict at every t."""
    return noise - x


def loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error, over latents of weight 1 only where a weight (B,1,T,h,w) is given."""
    error = (prediction.float() - target.float()).square()
    if weight is None:
        return error.mean()
    weight = weight.expand_as(error)
    return (error * weight).sum() / weight.sum().clamp(min=1)


def apply_shift(t: Tensor, shift: float) -> Tensor:
    """Flow shift: spend more of the range at high noise, s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


@dataclass(frozen=True)
class TimestepSampler:
    """Distribution of the training noise level t, as a function of a uniform number.

    Same knobs as diffusion-pipe: `min_t` and `max_t` cut the already shifted distribution.
    """

    method: TimestepMethod = "logit_normal"
    sigmoid_scale: float = 1.0
    shift: float = 1.0
    min_t: float = 0.0
    max_t: float = 1.0

    def quantile(self, u: Tensor) -> Tensor:
        """t at quantile u in (0, 1) of the distribution."""
        low, high = (self._rank(torch.tensor(t, dtype=torch.float64)) for t in (self.min_t, self.max_t))
        u = low + u.double() * (high - low)
        t = torch.sigmoid(self.sigmoid_scale * torch.special.ndtri(u)) if self.method == "logit_normal" else u
        return apply_shift(t, self.shift).float()

    def _rank(self, t: Tensor) -> Tensor:
        """Inverse of the unbounded quantile function."""
        t = t / (self.shift - (self.shift - 1) * t)
        return torch.special.ndtr(torch.logit(t) / self.sigmoid_scale) if self.method == "logit_normal" else t


def generator_for(*key: int | str) -> torch.Generator:
    """A CPU generator that depends on `key` alone: the same on every device, rank, stage and after a resume."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def uniform_number(seed: int, stage: str, sample: int, stratified: bool) -> Tensor:
    """The uniform number behind the t of training sample number `sample` of a stage.

    Stratified: each run of `STRATA` samples visits every band once, in an order of its own.
    """
    u = torch.rand((), generator=generator_for(seed, stage, "t", sample), dtype=torch.float64)
    if not stratified:
        return u
    cycle, position = divmod(sample, STRATA)
    order = torch.randperm(STRATA, generator=generator_for(seed, stage, "strata", cycle))
    return (order[position] + u) / STRATA


def inference_sigmas(steps: int, shift: float, sampler: SamplerName) -> Tensor:
    """Shifted noise levels from 1 to 0, fp32 (steps + 1,).

    UniPC starts at 0.999 before the shift, as upstream Wan does: its first update would take the logarithm of 0.
    """
    start = 0.999 if sampler == "unipc" else 1.0
    return apply_shift(torch.linspace(start, 0.0, steps + 1, dtype=torch.float64), shift).float()


def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    sampler: SamplerName = "unipc",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Integrate the flow from noise to data.

    Args:
        predict: (x, t scalar in [0, 1]) -> velocity.
        noise: start state at sigmas[0].
        sigmas: decreasing noise levels, the last one 0 (`inference_sigmas`).
        sampler: `euler`, or diffusers' multistep `unipc` / `dpm++` as Wan uses them.
        on_step: called with (steps done, state) after each step.
    """
    step = _euler(sigmas) if sampler == "euler" else _multistep(sampler, sigmas)
    x = noise
    for index in range(len(sigmas) - 1):
        x = step(index, predict(x, sigmas[index]), x)
        if on_step:
            on_step(index + 1, x)
    return x


def _euler(sigmas: Tensor) -> Callable[[int, Tensor, Tensor], Tensor]:
    def step(index: int, v: Tensor, x: Tensor) -> Tensor:
        return x + v * (sigmas[index + 1] - sigmas[index]).to(x.device)

    return step


def _multistep(sampler: SamplerName, sigmas: Tensor) -> Callable[[int, Tensor, Tensor], Tensor]:
    scheduler = _diffusers_scheduler(sampler, sigmas)

    def step(index: int, v: Tensor, x: Tensor) -> Tensor:
        return scheduler.step(v, scheduler.timesteps[index], x, return_dict=False)[0]

    return step


def _diffusers_scheduler(sampler: SamplerName, sigmas: Tensor) -> Any:
    """diffusers' solver on exactly our noise levels (its own grids differ from upstream Wan's by up to 5e-3)."""
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    kind = UniPCMultistepScheduler if sampler == "unipc" else DPMSolverMultistepScheduler
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0)
    if sampler == "unipc":
        scheduler.set_timesteps(sigmas=sigmas[:-1].double().numpy())
    else:
        scheduler.set_timesteps(len(sigmas) - 1)
        scheduler.sigmas = sigmas
        scheduler.timesteps = (sigmas[:-1].double() * TIMESTEPS).long()
    return scheduler
