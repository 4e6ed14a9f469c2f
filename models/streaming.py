"""One-way streaming of frozen blocks: their weights live in host memory, and two buffers on the device take turns.

Streamed block k computes in buffer k % 2; its parameters are views of that buffer for good, only the bytes under them
change. A block is lent its buffer while it computes, in the forward pass and in the backward pass. A buffer that comes
back is refilled at once with the block that needs it next, on a copy stream of its own, while the other one computes.
Weights never travel back. Where both passes turn, the buffers hold what is needed, so with N + 2 streamed blocks a
training step copies N blocks forward and N backward for each micro-batch. At the end of a pass no copy is under way: what
was fetched was used, so the buffers may be freed like any memory.

Ordering on a GPU is by two events a buffer and nothing else: `ready` (filled) and `free` (no kernel reads it any more).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from common.errors import UserError
from models.checkpoint import place
from models.layers import PipelineLayer
from models.pinned import HostAllocator

BUFFERS = 2
_ALIGNMENT = 256
"""Bytes at whose multiples tensors begin, as in CUDA's own allocations."""
_PIECE = 64 << 20
"""Bytes of one host allocation: a power of two, which page-locked memory is rounded up to."""


def streamed_blocks(layers: Sequence[PipelineLayer], count: int) -> list[PipelineLayer]:
    """The blocks to stream so that `count` fewer stay on the device, evenly spread so that copies have time.

    Args:
        layers: the transformer's whole chain.
        count: `blocks_to_swap`. Two more are streamed, for the buffers take the place of two.

    Raises:
        UserError: the model has not so many blocks.
    """
    blocks = layers[1:-1]
    if count > max(0, len(blocks) - BUFFERS):
        raise UserError(
            f"blocks_to_swap = {count}: the model has {len(blocks)} blocks, and two are on the device at any time; "
            f"expected at most {max(0, len(blocks) - BUFFERS)}. Lower blocks_to_swap."
        )
    wanted = count + BUFFERS if count else 0
    # From the end: the first block, whose input needs no gradient of its own, comes last.
    return [blocks[-1 - index * len(blocks) // wanted] for index in reversed(range(wanted))]


def block_bytes(sizes: Sequence[int]) -> int:
    """What tensors of these sizes take in a buffer."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


class HostMemory:
    """Weights of blocks in host memory, page-locked where a GPU shall read them.

    Args:
        device: that they will be copied to.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.layers: list[PipelineLayer] = []
        self.blocks: list[list[Tensor]] = []
        self._host = HostAllocator(device, "blocks_to_swap")

    def take(self, layer: PipelineLayer) -> None:
        """Take over the weights of a layer that was loaded on the CPU; it keeps their shapes on the meta device."""
        layout = list(_layout(layer))
        _, last, offset = layout[-1]
        size = offset + block_bytes([last.nbytes])
        pieces = [self._host.allocate(min(_PIECE, size - start)) for start in range(0, size, _PIECE)]
        for name, tensor, offset in layout:
            _write(pieces, offset, tensor.detach().reshape(-1).view(torch.uint8))
            place(layer, name, torch.empty_like(tensor, device="meta"))
        self.layers.append(layer)
        self.blocks.append(pieces)

    def serve(self) -> None:
        """Put the buffers on the device and the layers' parameters into them; from here on the layers can run."""
        if not self.layers:
            return
        ring = Ring(self.blocks, self.device)
        for number, layer in enumerate(self.layers):
            buffer = ring.buffers[number % BUFFERS].bytes
            for name, tensor, offset in list(_layout(layer)):
                place(layer, name, buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            layer.block.streamed = StreamedBlock(ring, number)


def _layout(layer: PipelineLayer) -> Iterator[tuple[str, Tensor, int]]:
    """Name, tensor and first byte of each of a layer's weights."""
    offset = 0
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        yield name, tensor, offset
        offset += block_bytes([tensor.nbytes])


def _write(pieces: Sequence[Tensor], offset: int, data: Tensor) -> None:
    """Write bytes from `offset` on over the bounds of pieces."""
    while len(data):
        index, start = divmod(offset, _PIECE)
        part = pieces[index][start : start + len(data)]
        part.copy_(data[: len(part)])
        offset, data = offset + len(part), data[len(part) :]


class _Buffer:
    """One of the device's buffers."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self.holds: int | None = None
        """Number of the block whose weights are in it, or on their way."""
        self.lent = False
        self.ready = self.free = None
        if device.type == "cuda":
            self.ready, self.free = torch.cuda.Event(), torch.cuda.Event()


class Ring:
    """The device's buffers, and who is in which.

    Args:
        blocks: host pieces of each streamed block, in the order of computation.

    Attributes:
        copied: bytes copied to the device so far.
    """

    def __init__(self, blocks: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        self.blocks, self.device = blocks, device
        size = max(sum(len(piece) for piece in pieces) for pieces in blocks)
        self.buffers = [_Buffer(size, device) for _ in range(BUFFERS)]
        self.copied = 0
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def host(self) -> int:
        """Bytes of host memory."""
        return sum(len(piece) for pieces in self.blocks for piece in pieces)

    def park(self) -> None:
        """Free the memory of the buffers, between passes; the blocks' parameters stay views of them."""
        for buffer in self.buffers:
            buffer.bytes.untyped_storage().resize_(0)
            buffer.holds = None

    def unpark(self) -> None:
        """Undo `park`."""
        for buffer in self.buffers:
            buffer.bytes.untyped_storage().resize_(buffer.bytes.nbytes)

    def acquire(self, number: int) -> None:
        """Lend a block its buffer, filled."""
        if number == 0:
            self._fill()
        self._fetch(number)
        buffer = self.buffers[number % BUFFERS]
        if buffer.lent:
            raise RuntimeError(f"streamed block {number} is already computing")
        buffer.lent = True
        if buffer.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(buffer.ready)

    def release(self, number: int, following: int) -> None:
        """Take a block's buffer back and refill it with block `following`, if there is one of that number."""
        buffer = self.buffers[number % BUFFERS]
        if not buffer.lent or buffer.holds != number:
            raise RuntimeError(f"streamed block {number} gives back a buffer that it was not lent")
        buffer.lent = False
        if buffer.free is not None:
            buffer.free.record(torch.cuda.current_stream(self.device))
        if 0 <= following < len(self.blocks):
            self._fetch(following)

    def _fill(self) -> None:
        """Fetch the first blocks of a forward pass; at the end of a backward pass they are there already."""
        for number in range(BUFFERS):
            self._fetch(number)

    def _fetch(self, number: int) -> None:
        buffer = self.buffers[number % BUFFERS]
        if buffer.holds == number:
            return
        if buffer.lent:
            raise RuntimeError(f"streamed block {number} would overwrite block {buffer.holds} while it computes")
        with self._copying(buffer):
            for piece, part in self._parts(number):
                part.copy_(piece, non_blocking=True)
                self.copied += len(piece)
        buffer.holds = number

    def _parts(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """A block's pieces on the host and their places on the device."""
        for piece, part in zip(self.blocks[number], self.buffers[number % BUFFERS].bytes.split(_PIECE), strict=False):
            yield piece, part[: len(piece)]

    @contextmanager
    def _copying(self, buffer: _Buffer) -> Iterator[None]:
        if self._copies is None:
            yield
            return
        if buffer.holds is None:  # after whatever used its memory before: kernels, a broadcast of all parameters
            buffer.free.record(torch.cuda.current_stream(self.device))
        self._copies.wait_event(buffer.free)
        with torch.cuda.stream(self._copies):
            yield
        buffer.ready.record(self._copies)

    def store(self, number: int) -> None:
        """Write a lent block's weights, changed on the device, to the host."""
        for piece, part in self._parts(number):
            piece.copy_(part)


class StreamedBlock:
    """What a block knows of its streamed weights."""

    def __init__(self, ring: Ring, number: int) -> None:
        self.ring, self.number = ring, number

    @contextmanager
    def lent(self, forward: bool = True) -> Iterator[None]:
        """The block's weights on the device.

        Args:
            forward: in a forward pass; else in a backward pass, in which the block before comes next.
        """
        self.ring.acquire(self.number)
        try:
            yield
        finally:
            self.ring.release(self.number, self.number + (BUFFERS if forward else -BUFFERS))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """The block's weights on the device, to be changed in place for good."""
        with self.lent():
            yield
            self.ring.store(self.number)

