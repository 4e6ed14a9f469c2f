"""Kernels of attention that this machine has, forward and backward: `python -m benchmarks.attention`.

For each backend of `attention_backend` and each number of groups that the heads are taken in one after the other: milliseconds
(the least of several), and how far result and gradients of one head are from fp32's. The backends are asked for strictly: one
that cannot compute these shapes has a row that says so.
"""

from __future__ import annotations

import argparse
import time
from typing import get_args

import torch
from torch import Tensor

from benchmarks.activations import error
from benchmarks.wan_step import device_name
from common.errors import UserError, first_line
from loraedit_ext.forecast import synchronise
from models.attention_backend import AttentionBackend, attention_backend
from models.blocks import piece_count, slices
from models.layers import attention

WIDTH = 128
HEADS = {"wan": 40, "hunyuan-video": 24}
TOKENS = {"49": 20280, "13": 6240, "small": 2100}
"""Of so many frames of 832x480."""
ROUNDS = 5


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=HEADS, default="wan", help="number of heads")
    parser.add_argument("--frames", choices=TOKENS, default="49", help="of 832x480: number of tokens")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, heads = TOKENS[options.frames], HEADS[options.model]
    qkv = [torch.randn(1, tokens, heads, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    q, k, v, slope = (part.to(device, torch.bfloat16) for part in qkv)
    print(f"{device_name(device)}, torch {torch.__version__}, bf16, {tokens} tokens, {heads} heads of {WIDTH}\n")
    print("| backend | groups of heads | forward ms | backward ms | result off | gradients off |\n|---|---|---|---|---|---|")
    for name in get_args(AttentionBackend):
        for groups in sorted({1, piece_count(tokens)}):
            print(f"| {name} | {groups} | {row(name, groups, (q, k, v), slope, device)} |", flush=True)


def row(name: AttentionBackend, groups: int, qkv: tuple[Tensor, ...], slope: Tensor, device: torch.device) -> str:
    """The cells behind a backend and a number of groups."""
    heads = qkv[0].shape[2]
    parts = slices(0, heads, -(-heads // groups))
    try:
        with attention_backend(name, strict=True):
            measured = [seconds(qkv, slope, parts, device) for _ in range(ROUNDS)]
            errors = errors_of_a_head(qkv, slope)
    except (RuntimeError, UserError) as problem:
        return f"– | – | – | {first_line(problem)}"
    forward, backward = (1e3 * min(times) for times in zip(*measured, strict=True))
    return f"{forward:.1f} | {backward:.1f} | {errors[0]:.4f} | {errors[1]:.4f}"


def seconds(qkv: tuple[Tensor, ...], slope: Tensor, parts: list[slice], device: torch.device) -> tuple[float, float]:
    """Of attention forward and backward over all heads."""
    forward = backward = 0.0
    for part in parts:
        leaves = [tensor[:, :, part].detach().requires_grad_() for tensor in qkv]
        synchronise(device)
        started = time.perf_counter()
        result = attention(*leaves)
        synchronise(device)
        between = time.perf_counter()
        torch.autograd.grad(result, leaves, slope[:, :, part].flatten(2))
        synchronise(device)
        forward, backward = forward + between - started, backward + time.perf_counter() - between
    return forward, backward


def errors_of_a_head(qkv: tuple[Tensor, ...], slope: Tensor) -> tuple[float, float]:
    """Of the result and of all gradients, relative to those in fp32 by definition."""
    found, true = (_head([part[:, :, :1].to(dtype) for part in (*qkv, slope)], plain)
                   for dtype, plain in ((slope.dtype, False), (torch.float32, True)))  # fmt: skip
    return error(found[:1], true[:1]), error(found[1:], true[1:])


def _head(tensors: list[Tensor], plain: bool) -> list[Tensor]:
    *qkv, slope = (tensor.detach() for tensor in tensors)
    leaves = [tensor.requires_grad_() for tensor in qkv]
    if plain:
        q, k, v = (leaf.squeeze(0).transpose(0, 1) for leaf in leaves)
        result = ((q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(0, 1).flatten(1).unsqueeze(0)
    else:
        result = attention(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, slope.flatten(2))]


if __name__ == "__main__":
    main()
