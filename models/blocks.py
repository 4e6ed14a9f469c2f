"""Transformer blocks, and how a backward pass makes their activations again.

Between a block's input and its output only attention sees more than one token:

    shared       what all tokens share, such as keys and values of the text
    normalise    tokens to what the linears before attention read
    project      that to queries, keys and values
    attend       attention over all tokens
    finish       tokens, and what they attended to, to the block's output

So all but `attend` may run on one piece of the tokens after another. A block that is recomputed keeps its input and nothing
else (or its input and the attention's result). Its backward pass makes queries, keys, values and attention again, then goes
piece by piece through `finish`, where most activations are, among them the feed-forward's; only one piece's are there at a
time. Then come attention as a whole and, piece by piece, `project`, which is not computed a second time for it, and
`normalise`, which is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from models.eight_bit import upcast_once
from models.offload import HostInputs

if TYPE_CHECKING:
    from models.streaming import StreamedBlock

PIECE = 4096
"""Most tokens of a piece: enough for a matrix product at full pace, few beside those of a clip."""

Conditions = TypeVar("Conditions")
Tensors = tuple[Tensor, ...]
Lend = Callable[[bool], AbstractContextManager[None]]

_FUSED = {
    getattr(torch.ops.aten, name).default for name in (
        "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    )
}  # fmt: skip


class TransformerBlock(ABC, nn.Module, Generic[Conditions]):
    """One of the blocks that make up nearly all of a transformer.

    A subclass says what it does with tokens x, the fp32 residual stream (B, n, D), and with `Conditions`, all else that
    its pass depends on; these carry no gradient.

    Attributes:
        streamed: set if the weights live in host memory; such a block always recomputes.
    """

    streamed: StreamedBlock | None = None

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
        """Queries, keys and values, (B, n, H, d) each, of a piece of the tokens."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Conditions) -> Tensor:
        """Attention over all tokens, (B, N, H*d)."""

    @abstractmethod
    def finish(self, x: Tensor, attended: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        """The output (B, n, D) of a piece of the tokens."""

    def compile_pieces(self) -> None:
        """Use torch.compile for all but attention; blocks of one kind share the programs."""
        self.normalise, self.project, self.finish = (
            torch.compile(function, dynamic=False) for function in (self.normalise, self.project, self.finish)
        )

    def forward(self, x: Tensor, at: Conditions, attend: Callable[..., Tensor] | None = None) -> Tensor:
        """x (B, N, D) -> (B, N, D).

        Args:
            attend: takes the place of the method of that name.
        """
        shared, count = self.shared(at), x.shape[1]
        pieces = self.pieces(x, at, count if torch.is_grad_enabled() else PIECE)
        read = ((self.normalise(x[:, where], shared, part), part) for where, part in pieces)
        qkv = _laid_out((self.project(normalised, shared, part) for normalised, part in read), count)
        attended = (attend or self.attend)(*qkv, at)
        del qkv
        outputs = ((self.finish(x[:, where], attended[:, where], shared, part),) for where, part in pieces)
        return _laid_out(outputs, count)[0]


def slices(start: int, stop: int, most: int) -> list[slice]:
    """A range in the fewest parts of at most so many, as even as can be."""
    count = -(-(stop - start) // most)
    bounds = [start + (stop - start) * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _laid_out(pieces: Iterable[Tensors], count: int) -> Tensors:
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
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    with lend(forward), upcast_once(block, dtype) if hidden.shape[1] > PIECE else nullcontext():
        yield


def recomputed(
    block: TransformerBlock[Conditions], hidden: Tensor, at: Conditions, inputs: HostInputs | None = None,
    keep_attention: bool = False, lend: Lend = resident,
) -> Tensor:
    """`block(hidden, at)`, its activations recomputed in backward.

    The input is kept in the autocast dtype, if autocast is on: the residual stream stays fp32, what is recomputed of it is
    rounded to that dtype anyhow.

    Args:
        inputs: keeps the input until then; None: it stays on the device.
        keep_attention: do not recompute the result of fused attention.
        lend: makes a context around whatever reads the block's weights: in the forward pass (True) and in the backward pass.
    """
    again = _Again(block, at, keep_attention, lend)
    with inputs.keeping() if inputs else nullcontext():
        return _Recomputed.apply(again, hidden, *again.weights)


class _Recomputed(torch.autograd.Function):
    """A block as one node of autograd's graph."""

    @staticmethod
    def forward(ctx: Any, again: _Again, hidden: Tensor, *_weights: Tensor) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(again.to_keep(hidden))
        return again.output(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return None, *ctx.again.gradients(kept, gradient)


class _Again(Generic[Conditions]):
    """A block's forward pass, and all that its backward pass needs beside the input."""

    def __init__(self, block: TransformerBlock[Conditions], at: Conditions, keep_attention: bool, lend: Lend) -> None:
        self.block, self.at, self.lend = block, at, lend
        self.weights = [weight for weight in block.parameters() if weight.requires_grad]
        self.kind = next(block.parameters()).device.type
        self.autocast = torch.is_autocast_enabled(self.kind)
        self.dtype = torch.get_autocast_dtype(self.kind)
        self.chance = _Chance(self.kind) if any(isinstance(module, nn.Dropout) for module in block.modules()) else None
        self.attention = create_selective_checkpoint_contexts(_fused_is_kept) if keep_attention else None

    def to_keep(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype) if self.autocast else hidden

    def output(self, hidden: Tensor) -> Tensor:
        with computing(self.block, hidden, self.lend):
            return self.block(hidden, self.at, self._attend_and_keep if self.attention else None)

    def _attend_and_keep(self, *arguments: Any) -> Tensor:
        *qkv, at = arguments
        # With gradient, or the kernels leave out what their backward needs.
        with self.attention[0], torch.enable_grad():
            return self.block.attend(*(part.detach().requires_grad_() for part in qkv), at).detach()

    def gradients(self, kept: Tensor, gradient: Tensor) -> list[Tensor | None]:
        """Gradients of the input and of the weights."""
        # Casts are not cached: one that was made without gradient must not be used with it.
        autocast = torch.autocast(self.kind, self.dtype, enabled=self.autocast, cache_enabled=False)
        chance = self.chance.again() if self.chance else nullcontext()
        with autocast, computing(self.block, kept, self.lend, forward=False), chance:
            return _Backward(self, kept, gradient).run()


def _fused_is_kept(_context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _FUSED else CheckpointPolicy.PREFER_RECOMPUTE


class _Backward:
    """One backward pass of a block.

    Args:
        kept: the input (B, N, D).
        gradient: of the output, fp32; it is autograd's and not written to.
    """

    def __init__(self, again: _Again, kept: Tensor, gradient: Tensor) -> None:
        self.again, self.block, self.at = again, again.block, again.at
        self.kept, self.gradient = kept, gradient
        self.pieces = self.block.pieces(kept, self.at, PIECE)
        with torch.enable_grad():
            self.shared = self.block.shared(self.at)
        self.leaves = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.shared)
        self.sums = _Sums([*again.weights, *(leaf for leaf in self.leaves if leaf.requires_grad)])
        self.projected: list[tuple[Tensor, list[GradientEdge]]] = []
        """Of each piece what was projected, and where the gradients of its queries, keys and values go."""

    def run(self) -> list[Tensor | None]:
        """Gradients of the input, then of the weights."""
        qkv = tuple(part.requires_grad_() for part in _laid_out(self._project(), self.kept.shape[1]))
        with self.again.attention[1] if self.again.attention else nullcontext(), torch.enable_grad():
            attended = self.block.attend(*qkv, self.at)
        passed, of_attended = self._through_finish(attended.detach())
        of_qkv = torch.autograd.grad(attended, qkv, of_attended)
        del qkv, attended, of_attended
        self._through_project(of_qkv, passed)
        self._through_shared()
        return [passed, *self.sums.of(self.again.weights)]

    def _leaf(self, where: slice) -> Tensor:
        """A piece of the input, from which gradients are taken."""
        return self.kept[:, where].float().detach().requires_grad_()

    def _project(self) -> Iterator[Tensors]:
        for where, part in self.pieces:
            normalised = self.block.normalise(self._leaf(where), self.leaves, part).requires_grad_()
            with torch.enable_grad():
                qkv = self.block.project(normalised, self.leaves, part)
            self.projected.append((normalised, [get_gradient_edge(tensor) for tensor in qkv]))
            yield tuple(tensor.detach() for tensor in qkv)
            del qkv

    def _through_finish(self, attended: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients that the output's has behind attention: of the input and of what attention gave."""
        passed, of_attended = torch.empty_like(self.gradient), torch.empty_like(attended)
        for where, part in self.pieces:
            inputs = self._leaf(where), attended[:, where].detach().requires_grad_()
            with torch.enable_grad():
                output = self.block.finish(*inputs, self.leaves, part)
            passed[:, where], of_attended[:, where] = self.sums.through([output], [self.gradient[:, where]], inputs)
        return passed, of_attended

    def _through_project(self, of_qkv: Tensors, passed: Tensor) -> None:
        """Add the gradient that the input has through queries, keys and values."""
        for where, part in self.pieces:
            normalised, edges = self.projected.pop(0)
            (found,) = self.sums.through(edges, [gradient[:, where] for gradient in of_qkv], (normalised,))
            leaf = self._leaf(where)
            with torch.enable_grad():
                normalised = self.block.normalise(leaf, self.leaves, part)
            passed[:, where] += self.sums.through([normalised], [found], (leaf,))[0]

    def _through_shared(self) -> None:
        used = [tensor for tensor in self.shared if tensor.requires_grad]
        if used:
            gradients = self.sums.of([leaf for leaf in self.leaves if leaf.requires_grad])
            found = [(tensor, gradient) for tensor, gradient in zip(used, gradients, strict=True) if gradient is not None]
            self.sums.through([tensor for tensor, _ in found], [gradient.to(tensor.dtype) for tensor, gradient in found], ())


class _Sums:
    """Gradients of tensors that several pieces use, in fp32 where there are several."""

    def __init__(self, wanted: Sequence[Tensor]) -> None:
        self.wanted = list(wanted)
        self._sums: dict[int, Tensor] = {}

    def through(
        self, outputs: Sequence[Tensor] | Sequence[GradientEdge], gradients: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> Tensors:
        """Go backward from outputs: add up what is wanted, return the gradients of `inputs`."""
        found = torch.autograd.grad(outputs, [*inputs, *self.wanted], gradients, allow_unused=True)
        for tensor, gradient in zip(self.wanted, found[len(inputs) :], strict=True):
            if gradient is not None:
                before = self._sums.get(id(tensor))
                self._sums[id(tensor)] = gradient if before is None else before.float() + gradient
        return found[: len(inputs)]

    def of(self, tensors: Iterable[Tensor]) -> list[Tensor | None]:
        return [self._sums.get(id(tensor)) for tensor in tensors]


class _Chance:
    """The random numbers of a forward pass with dropout, drawn again."""

    def __init__(self, kind: str) -> None:
        self.devices = [torch.cuda.current_device()] if kind == "cuda" else []
        self.state = torch.get_rng_state()
        self.device_states = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.state)
            for device, state in zip(self.devices, self.device_states, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield
