"""Inputs of recomputed blocks in host memory until they are needed (`activation_checkpointing = "offload"`).

A block keeps its input for its recomputation (models/blocks.py); hooks on saved tensors put that input into host memory
instead. It is copied out behind the forward pass and back ahead of the backward pass, where each block fetches the
input of the block before it. At most `ON_DEVICE` inputs are on the device beside those that a block computes with: on
their way out, or back and waiting. What comes back is what went, to the bit.

Ordering on a GPU: all copies, of either direction, run in order on one stream. Each begins after what the computing
stream was told before it, and the computing stream waits for it before its device tensor is used or freed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from models.pinned import HostAllocator

ON_DEVICE = 2
_PIECE = 16 << 20
"""Bytes of one host allocation: a power of two, which page-locked memory is rounded up to, and small beside an input."""

class HostInputs:
    """Inputs of blocks in host memory, between their forward pass and their recomputation.

    The memory is allocated when first needed and used again from then on; it is lent for as long as autograd's graph
    holds the block, so it comes back after a backward pass as after an error.

    Args:
        device: where the blocks compute.

    Attributes:
        copied: bytes copied so far, out and back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.copied = 0
        self._host = HostAllocator(device, "activation_checkpointing = 'offload'")
        self._free: list[Tensor] = []
        self._numbers = itertools.count()
        self._kept: WeakValueDictionary[int, _Kept] = WeakValueDictionary()
        self._here: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}
        """Inputs on the device by number, oldest first, with the end of the copy that is under way."""
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def allocated(self) -> int:
        """Bytes of host memory."""
        return self._host.allocated

    @property
    def lent(self) -> int:
        """Those of them that hold an input."""
        return self.allocated - sum(len(piece) for piece in self._free)

    def keeping(self) -> saved_tensors_hooks:
        """Context in which what autograd saves, here a checkpoint's input, goes to the host."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, hidden: Tensor) -> _Kept | Tensor:
        if not hidden.numel():  # a placeholder, which torch 2.11 saves beside the input
            return hidden
        tensor = hidden.detach().contiguous()
        kept = _Kept(self, next(self._numbers), tensor, self._take(tensor.nbytes))
        self._kept[kept.number] = kept
        self._make_room()
        self._copy(kept, tensor, back=False)
        return kept

    def _unpack(self, kept: _Kept | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._fetch(kept)
        tensor = self._leave(kept.number)
        before = self._kept.get(kept.number - 1)
        if before is not None:
            self._fetch(before)
        return tensor

    def _take(self, size: int) -> list[Tensor]:
        count = -(-size // _PIECE)
        while len(self._free) < count:
            self._free.append(self._host.allocate(_PIECE))
        return [self._free.pop() for _ in range(count)]

    def forget(self, kept: _Kept) -> None:
        """The graph has let go of an input; its memory is free for others."""
        if kept.number in self._here:
            self._leave(kept.number)
        self._free += kept.pieces

    def _fetch(self, kept: _Kept) -> None:
        """Begin to copy an input to the device, if it is not there."""
        if kept.number in self._here:
            return
        self._make_room()
        self._copy(kept, torch.empty(kept.shape, dtype=kept.dtype, device=self.device), back=True)

    def _make_room(self) -> None:
        """For one more input on the device."""
        while len(self._here) >= ON_DEVICE:
            self._leave(next(iter(self._here)))

    def _leave(self, number: int) -> Tensor:
        """Let go of an input on the device; from here on it may be used and freed like any tensor."""
        tensor, over = self._here.pop(number)
        if over is not None:
            torch.cuda.current_stream(self.device).wait_event(over)
        return tensor

    def _copy(self, kept: _Kept, tensor: Tensor, back: bool) -> None:
        with self._copying():
            for piece, part in zip(kept.pieces, tensor.view(-1).view(torch.uint8).split(_PIECE), strict=True):
                target, source = (part, piece[: len(part)]) if back else (piece[: len(part)], part)
                target.copy_(source, non_blocking=True)
        self._here[kept.number] = tensor, self._copies.record_event() if self._copies else None
        self.copied += tensor.nbytes

    @contextmanager
    def _copying(self) -> Iterator[None]:
        if self._copies is None:
            yield
            return
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            yield


class _Kept:
    """What autograd holds in place of a block's input."""

    def __init__(self, home: HostInputs, number: int, tensor: Tensor, pieces: list[Tensor]) -> None:
        self.home, self.number, self.pieces = home, number, pieces
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def __del__(self) -> None:
        self.home.forget(self)
