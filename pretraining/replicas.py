"""Pretraining on several processes: `torchrun --nproc-per-node 2 -m -- pretraining.transformer ...`.

All draw the same whole batch and work on their share of it, so that a step sees the same clips and noise on any number of
processes; their gradients are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common import with_parent

T = TypeVar("T")


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Among the others, if torchrun started this process; `device` is "cpu" or "cuda".

    Leaves the group behind it: a process that ends inside while others work on is now and then aborted by gloo's threads,
    and torchrun then ends the others.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    with_parent.end_with(os.getppid())  # a killed torchrun would leave its processes waiting for each other
    if device != "cpu":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process; 0 also where it is the only one. Process 0 reports, evaluates and saves."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def own() -> slice:
    """This process's share of any sequence."""
    return slice(rank(), None, count())


def shareable(batch: int) -> int:
    """The batch, or the next larger one that all processes can share evenly."""
    return -(-batch // count()) * count()


def add(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over the processes, in one message."""
    if count() == 1 or not tensors:
        return
    message = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(message)
    parts = message.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes."""
    if count() > 1:
        add(tensors)
        torch._foreach_div_(list(tensors), count())


def agreed(mine: T) -> T:
    """What process 0 says, for what each would see at another moment: the clock, a folder that fills."""
    if count() == 1:
        return mine
    said = [mine]
    dist.broadcast_object_list(said)
    return said[0]
