"""Restart sampling: back up in noise and down again, several times, before going on (Xu et al. 2023, arXiv 2306.14878).

Forgetting part of what was drawn and drawing it anew undoes errors that solving the flow once adds up. Tiny models make many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

Restart = tuple[float, float, int]
"""Noise levels low and high, and how many times to go from the one to the other and back."""
RESTARTS: tuple[Restart, ...] = ((0.85, 0.97, 4), (0.4, 0.8, 3))
"""First where a motion is chosen, then where shapes are carried along it; found by looking (docs/experiments.md)."""


def levels(sigmas: Sequence[float], restarts: Sequence[Restart]) -> list[float]:
    """The way of the noise level from 1 to 0: down `sigmas`, where it is not up again.

    Args:
        sigmas: decreasing noise levels from 1 to 0.
        restarts: those of the highest levels first.
    """
    way = [sigmas[0]]

    def descend(low: float) -> None:
        way.extend([*(level for level in sigmas if low < level < way[-1]), low])

    for low, high, times in restarts:
        descend(low)
        for _ in range(times):
            way.append(high)
            descend(low)
    descend(sigmas[-1])
    return way


def sample(
    predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, way: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Euler's method where the way goes down, fresh noise where it goes up.

    Args:
        predict: (x, t scalar in [0, 1]) -> velocity.
        noise: start state at level 1.
        way: of `levels`.
        generator: of the fresh noise, on the CPU.
    """
    x = noise
    for level, following in pairwise(way):
        if following < level:
            x = x + predict(x, torch.tensor(level)) * (following - level)
        else:
            x = raised(x, level, following, torch.randn(x.shape, generator=generator).to(x))
    return x


def raised(x: Tensor, level: float, higher: float, noise: Tensor) -> Tensor:
    """x of a noise level at a higher one: as if its clean part had been given that level's noise to begin with."""
    share = (1 - higher) / (1 - level)
    return share * x + (higher**2 - (share * level) ** 2) ** 0.5 * noise
