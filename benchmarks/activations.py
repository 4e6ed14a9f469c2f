"""What a transformer block keeps for its backward pass, and what is alive at most: `python -m benchmarks.activations`.

Counted on the CPU in bf16, on blocks an eighth as wide as the released ones with as many tokens, in rows: a row is one
bf16 activation of the block's width, 2 bytes x width x tokens (208 MB for Wan2.1-14B at 49 frames of 832x480). Weights and
conditions are left out; the block's input, if it is kept, and the gradient that comes in are counted. What kernels
allocate for themselves is not seen. Products are in forward passes, those of the block's linears and of its attention.

Errors are those of the gradients of the input and of the whole LoRA against the same block in fp32. CPU seconds are those
of one pass forward and back, in which the linears of so narrow blocks take a smaller part than at full width.
"""

from __future__ import annotations

import argparse
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.random_weights import in_memory, independent
from loraedit_ext import lora
from loraedit_ext.config import AdapterSettings
from models.base import I2VModel
from models.blocks import TransformerBlock
from models.eight_bit import multiply_integers
from models.hunyuan import transformer as hunyuan
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.wrapper import HunyuanI2V
from models.layers import rope_table
from models.recompute import recomputed
from models.wan import transformer as wan
from models.wan.config import WanConfig
from models.wan.wrapper import WanI2V

NARROWER = 8
RANK = 2  # as 16 is of the released width
CPU = torch.device("cpu")
GRIDS = {"49 frames of 832x480": (13, 30, 52), "13 frames of 832x480": (4, 30, 52), "small": (4, 16, 16)}
"""Of patches."""

Run = Callable[[TransformerBlock[Any], Tensor, Any], Tensor]
WAYS: dict[str, Run] = {
    "nothing recomputed (`false`)": lambda block, x, at: block(x, at),
    "torch.utils.checkpoint": lambda block, x, at: checkpoint(block, x, at, use_reentrant=False),
    "recomputed (`true`)": recomputed,
    '"attention" kept': partial(recomputed, keep_attention=True),
}


@dataclass(frozen=True)
class Subject:
    """A block with a LoRA, and what it is run on."""

    block: TransformerBlock[Any]
    x: Tensor
    at: Any

    @property
    def weights(self) -> list[Tensor]:
        return [weight for weight in self.block.parameters() if weight.requires_grad]

    @property
    def given(self) -> list[Tensor]:
        """Tensors that are there before a pass."""
        conditions = tree_leaves(list(vars(self.at).values()))
        weights = [*self.block.parameters(), *self.block.buffers()]
        return [*weights, *(part for part in conditions if isinstance(part, Tensor))]


@dataclass(frozen=True)
class Storage:
    """How a block's weights are stored and multiplied."""

    dtype: torch.dtype = torch.bfloat16
    linears: torch.dtype | None = None
    integers: bool = False


STORAGE = {
    "bf16": Storage(), "float8": Storage(linears=torch.float8_e4m3fn), "int8": Storage(linears=torch.int8),
    "int8-matmul": Storage(linears=torch.int8, integers=True),
}  # fmt: skip
EXACT = Storage(torch.float32)
Grid = tuple[int, int, int]


def wan_block(grid: Grid, storage: Storage) -> Subject:
    config = WanConfig(dim=640, ffn_dim=1728, num_heads=5, num_layers=1, image_dim=160)
    layers = build(WanI2V, config, storage)
    context = tuple(random(1, count, 640).to(storage.dtype) for count in (512 // NARROWER, 257 // NARROWER))
    at = wan.Conditions(random(1, 6, 640), layers[0].rope(grid), context)
    return Subject(layers[1].block, random(1, at.rope.shape[1], 640), at)


def hunyuan_block(grid: Grid, storage: Storage, single: bool) -> Subject:
    config = HunyuanConfig(
        dim=384, num_heads=3, mlp_dim=1536, num_double=1, num_single=1, in_channels=16, guidance_embed=True,
        rope_axes=(16, 56, 56), num_refiner=0, text_dim=64, pooled_dim=64,
    )  # fmt: skip
    layers = build(HunyuanI2V, config, storage)
    rope, text = rope_table(grid, config.rope_axes, hunyuan.ROPE_THETA), 400
    preserved = torch.rand(1, rope.shape[1], generator=torch.Generator().manual_seed(1)) > 0.5
    count = rope.shape[1] + text
    at = hunyuan.Conditions(random(1, 384), rope, [count], random(1, 384) + 1, preserved)
    return Subject(layers[2 if single else 1].block, random(1, count, 384), at)


SUBJECTS: dict[str, Callable[[Grid, Storage], Subject]] = {
    "Wan": wan_block,
    "HunyuanVideo, double": partial(hunyuan_block, single=False),
    "HunyuanVideo, single": partial(hunyuan_block, single=True),
}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def build(family: type[I2VModel], config: WanConfig | HunyuanConfig, storage: Storage) -> list[Any]:
    """Layers of a transformer with random weights and a LoRA that is not zero."""
    checkpoint = SimpleNamespace(config=config)
    model = family(checkpoint, CPU)
    transformer = model.build_transformer()
    checkpoint.transformer_tensors = lambda: in_memory(transformer, independent)
    layers = transformer.layers()
    model.load_weights(layers, storage.dtype, CPU, storage.linears)
    lora.inject(transformer, model, AdapterSettings(rank=RANK))
    lora.initialise(layers, 0, CPU)
    for name, weight in lora.trainable(layers).items():
        if ".lora_B." in name:
            weight.data.copy_(random(*weight.shape) * 0.02)
    if storage.integers:
        multiply_integers(layers, CPU)
    return layers


class Counter(TorchDispatchMode):
    """Bytes of storages that were made in it and are still there, their peak, and products.

    Args:
        known: tensors that were there before, whose storages do not count.
    """

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.linears = self.attention = 0.0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(func.overloadpacket, args, out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.alive += storage.nbytes()
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)

    def _count(self, operation: Any, args: Sequence[Any], out: Any) -> None:
        shapes = [part.shape for part in args[:4] if isinstance(part, Tensor)]
        if operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.attention += sdpa_flop_count(*shapes[:3])
        elif operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.attention += sdpa_backward_flop_count(*shapes)
        elif operation in flop_registry or operation is torch.ops.aten._int_mm:
            self.linears += flop_registry.get(operation, flop_registry[torch.ops.aten.mm])(*args, out_val=out)


@dataclass
class Measured:
    """One forward and backward pass; bytes and FLOPs."""

    kept: int
    peak: int
    forward: tuple[float, float]
    """Of linears and of attention."""
    total: tuple[float, float]
    gradients: list[Tensor]


def measure(subject: Subject, run: Run, dtype: torch.dtype = torch.bfloat16) -> Measured:
    leaf = subject.x.clone().requires_grad_()
    with Counter(subject.given) as counter:
        hidden = leaf + 0  # as from the block before: nothing but this block may hold it
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = run(subject.block, hidden, subject.at)
        forward = counter.linears, counter.attention
        edge, slope = get_gradient_edge(output), random(*output.shape).to(output)
        del hidden, output
        kept = counter.alive - slope.nbytes
        counter.peak = counter.alive
        gradients = torch.autograd.grad([edge], [leaf, *subject.weights], [slope])
    return Measured(kept, counter.peak, forward, (counter.linears, counter.attention), list(gradients))


def cpu_seconds(subject: Subject, run: Run) -> float:
    """Of one pass forward and back, nothing counted."""
    leaf = subject.x.clone().requires_grad_()
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        output = run(subject.block, leaf, subject.at)
    torch.autograd.grad(output.square().mean(), [leaf, *subject.weights])
    return time.process_time() - started


def error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    """Relative, of all together."""
    off = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, true, strict=True))
    return (off / sum(float(b.double().square().sum()) for b in true)) ** 0.5


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", choices=GRIDS, default=next(iter(GRIDS)), help="tokens")
    parser.add_argument("--storage", choices=STORAGE, default="bf16", help="of the linears' weights")
    options = parser.parse_args()
    grid = GRIDS[options.grid]
    print(f"{options.grid}, {options.storage}, torch {torch.__version__}\n")
    print("| block | | kept, rows | alive at most, rows | linears | attention | input gradient off | LoRA's off | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, make in SUBJECTS.items():
        true = measure(make(grid, EXACT), WAYS["nothing recomputed (`false`)"], torch.float32)
        subject = make(grid, STORAGE[options.storage])
        row = 2 * subject.x.numel()
        for way, run in WAYS.items():
            found = measure(subject, run)
            linears, attention = (whole / one for whole, one in zip(found.total, true.forward, strict=True))
            errors = error(found.gradients[:1], true.gradients[:1]), error(found.gradients[1:], true.gradients[1:])
            print(f"| {name} | {way} | {found.kept / row:.1f} | {found.peak / row:.1f} | {linears:.2f} | {attention:.2f} | "
                  f"{errors[0]:.4f} | {errors[1]:.4f} | {cpu_seconds(subject, run):.1f} |", flush=True)


if __name__ == "__main__":
    main()
