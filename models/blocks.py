"""Transformer blocks.

Between a block's input and its output only attention sees more than one token:

    shared       what all tokens share, such as keys and values of the text
    normalise    tokens to what the linears before attention read
    project      that to queries, keys and values
    turn         queries and keys to what attention compares: normalised and rotated by their positions
    attend       attention over all tokens
    finish       tokens, and what they attended to, to the block's output

So all but `attend` may run on one piece of the tokens after another; and that on some heads after others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from models.eight_bit import upcast_once
from models.linears import autocast_dtype

if TYPE_CHECKING:
    from models.streaming import StreamedBlock

PIECE = 4096
"""Most tokens of a piece: enough for a matrix product at full pace, few beside those of a clip."""

Conditions = TypeVar("Conditions")
Tensors = tuple[Tensor, ...]
Lend = Callable[[bool], AbstractContextManager[None]]


class TransformerBlock(ABC, nn.Module, Generic[Conditions]):
    """One of the blocks that make up nearly all of a transformer.

    A subclass says what it does with tokens x, the fp32 residual stream (B, n, D), and with `Conditions`, all else that
    its pass depends on; these carry no gradient.

    Attributes:
        streamed: set if the weights live in host memory; such a block always recomputes.
        modulation_vectors: which of what tokens share are these, among them the gates.
    """

    streamed: StreamedBlock | None = None
    modulation_vectors = slice(None)

    @abstractmethod
    def pieces(self, x: Tensor, at: Conditions, most: int) -> list[tuple[slice, Conditions]]:
        """All tokens in order in pieces of at most so many, with the conditions of each."""

    @abstractmethod
    def shared(self, at: Conditions) -> Tensors:
        """What all tokens share."""

    @abstractmethod
    def normalise(self, x: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        """What `project` reads, (B, n, D), in the autocast dtype; without dropout, which two calls would draw differently."""

    @abstractmethod
    def project(self, normalised: Tensor, shared: Tensors, at: Conditions) -> Tensors:
        """Queries, keys and values, (B, n, H, d) each, of a piece of the tokens: linears and nothing else."""

    @abstractmethod
    def turn(self, q: Tensor, k: Tensor, at: Conditions) -> tuple[Tensor, Tensor]:
        """Queries and keys of a piece, normalised and with their positions; new tensors."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Conditions) -> Tensor:
        """Attention over all tokens, (B, N, H*d); of any number of heads, which do not see each other."""

    @abstractmethod
    def finish(self, x: Tensor, attended: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        """The output (B, n, D) of a piece of the tokens."""

    def compile_pieces(self) -> None:
        """Use torch.compile for all but attention; blocks of one kind share the programs.

        Programs are for one number of tokens at first, and from the second number on for all. `turn` gets its tensors in too
        many layouts for that: torch would give up before.
        """
        self.normalise, self.project, self.finish = (
            torch.compile(function) for function in (self.normalise, self.project, self.finish)
        )
        self.turn = torch.compile(self.turn, dynamic=True)

    def forward(self, x: Tensor, at: Conditions, attend: Callable[..., Tensor] | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D).

        Args:
            attend: takes the place of the method of that name.
        """
        shared, count = self.shared(at), x.shape[1]
        pieces = self.pieces(x, at, count if torch.is_grad_enabled() else PIECE)
        qkv = laid_out((self._qkv(x[:, where], shared, part) for where, part in pieces), count)
        attended = (attend or self.attend)(*qkv, at)
        del qkv
        outputs = ((self.finish(x[:, where], attended[:, where], shared, part),) for where, part in pieces)
        return laid_out(outputs, count)[0]

    def _qkv(self, x: Tensor, shared: Tensors, at: Conditions) -> Tensors:
        """What a piece gives to attention."""
        q, k, v = self.project(self.normalise(x, shared, at), shared, at)
        return *self.turn(q, k, at), v


def piece_count(tokens: int) -> int:
    """In how many pieces so many tokens are gone through."""
    return -(-tokens // PIECE)


def slices(start: int, stop: int, most: int) -> list[slice]:
    """A range in the fewest parts of at most so many, as even as can be."""
    count = -(-(stop - start) // most)
    bounds = [start + (stop - start) * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def laid_out(pieces: Iterable[Tensors], count: int) -> Tensors:
    """Pieces of `count` tokens one behind the other; without gradient only one of them is there at a time."""
    if torch.is_grad_enabled():
        return tuple(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True))
    whole: Tensors = ()
    start = 0
    for piece in pieces:
        size = piece[0].shape[1]
        if size == count:
            return piece
        whole = whole or tuple(part.new_empty(part.shape[0], count, *part.shape[2:]) for part in piece)
        for target, part in zip(whole, piece, strict=True):
            target[:, start : start + size] = part
        start += size
    return whole


def resident(_forward: bool) -> AbstractContextManager[None]:
    """The context of a block whose weights are always on the device."""
    return nullcontext()


@contextmanager
def computing(block: nn.Module, hidden: Tensor, lend: Lend, forward: bool = True) -> Iterator[None]:
    """Around a block's pass over tokens (B, N, D): its weights are there and, for several pieces, ready for products."""
    kind, dtype = hidden.device.type, autocast_dtype(hidden)
    upcast = upcast_once(block, dtype) if hidden.shape[1] > PIECE else nullcontext()
    # Casts are not cached: one that was made without gradient must not be used with it.
    with lend(forward), upcast, torch.autocast(kind, dtype, torch.is_autocast_enabled(kind), cache_enabled=False):
        yield
