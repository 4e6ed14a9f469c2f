"""Training steps as CUDA graphs: launching the thousand small kernels of a small model takes longer than they do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

_AS_IT_IS = 3  # calls before recording: compilation, memory and optimizer states come about in them

Shapes = tuple[torch.Size, ...]


class Replayed:
    """A function of tensors on a GPU, recorded once for each set of input shapes and replayed from then on.

    The function may change tensors in place (weights, optimizer states), as it does anew at every replay. It must not wait
    for the GPU, and what it reads of the host is frozen as it was when recorded: numbers that change belong into tensors.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self._calls: Counter[Shapes] = Counter()
        self._recorded: dict[Shapes, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function's result, of these inputs."""
        shapes = tuple(tensor.shape for tensor in inputs)
        self._calls[shapes] += 1
        if self._calls[shapes] <= _AS_IT_IS:
            return self._beside(*inputs)
        if shapes not in self._recorded:
            self._recorded[shapes] = self._record(inputs)
        graph, places, result = self._recorded[shapes]
        torch._foreach_copy_(places, list(inputs))
        graph.replay()
        return result.clone()

    def _beside(self, *inputs: Tensor) -> Tensor:
        """Run it on another stream, as before a recording everything must be."""
        stream, here = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            result = self._function(*inputs)
        here.wait_stream(stream)
        return result

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._function(*places)
        return graph, places, result
