"""What both transformers are made of: constants in transit, sinusoids, rotary embedding, fp32 islands.

Axes: B batch, N tokens, D hidden width, H heads, d head width, T h w latent grid in patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from common.errors import UserError, first_line
from common.progress import brief
from models.blocks import TransformerBlock, computing, resident
from models.eight_bit import multiply_integers
from models.linears import autocast_dtype
from models.offload import HostInputs
from models.recompute import recomputed

if TYPE_CHECKING:
    from models.streaming import StreamedBlock

# NCCL has no int16, so bfloat16 goes as bytes, and as int8: uint8 is left to what is an integer itself.
_VIEW_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int8}
_MOST_SCORES = 2**22  # of a head's plain attention: 8 MiB
_FLOAT_OF = {integer: number for number, integer in _VIEW_OF.items()}


def freeze(constant: Tensor) -> Tensor:
    """View a float tensor as integers, so that it crosses a pipeline boundary as a constant.

    DeepSpeed runs one backward per float tensor at a boundary and sends each one's gradient back;
    integers get neither.

    Returns:
        int32 of the same shape for float32; int8 with the last axis doubled for bfloat16.
    """
    return constant.detach().contiguous().view(_VIEW_OF[constant.dtype])


def thaw(constant: Tensor) -> Tensor:
    """Undo `freeze`: int32 is float32, int8 is bfloat16."""
    return constant.view(_FLOAT_OF[constant.dtype])


def to_autocast(x: Tensor) -> Tensor:
    """Cast to the autocast dtype, if autocast is on.

    Done once where several linears share an input, or each would keep its own cast for LoRA's gradient.
    """
    return x.to(autocast_dtype(x))


@contextmanager
def calls_shown(module: nn.Module, total: int, description: str) -> Iterator[None]:
    """A bar that counts the calls of a module in a library's own loop."""
    with brief(total, description, unit="part") as bar:

        def count(*_: Any) -> None:
            bar.update()

        handle = module.register_forward_hook(count)
        try:
            yield
        finally:
            handle.remove()


class PipelineLayer(nn.Module):
    """One link of a transformer's chain: takes and returns a flat tuple of tensors.

    The only tensor that carries a gradient, the hidden state, comes first (DeepSpeed mixes up gradient
    buffers otherwise); constants follow, frozen.

    Attributes:
        origin: attribute name of each submodule -> its dotted name in the original checkpoint.
        recompute: recompute this layer's activations in backward instead of keeping them.
        keep_attention: all of them but the result of attention.
        inputs: where the inputs of recomputed blocks are kept until then; None: on the device.
    """

    def __init__(self, origin: dict[str, str]) -> None:
        super().__init__()
        self.origin = origin
        self.recompute = False
        self.keep_attention = False
        self.inputs: HostInputs | None = None

    @property
    def streamed(self) -> StreamedBlock | None:
        """How this layer's block gets its weights, if they live in host memory."""
        block = self._modules.get("block")
        return block.streamed if isinstance(block, TransformerBlock) else None

    def run(self, block: TransformerBlock[Any], hidden: Tensor, at: Any) -> Tensor:
        """`block(hidden, at)`, its activations recomputed in backward if `recompute` says so."""
        lend = block.streamed.lent if block.streamed else resident
        if torch.is_grad_enabled() and (self.recompute or block.streamed):
            return recomputed(block, hidden, at, self.inputs, self.keep_attention, lend)
        with computing(block, hidden, lend) if not torch.is_grad_enabled() else nullcontext():
            return block(hidden, at)

    def original_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters under the names that the original checkpoint gives them."""
        for attribute, prefix in self.origin.items():
            for name, parameter in getattr(self, attribute).named_parameters():
                yield f"{prefix}.{name}", parameter


def speed_up(layers: Sequence[PipelineLayer], device: torch.device, int8_matmul: bool, compiled: bool) -> None:
    """Switch on, for loaded layers, products of 8-bit integers and torch.compile.

    Raises:
        UserError: one of them does not work on this device.
    """
    if int8_matmul:
        multiply_integers(layers, device)
    if compiled:
        compile_blocks(layers, device)


def compile_blocks(layers: Iterable[PipelineLayer], device: torch.device) -> None:
    """Use torch.compile for what blocks do to pieces of tokens.

    Raises:
        UserError: it does not work on this machine.
    """
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # whatever the compiler stumbles over
        raise UserError(
            f"compile = true: torch.compile does not work on this machine: {first_line(error)}. It needs a C++ compiler, and "
            "on a GPU Triton, which comes with torch. Install what is missing, or set compile = false."
        ) from error
    for layer in layers:
        if isinstance(block := layer._modules.get("block"), TransformerBlock):
            block.compile_pieces()


class Float32Linear(nn.Linear):
    """A linear that computes in fp32 whatever its weight's dtype and the autocast around it.

    Both families compute time embeddings and the output head so.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias)


def linear_rows(linear: nn.Module, x: Tensor, where: slice) -> Tensor:
    """Some of a linear's outputs: what it computes with these rows of its weights, also if a LoRA wraps it."""
    tensors = (*linear.named_parameters(), *linear.named_buffers())
    rows = {name: tensor[where] for name, tensor in tensors if tensor.ndim and len(tensor) == linear.out_features}
    return functional_call(linear, rows, (x,))


class Float32LayerNorm(nn.LayerNorm):
    """Layer norm in fp32; returns fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            weight = None if self.weight is None else self.weight.float()
            bias = None if self.bias is None else self.bias.float()
            return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, keeping the input's dtype.

    Wan normalises q and k over the whole width before the split into heads, HunyuanVideo per head.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.dim = dim
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        # The kernel computes in fp32 anyway; CUDA's autocast would return fp32 as well, twice the memory of q and k.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, (self.dim,), self.weight.to(x.dtype), self.eps)


def sinusoid(t: Tensor, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """(B,) timesteps -> (B, width) [cos, sin], returned in fp32.

    Args:
        dtype: of the angles. Wan computes them in float64, HunyuanVideo in float32, which at an embedded guidance of
            6 (6000 here) is another number in the fourth digit.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=dtype, device=t.device) / half)
    angles = torch.outer(t.to(dtype), frequencies)
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def rope_table(grid: tuple[int, int, int], axes: tuple[int, int, int], theta: float) -> Tensor:
    """Rotary angles of a (T, h, w) patch grid: fp32 (2, T*h*w, d/2), cosines and sines.

    Args:
        grid: patches along time, height, width; token order is t, h, w.
        axes: how many of the head's d channels turn with each axis (even numbers, sum d).
        theta: base of the frequencies (Wan 10000, HunyuanVideo 256).
    """
    angles = []
    for axis, channels in enumerate(axes):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64) / channels
        per_position = torch.outer(torch.arange(grid[axis], dtype=torch.float64), theta**-exponent)
        shape = [1, 1, 1, channels // 2]
        shape[axis] = grid[axis]
        angles.append(per_position.view(shape).expand(*grid, -1))
    flat = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack([flat.cos(), flat.sin()]).float()


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate adjacent channel pairs of x (B, N, H, d) by rope (2, N, d/2); keeps x's dtype."""
    cos, sin = rope[:, None, :, None, :]
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention of (B, N, H, d) tensors -> (B, N, H*d)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    attend = _plain_attention if _plain_is_faster(q, k) else F.scaled_dot_product_attention
    return attend(q, k, v).transpose(1, 2).flatten(2)


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    """In bf16 on a CPU, forward and backward together: torch's fused attention takes 1.4 to 3.5 times as long."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] * k.shape[-2] <= _MOST_SCORES


def _plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By definition, on (B, H, N, d) tensors; keeps all (B, H, N, N) weights for the backward pass."""
    heads, (q, k, v) = q.shape[1], (part.flatten(0, 1) for part in (q, k, v))
    weights = torch.bmm(q * q.shape[-1] ** -0.5, k.transpose(1, 2)).softmax(dim=-1)
    return torch.bmm(weights, v).unflatten(0, (-1, heads))
