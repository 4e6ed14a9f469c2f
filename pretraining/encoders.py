"""The tiny model's fixed text and image encoders and its tokenizer: not trained, but made to tell inputs apart.

Both have the architecture and the parameter names of the release (UMT5 encoder, CLIP vision tower).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from loraedit_ext.evaluation.captions import VOCABULARY
from models.wan import random_weights

State = dict[str, Tensor]

TEXT_DIM = 128
TEXT_LEN = 48
IMAGE_DIM = 80
IMAGE_SIZE = 56
PATCH = 14
TRIGGER = "p3rs0n"  # the special token of the default prompt is one piece, as frequent words are

_HEAD_DIM = 32
_NEIGHBOURS = (-1, 1, -2, -3, -4, -5, -6, -7)  # which token each text head reads, relative to its own
_BUCKETS = 32
_FOCUS = 12.0  # attention logit of that neighbour over all others


def build_tokenizer() -> Any:
    """A `tokenizers.Tokenizer` with umT5's special ids: words of the closed vocabulary, else characters or bytes."""
    return random_weights.build_tokenizer(" ".join((*VOCABULARY, "a", "the", "and", "with", "of", TRIGGER)))[0]


def text_encoder(vocabulary: int, seed: int = 0) -> State:
    """UMT5 encoder of one block in the original names, bfloat16.

    A token's features are its own random embedding plus random projections of its neighbours', read by attention heads
    whose relative-position bias singles one neighbour out: "red ball, blue disc" differs from "blue ball, red disc".
    """
    generator = torch.Generator().manual_seed(seed)
    inner = _HEAD_DIM * len(_NEIGHBOURS)
    position = torch.zeros(_BUCKETS, len(_NEIGHBOURS))
    for head, offset in enumerate(_NEIGHBOURS):
        position[_bucket(offset), head] = _FOCUS
    block = {
        "norm1.weight": torch.ones(TEXT_DIM),
        "attn.q.weight": torch.zeros(inner, TEXT_DIM),
        "attn.k.weight": torch.zeros(inner, TEXT_DIM),
        "attn.v.weight": _orthonormal(inner, TEXT_DIM, generator),
        "attn.o.weight": _orthonormal(TEXT_DIM, inner, generator),
        "pos_embedding.embedding.weight": position,
        "norm2.weight": torch.ones(TEXT_DIM),
        "ffn.gate.0.weight": _gaussian(2 * TEXT_DIM, TEXT_DIM, generator),
        "ffn.fc1.weight": _gaussian(2 * TEXT_DIM, TEXT_DIM, generator),
        "ffn.fc2.weight": 0.3 * _gaussian(TEXT_DIM, 2 * TEXT_DIM, generator),
    }
    state = {"token_embedding.weight": torch.randn(vocabulary, TEXT_DIM, generator=generator)}
    state |= {f"blocks.0.{name}": value for name, value in block.items()}
    state["norm.weight"] = torch.ones(TEXT_DIM)
    return {name: value.to(torch.bfloat16) for name, value in state.items()}


def image_encoder(seed: int = 1) -> State:
    """CLIP vision tower of two blocks in the original names, no `visual.` before them; Wan reads the first's output.

    Patches are seen through random mixtures of their 4x4 block averages, which keep layout and colour; one random
    block then mixes patches and class token.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = (IMAGE_SIZE // PATCH) ** 2 + 1
    state: State = {
        "cls_embedding": torch.randn(1, 1, IMAGE_DIM, generator=generator),
        "pos_embedding": 0.3 * torch.randn(1, tokens, IMAGE_DIM, generator=generator),
        "patch_embedding.weight": _patch_filters(generator),
        "head": torch.eye(IMAGE_DIM),
    }
    for name in ("pre_norm", "post_norm", *(f"transformer.{i}.norm{j}" for i in range(2) for j in (1, 2))):
        state |= {f"{name}.weight": torch.ones(IMAGE_DIM), f"{name}.bias": torch.zeros(IMAGE_DIM)}
    linears = {"attn.to_qkv": (3, 1), "attn.proj": (1, 1), "mlp.0": (2, 1), "mlp.2": (1, 2)}
    for block in range(2):
        for name, (wide, deep) in linears.items():
            gain = 0.4 if name in ("attn.proj", "mlp.2") else 1.0
            stem = f"transformer.{block}.{name}"
            state[f"{stem}.weight"] = gain * _gaussian(wide * IMAGE_DIM, deep * IMAGE_DIM, generator)
            state[f"{stem}.bias"] = torch.zeros(wide * IMAGE_DIM)
    return {name: value.to(torch.bfloat16) for name, value in state.items()}


def _patch_filters(generator: torch.Generator) -> Tensor:
    """(IMAGE_DIM, 3, PATCH, PATCH): random orthonormal mixtures of the 48 block averages of a patch."""
    cells = 4
    mixtures = _orthonormal(IMAGE_DIM, 3 * cells * cells, generator).view(IMAGE_DIM, 3, cells, cells)
    filters = torch.nn.functional.interpolate(mixtures, (PATCH, PATCH), mode="bilinear", align_corners=False)
    return 1.5 * filters * (cells / PATCH) ** 2


def _bucket(offset: int) -> int:
    """T5's bucket of a key `offset` tokens behind (negative: before) its query, for short distances."""
    return offset + _BUCKETS // 2 if offset > 0 else -offset


def _gaussian(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)


def _orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    basis, _ = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns), generator=generator))
    return basis if rows >= columns else basis.T.contiguous()


def vocabulary_rows(tokenizer: Any) -> int:
    """Rows of the embedding: the tokenizer's size rounded up to 64, as in the release."""
    return math.ceil(tokenizer.get_vocab_size() / 64) * 64
