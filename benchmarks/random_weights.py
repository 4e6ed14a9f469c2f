"""A checkpoint of random weights in memory, for benchmarks that need a model of any size and no good one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from loraedit_ext.flow import generator_for
from models.checkpoint import Entry, Shape, Tensors, slots

Draw = Callable[[str, Shape], Tensor]


def in_memory(transformer: nn.Module, draw: Draw) -> Tensors:
    """What a checkpoint's file would hold.

    Args:
        transformer: on the meta device.
        draw: a weight's values from its name and shape, the same whenever it is asked.
    """
    entries = {}
    for name, shape in slots(transformer).items():
        dtype = draw(name, shape).dtype
        entries[name] = Entry(name, Path("random"), tuple(shape), dtype, lambda n=name, s=shape: draw(n, s), mapped=False)
    return Tensors(entries, Path("random"))


def independent(name: str, shape: Shape) -> Tensor:
    """Values of its own for each weight; bf16 holds them exactly, so that storage in bf16 is no error of its own."""
    value = torch.randn(shape, generator=generator_for("weights", name))
    value = value.mul_(0.03) if len(shape) > 1 or name.endswith("bias") else value.mul_(0.1).add_(1)
    return value.bfloat16().float()


class Recurring:
    """The same numbers for every weight, drawn once: large models are there at once."""

    def __init__(self) -> None:
        self._numbers = torch.zeros(0, dtype=torch.bfloat16)

    def __call__(self, name: str, shape: Shape) -> Tensor:
        count = math.prod(shape)
        if len(self._numbers) < count:
            self._numbers = torch.randn(count, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
        value = self._numbers[:count].view(shape)
        return torch.ones_like(value) if "norm" in name and name.endswith("weight") else value
