"""Which of torch's kernels computes attention.

Torch picks one by itself, on most GPUs FlashAttention 2. Others may be faster: cuDNN's on GPUs since Hopper, FlashAttention 3
on Hopper and 4 on Blackwell, which are packages of their own. `python -m benchmarks.attention` compares what a machine has.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from torch.nn import attention as of_torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError, first_line

AttentionBackend = Literal["torch", "flash", "cudnn", "efficient", "FA3", "FA4"]
PACKAGES = {"FA3": "flash-attn-3", "FA4": "flash-attn-4"}
_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
_OTHERS = (SDPBackend.MATH, SDPBackend.OVERRIDEABLE)


@contextmanager
def attention_backend(name: AttentionBackend, strict: bool = False) -> Iterator[None]:
    """In here attention is computed by the kernel of that name; `torch` leaves the choice to torch.

    Args:
        strict: fail where that kernel cannot compute; else another takes its place there.

    Raises:
        UserError: the package that has the kernel is not installed, or does not work here.
    """
    if name == "torch":
        yield
        return
    first = _KERNELS.get(name, SDPBackend.FLASH_ATTENTION)
    rest = [] if strict else [kernel for kernel in (*_KERNELS.values(), *_OTHERS) if kernel != first]
    with sdpa_kernel([first, *rest], set_priority=True), _package(name):
        yield


@contextmanager
def _package(name: AttentionBackend) -> Iterator[None]:
    """In here FlashAttention is that of a package, if the name is one's."""
    if name not in PACKAGES:
        yield
        return
    try:
        of_torch.activate_flash_attention_impl(name)
    except Exception as error:  # whatever an extension that does not fit raises, or a torch that knows of none
        raise UserError(
            f"attention_backend = '{name}' does not work here: {first_line(error)}. It needs the package {PACKAGES[name]} and "
            "a GPU that it is for; `python -m benchmarks.attention` shows what this machine has."
        ) from error
    try:
        yield
    finally:
        of_torch.restore_flash_attention_impl()


def check_backend(name: AttentionBackend) -> None:
    """Raises:
        UserError: see `attention_backend`.
    """
    with attention_backend(name):
        pass
