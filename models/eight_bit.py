"""Frozen linears stored in 8 bits: half the memory of bf16, nothing kept upcast.

Weights of more bits get one scale per row: without it e4m3 loses 3.3 % of a weight with standard deviation 0.02 and 11 %
at 0.005, where values fall among its subnormal numbers; with it 2.6 % always. Integers with a scale per row lose 0.8 %.

Products are computed in the working dtype, or (`multiply_integers`) of 8-bit integers too: input rows get a scale each,
y = (xq Wq^T) sx sw. Going backward the weight's scale lies along the axis that is summed over, so it is multiplied into the
gradient before that is rounded: dx = ((dy sw)q Wq) s, with the same Wq.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError, first_line
from models.checkpoint import Entry, row_pieces
from models.linears import FrozenProduct, OutputLinear, autocast_dtype, dequantise, placeholder

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
EIGHT_BIT = (*FLOAT8, torch.int8)
_LARGEST = 127
_FEWEST_ROWS = 32  # of an integer product on a GPU


def _rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> int8 of the same shape, and fp32 scales (M, 1)."""
    x = x.float()
    scale = x.abs().amax(-1, keepdim=True).div(_LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).round().to(torch.int8), scale


def _integer_product(x: Tensor, other: Tensor) -> Tensor:
    """(..., K) in any dtype times int8 (K, N) -> fp32 (..., N): rows of x are rounded to 8 bits, sums are exact."""
    rows = x.reshape(-1, x.shape[-1])
    count = len(rows)
    rounded, scale = _rounded_rows(rows if count >= _FEWEST_ROWS else F.pad(rows, (0, 0, 0, _FEWEST_ROWS - count)))
    return (torch._int_mm(rounded, other) * scale)[:count].view(*x.shape[:-1], other.shape[1])


class _IntegerLinear(torch.autograd.Function):
    """x @ weight^T and its gradient by products of 8-bit integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, omitted: bool) -> Tensor:
        ctx.save_for_backward(weight, scale)
        if omitted:
            return placeholder(x, weight)
        out = _integer_product(x, weight.t()).mul_(scale.view(-1))
        return (out if bias is None else out.add_(bias)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        return _integer_product(gradient * scale.view(-1), weight).to(gradient.dtype), None, None, None, None


class EightBitLinear(nn.Linear):
    """A frozen linear whose weight is stored in 8 bits, with a scale if its file has one.

    Computes in the autocast dtype, or in the input's. The upcast weight lives during the product only, and autograd keeps
    the 8-bit one, but for products within `upcast_once`. LoRA branches around it are not touched.

    Attributes:
        integers: compute products of 8-bit integers.
        is_output, omitted: as in an `OutputLinear`, whose place this one may have taken.
    """

    integers = False

    def __init__(self, in_features: int, out_features: int, bias: bool, is_output: bool = False) -> None:
        super().__init__(in_features, out_features, bias, device="meta")
        self.is_output, self.omitted = is_output, False
        self.requires_grad_(False)
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("upcast", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = autocast_dtype(x)
        weight, scale = (self.weight, self.scale) if self.upcast is None else (self.upcast, None)
        multiply = _IntegerLinear if self.integers else FrozenProduct
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(dtype)
            return multiply.apply(x.to(dtype), weight, scale, bias, self.omitted)


@contextmanager
def upcast_once(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """In here 8-bit weights are there upcast as well: for many products with each, as when inputs come in pieces."""
    linears = [child for child in module.modules() if isinstance(child, EightBitLinear) and not child.integers]
    for linear in linears:
        linear.upcast = dequantise(linear.weight, linear.scale, dtype)
    try:
        yield
    finally:
        for linear in linears:
            linear.upcast = None


def multiply_integers(modules: Iterable[nn.Module], device: torch.device) -> None:
    """Let linears that are stored in integers multiply integers.

    Raises:
        UserError: this device has no such products, or they are not exact (some versions of CUDA's library had them wrong).
    """
    try:
        exact, why = _integer_products_are_exact(device), f"multiplies 8-bit integers wrongly with torch {torch.__version__}"
    except RuntimeError as error:
        exact, why = False, f"cannot multiply 8-bit integers: {first_line(error)}"
    if not exact:
        raise UserError(
            f"model.int8_matmul: {device} {why}. Leave the key out: weights then stay in 8 bits, and products are computed in "
            "the working dtype."
        )
    for module in modules:
        for child in module.modules():
            if isinstance(child, EightBitLinear) and child.weight.dtype == torch.int8:
                child.integers = True


def _integer_products_are_exact(device: torch.device) -> bool:
    """In both layouts that are used, over rows of every remainder by 8."""
    generator = torch.Generator().manual_seed(0)
    for rows in (*range(_FEWEST_ROWS, _FEWEST_ROWS + 8), 300):
        x, weight = (torch.randint(-_LARGEST, 128, shape, dtype=torch.int8, generator=generator)
                     for shape in ((rows, 64), (96, 64)))  # fmt: skip
        for other in (weight.to(device).t(), weight.t().contiguous().to(device)):
            found = torch._int_mm(x.to(device), other).cpu()
            if not torch.equal(found, (x.double() @ weight.double().t()).int()):
                return False
    return True


def quantised(entry: Entry, dtype: torch.dtype, device: torch.device) -> tuple[Entry, Tensor]:
    """A weight (out, in) of a file in an 8-bit dtype, and its fp32 scales (out, 1); a few rows at a time."""
    source, largest = entry.read(), _LARGEST if dtype == torch.int8 else torch.finfo(dtype).max
    weight = torch.empty(entry.shape, dtype=dtype, device=device)
    scale = torch.empty(entry.shape[0], 1, device=device)
    for rows, values in row_pieces(entry, source, device):
        peak = torch.maximum(values.amax(1, keepdim=True), -values.amin(1, keepdim=True))
        scale[rows] = torch.where(peak > 0, peak / largest, 1.0)
        values.div_(scale[rows])
        weight[rows] = values.round_() if dtype == torch.int8 else values
    return replace(entry, dtype=dtype, read=lambda: weight, mapped=False, scaled=None), scale


def replace_linears(module: nn.Module, prefix: str, pattern: str) -> dict[str, EightBitLinear]:
    """Replace the linears whose full name (`prefix` and path) matches; they have no weights yet.

    Returns:
        The new ones by path in `module`.
    """
    wanted = [
        name for name, child in module.named_modules()
        if type(child) in (nn.Linear, OutputLinear) and re.fullmatch(pattern, f"{prefix}.{name}")
    ]
    replaced = {}
    for name in wanted:
        parent, _, leaf = name.rpartition(".")
        old = module.get_submodule(name)
        new = EightBitLinear(old.in_features, old.out_features, old.bias is not None, type(old) is OutputLinear)
        setattr(module.get_submodule(parent), leaf, new)
        replaced[name] = new
    return replaced
