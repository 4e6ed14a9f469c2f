"""Scaled 8-bit checkpoints: weight times scale, never a weight whose scale was ignored."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.errors import UserError
from models.checkpoint import Entry, Tensors, release_pages

_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")  # for 8-bit activations; a dequantised weight needs none
SCALE_SUFFIXES = _SCALES + _INPUT_SCALES
_MARKER = "scaled_fp8"
_REFUSED = (".weight_scale_inv", ".weight_scale_2", ".comfy_quant", ".absmax", ".quant_map")


def dequantised(tensors: Tensors) -> Tensors:
    """The same tensors with every scaled 8-bit weight as float32 `weight * scale`, and without the scales.

    A file without scales comes back as it is. Scales are one number or one per row.

    Raises:
        UserError: a quantisation that is not understood, or a scale without its weight.
    """
    if refused := [name for name in tensors if name.endswith(_REFUSED)]:
        raise UserError(
            f"{tensors.where}: {tensors.spell(refused[0])} shows a quantisation that cannot be read here; "
            "expected bf16, fp16, fp32, plain fp8 or fp8 with one scale per weight. Use another variant of "
            "the checkpoint."
        )
    scales = {_weight_of(name): name for name in tensors if name.endswith(_SCALES)}
    if not scales:
        return tensors.filtered(lambda name: name != _MARKER)
    entries = {}
    for name, entry in tensors.entries.items():
        if name in scales:
            entries[name] = _scaled(entry, tensors.entries[scales[name]])
        elif name != _MARKER and not name.endswith((*_SCALES, *_INPUT_SCALES)):
            entries[name] = entry
    if orphans := [scale for weight, scale in scales.items() if weight not in tensors]:
        raise UserError(f"{tensors.where}: {tensors.spell(orphans[0])} is a scale without its weight.")
    return Tensors(entries, tensors.where, tensors.spell)


def _weight_of(scale: str) -> str:
    return scale.rpartition(".")[0] + ".weight"


def _scaled(weight: Entry, scale: Entry) -> Entry:
    numbers = math.prod(scale.shape)
    rows = weight.shape[0] if weight.shape else 1
    if numbers not in (1, rows):
        raise UserError(
            f"{weight.file}: {scale.source} has shape {scale.shape} for a weight of {weight.shape}; expected "
            "one scale, or one per row."
        )
    read = _multiplied(weight, scale)
    return Entry(weight.source, weight.file, weight.shape, torch.float32, read, False, (weight, scale))


def _multiplied(weight: Entry, scale: Entry) -> Callable[[], Tensor]:
    def read() -> Tensor:
        source = weight.read()
        factor = scale.read().float()
        factor = factor.reshape(()) if factor.numel() == 1 else factor.reshape(-1, *[1] * (source.ndim - 1))
        result = source.float().mul_(factor)
        if weight.mapped:
            release_pages(source)
        return result

    return read
