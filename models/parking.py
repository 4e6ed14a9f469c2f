"""A loaded transformer leaves the device for a while and comes back the same: module, LoRA and compiled programs stay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from models.checkpoint import trim_heap
from models.layers import PipelineLayer
from models.streaming import Ring


def park(layers: Sequence[PipelineLayer]) -> None:
    """Move what is on the device to host memory; of blocks that are streamed from there, free the buffers.

    Between passes only. The layers cannot run until they are back.
    """
    _move(layers, torch.device("cpu"))
    for ring in _rings(layers):
        ring.park()


def unpark(layers: Sequence[PipelineLayer], device: torch.device) -> None:
    """Undo `park`, and give the host memory back."""
    for ring in _rings(layers):
        ring.unpark()
    _move(layers, device)
    trim_heap()


def sizes(layers: Sequence[PipelineLayer]) -> tuple[int, int]:
    """Bytes that `park` would move to host memory, and bytes that are there already; the buffers are neither."""
    tensors = list(_resident(layers))
    moving = sum(tensor.nbytes for tensor in tensors if tensor.device.type != "cpu")
    return moving, sum(tensor.nbytes for tensor in tensors) - moving + sum(ring.host for ring in _rings(layers))


def _move(layers: Sequence[PipelineLayer], device: torch.device) -> None:
    for tensor in _resident(layers):
        tensor.data = tensor.to(device)  # one by one, each freed before the next


def _resident(layers: Sequence[PipelineLayer]) -> Iterator[Tensor]:
    """Parameters and buffers, whether in a checkpoint or not, but for what lies in the buffers of streamed blocks."""
    buffers = {buffer.bytes.untyped_storage().data_ptr() for ring in _rings(layers) for buffer in ring.buffers}
    for layer in layers:
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.untyped_storage().data_ptr() not in buffers:
                yield tensor


def _rings(layers: Iterable[PipelineLayer]) -> set[Ring]:
    return {layer.streamed.ring for layer in layers if layer.streamed}
