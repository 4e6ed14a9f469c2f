"""Blocks that make their activations again in backward, a piece of the tokens at a time.

Such a block keeps its input and nothing else (or its input and the attention's result). Its backward pass

1. makes queries, keys and values again, and attention (unless that was kept),
2. goes piece by piece through `finish`, where most activations are, among them the feed-forward's,
3. goes through attention, a group of heads after the other, each laying its gradients over the queries, keys and values
   that nobody reads any more,
4. goes piece by piece through `turn`, `project` and `normalise`.

No linear and no attention is computed a third time. The graphs of attention and of `project` wait through step 2, so they
hold none of their inputs (`_Unheld`): these are cheap to make again from the block's input and from the queries and keys
that `project` gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from models import blocks
from models.blocks import Conditions, Lend, Tensors, TransformerBlock, computing, laid_out, resident, slices
from models.linears import outputs_omitted
from models.offload import HostInputs


def recomputed(
    block: TransformerBlock[Conditions], hidden: Tensor, at: Conditions, inputs: HostInputs | None = None,
    keep_attention: bool = False, lend: Lend = resident,
) -> Tensor:
    """`block(hidden, at)`, its activations recomputed in backward.

    The input is kept in the autocast dtype, if autocast is on: the residual stream stays fp32, what is recomputed of it is
    rounded to that dtype anyhow.

    Args:
        inputs: keeps the input until then; None: it stays on the device.
        keep_attention: do not recompute the result of attention.
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
        return again.output(hidden.detach())  # compiled, it is the same function as in backward only if it needs no gradient

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        return None, *ctx.again.gradients(kept, gradient)


class _Again(Generic[Conditions]):
    """A block's forward pass, and all that its backward pass needs beside the input.

    Attributes:
        attention: of the forward pass, if its result is kept.
    """

    def __init__(self, block: TransformerBlock[Conditions], at: Conditions, keep_attention: bool, lend: Lend) -> None:
        self.block, self.at, self.keep_attention, self.lend = block, at, keep_attention, lend
        self.weights = [weight for weight in block.parameters() if weight.requires_grad]
        self.kind = next(block.parameters()).device.type
        self.autocast = torch.is_autocast_enabled(self.kind)
        self.dtype = torch.get_autocast_dtype(self.kind)
        self.chance = _Chance(self.kind) if any(isinstance(module, nn.Dropout) for module in block.modules()) else None
        self.attention: _Attention | None = None

    def to_keep(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.dtype) if self.autocast else hidden

    def output(self, hidden: Tensor) -> Tensor:
        with computing(self.block, hidden, self.lend):
            return self.block(hidden, self.at, self._attend_and_keep if self.keep_attention else None)

    def _attend_and_keep(self, q: Tensor, k: Tensor, v: Tensor, at: Conditions) -> Tensor:
        self.attention = _Attention(self.block, (q, k, v), at)
        return self.attention.result(slice(None))

    def gradients(self, kept: Tensor, gradient: Tensor) -> list[Tensor | None]:
        """Gradients of the input and of the weights."""
        autocast = torch.autocast(self.kind, self.dtype, enabled=self.autocast)
        chance = self.chance.again() if self.chance else nullcontext()
        with autocast, computing(self.block, kept, self.lend, forward=False), chance:
            return _Backward(self, kept, gradient).run()


class _Enter(torch.autograd.Function):
    """Tensors as they are, at the beginning of a graph; leaves would hold them."""

    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, *tensors: Tensor) -> Tensors:
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *gradients


@dataclass(frozen=True)
class _Graph:
    """A graph by its ends: of its inputs and outputs it holds no more than functions in it save."""

    inputs: Sequence[GradientEdge]
    outputs: Sequence[GradientEdge]


def _traced(function: Callable[..., Tensor | Tensors], *tensors: Tensor) -> tuple[Tensors, _Graph]:
    """What a function gives, without gradient, and the graph behind it."""
    with torch.enable_grad():
        entered = _Enter.apply(torch.empty(0, requires_grad=True), *tensors)
        found = function(*entered)
    outputs = (found,) if isinstance(found, Tensor) else found
    graph = _Graph([get_gradient_edge(tensor) for tensor in entered], [get_gradient_edge(tensor) for tensor in outputs])
    return tuple(tensor.detach() for tensor in outputs), graph


class _Unheld:
    """Tensors on which graphs are built that do not hold them, and that read them here when they are gone through.

    Attributes:
        tensors: what is read; whoever goes through the graphs puts the same values here, in the same layout.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    @contextmanager
    def building(self) -> Iterator[None]:
        """In here graphs are built."""
        with saved_tensors_hooks(self._pack, self._unpack):
            yield
        self.tensors = ()

    def _pack(self, tensor: Tensor) -> Tensor | tuple[int, Sequence[int], Sequence[int], int]:
        for index, known in enumerate(self.tensors):
            if tensor.untyped_storage()._cdata == known.untyped_storage()._cdata:
                return index, tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor.detach()  # a function's result would hold the function, and neither would ever be let go

    def _unpack(self, packed: Tensor | tuple[int, Sequence[int], Sequence[int], int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, *layout = packed
        return self.tensors[index].as_strided(*layout)


class _Attention:
    """Attention of a block, a group of heads after the other, and its graph, which holds results but no inputs.

    There are as many groups as pieces, so that what backward needs for one of them is as large.

    Args:
        qkv: queries, keys and values (B, N, H, d), as attention reads them.
    """

    def __init__(self, block: TransformerBlock[Conditions], qkv: Tensors, at: Conditions) -> None:
        self._inputs = _Unheld(*qkv)
        self._groups: list[tuple[slice, Tensor, _Graph]] = []
        """Heads, and their result (B, N, h*d)."""
        tokens, heads = qkv[0].shape[1:3]
        with self._inputs.building():
            for group in slices(0, heads, -(-heads // blocks.piece_count(tokens))):
                (result,), graph = _traced(partial(block.attend, at=at), *(part[:, :, group] for part in qkv))
                self._groups.append((group, result, graph))

    def result(self, where: slice) -> Tensor:
        """Of some tokens, (B, n, H*d), without gradient."""
        parts = [result[:, where] for _, result, _ in self._groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def gradients(self, qkv: Tensors, of_result: Tensor) -> None:
        """Lay the gradients of queries, keys and values over them; lets go of the graph."""
        self._inputs.tensors = qkv
        of_heads = of_result.unflatten(-1, qkv[0].shape[2:])
        while self._groups:
            group, _, graph = self._groups.pop(0)
            found = torch.autograd.grad(graph.outputs, graph.inputs, of_heads[:, :, group].flatten(2))
            for tensor, gradient in zip(qkv, found, strict=True):
                tensor[:, :, group] = gradient


class _Backward:
    """One backward pass of a block.

    Args:
        kept: the input (B, N, D).
        gradient: of the output, fp32; it is autograd's and not written to.
    """

    def __init__(self, again: _Again, kept: Tensor, gradient: Tensor) -> None:
        self.again, self.block, self.at = again, again.block, again.at
        self.kept, self.gradient = kept, gradient
        self.pieces = self.block.pieces(kept, self.at, blocks.PIECE)
        with torch.enable_grad():
            self.shared = self.block.shared(self.at)
        self.leaves = tuple(tensor.detach().requires_grad_(tensor.requires_grad) for tensor in self.shared)
        self.sums = _Sums([*again.weights, *(leaf for leaf in self.leaves if leaf.requires_grad)])
        self.projected: list[tuple[_Unheld, _Graph]] = []
        """The graph of each piece's queries, keys and values, and what it reads."""

    def run(self) -> list[Tensor | None]:
        """Gradients of the input, then of the weights."""
        q, k, v = laid_out(self._project(), self.kept.shape[1])
        attention = self.again.attention or _Attention(self.block, (*self._turned(q, k), v), self.at)
        passed, of_attended = self._through_finish(attention)
        of_q, of_k = self._turned(q, k)
        attention.gradients((of_q, of_k, v), of_attended)
        del of_attended
        self._through_project((q, k), (of_q, of_k, v), passed)
        self._through_shared()
        return [passed, *self.sums.of(self.again.weights)]

    def _omitting(self) -> AbstractContextManager[None]:
        """Around what is only gone through for gradients; gates that are trained need what they scale."""
        trained = any(leaf.requires_grad for leaf in self.leaves[self.block.modulation_vectors])
        return nullcontext() if trained else outputs_omitted(self.block)

    def _piece(self, where: slice) -> Tensor:
        """A piece of the input as the block takes it."""
        return self.kept[:, where].float()

    def _project(self) -> Iterator[Tensors]:
        for where, part in self.pieces:
            normalised = self.block.normalise(self._piece(where), self.leaves, part)
            unheld = _Unheld(normalised)
            with unheld.building():
                qkv, graph = _traced(partial(self.block.project, shared=self.leaves, at=part), normalised)
            del normalised
            self.projected.append((unheld, graph))
            yield qkv
            del qkv

    def _turned(self, q: Tensor, k: Tensor) -> Tensors:
        return laid_out((self.block.turn(q[:, where], k[:, where], part) for where, part in self.pieces), q.shape[1])

    def _through_finish(self, attention: _Attention) -> tuple[Tensor, Tensor]:
        """Gradients that the output's has behind attention: of the input and of what attention gave."""
        passed = torch.empty_like(self.gradient)
        of_attended = torch.empty_like(self.kept, dtype=attention.result(slice(0)).dtype)
        for where, part in self.pieces:
            finish = partial(self.block.finish, shared=self.leaves, at=part)
            with self._omitting():
                graph = _traced(finish, self._piece(where), attention.result(where))[1]
            passed[:, where], of_attended[:, where] = self.sums.through(graph, [self.gradient[:, where]])
        return passed, of_attended

    def _through_project(self, raw: Tensors, of_qkv: Tensors, passed: Tensor) -> None:
        """Add the gradient that the input has through queries, keys and values.

        Args:
            raw: queries and keys as they were projected.
            of_qkv: gradients of what attention read.
        """
        for where, part in self.pieces:
            of_qk = self._through_turn([tensor[:, where] for tensor in raw], [of[:, where] for of in of_qkv[:2]], part)
            unheld, projected = self.projected.pop(0)
            normalise = partial(self.block.normalise, shared=self.leaves, at=part)
            unheld.tensors, graph = _traced(normalise, self._piece(where))
            found = self.sums.through(projected, [*of_qk, of_qkv[2][:, where]])
            passed[:, where] += self.sums.through(graph, found)[0]

    def _through_turn(self, qk: Sequence[Tensor], of_turned: Sequence[Tensor], at: Any) -> Tensors:
        """Gradients of what was projected of a piece."""
        _, graph = _traced(partial(self.block.turn, at=at), *qk)
        return self.sums.through(graph, of_turned)

    def _through_shared(self) -> None:
        used = [tensor for tensor in self.shared if tensor.requires_grad]
        if used:
            gradients = self.sums.of([leaf for leaf in self.leaves if leaf.requires_grad])
            found = [(tensor, gradient) for tensor, gradient in zip(used, gradients, strict=True) if gradient is not None]
            graph = _Graph([], [get_gradient_edge(tensor) for tensor, _ in found])
            self.sums.through(graph, [gradient.to(tensor.dtype) for tensor, gradient in found])


class _Sums:
    """Gradients of tensors that several pieces use, in fp32 where there are several."""

    def __init__(self, wanted: Sequence[Tensor]) -> None:
        self.wanted = list(wanted)
        self._sums: dict[int, Tensor] = {}

    def through(self, graph: _Graph, gradients: Sequence[Tensor]) -> Tensors:
        """Go backward from the graph's outputs: add up what is wanted, return the gradients of its inputs."""
        found = torch.autograd.grad(graph.outputs, [*graph.inputs, *self.wanted], gradients, allow_unused=True)
        count = len(graph.inputs)
        for tensor, gradient in zip(self.wanted, found[count:], strict=True):
            if gradient is not None:
                before = self._sums.get(id(tensor))
                self._sums[id(tensor)] = gradient if before is None else before.float() + gradient
        return found[:count]

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
