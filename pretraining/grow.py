"""A deeper or wider transformer from a trained one, with the same output, or nearly so, to begin with."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from models.wan.config import WanConfig

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_ADDED = re.compile(r"\.(self_attn\.o|cross_attn\.o|ffn\.2)\.")  # what a block adds to the residual stream
_AXES: tuple[tuple[str, str | None, str | None], ...] = (
    (r"_attn\.(q|k|v|k_img|v_img)\.", "heads", "stream"),
    (r"_attn\.norm_", "heads", None),
    (r"_attn\.o\.", "stream", "heads"),
    (r"\.ffn\.0\.", "hidden", "stream"),
    (r"\.ffn\.2\.", "stream", "hidden"),
    (r"^(time|text)_embedding\.2\.|^time_projection\.", "stream", "stream"),
    (r"^(time|text)_embedding\.0\.|^patch_embedding\.|^img_emb\.proj\.[34]\.|\.norm3\.", "stream", None),
    (r"^head\.head\.", None, "stream"),
)
"""Of which kind the channels are that a tensor writes (rows) and reads (columns)."""


def depth(state: dict[str, Tensor]) -> int:
    """Number of blocks of a Wan transformer's weights."""
    return 1 + max(int(found[1]) for name in state if (found := _BLOCK.match(name)))


def grown(state: dict[str, Tensor], config: WanConfig) -> dict[str, Tensor]:
    """Weights of a transformer of the given size; see `deepened` and `widened`."""
    return widened(deepened(state, config.num_layers), config)


def deepened(state: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Weights of a transformer of `layers` blocks that computes what the given one does.

    New blocks stand evenly between the old ones. Each is a copy of the block before it whose output projections are zero, so
    it adds nothing until it has learned to (depth growth: Gong et al. 2019, with the identity start of Chen et al. 2016).

    Args:
        state: weights in the original names.
        layers: at least as many blocks as there are.
    """
    old = depth(state)
    sources = [index * old // layers for index in range(layers)]
    kept = {name: value for name, value in state.items() if not _BLOCK.match(name)}
    for index, source in enumerate(sources):
        fresh = index > 0 and sources[index - 1] == source
        for name, value in state.items():
            if name.startswith(f"blocks.{source}."):
                target = _BLOCK.sub(f"blocks.{index}.", name)
                kept[target] = value * 0 if fresh and _ADDED.search(name) else value.clone()
    return kept


def widened(state: dict[str, Tensor], config: WanConfig) -> dict[str, Tensor]:
    """Weights of a transformer of the config's width, heads and feed-forward, which computes nearly what the given one does.

    New channels are copies of old ones that nothing reads yet (after Net2WiderNet, Chen et al. 2016, arXiv 1511.05641).
    The norms see them too: at twice the width, where every channel has one copy, the output is the same; in between, the
    norms' statistics differ a little, which some hundred steps mend.

    Args:
        state: weights in the original names.
        config: as many layers as there are, heads of the same size, and no width below the present one.
    """
    dim, hidden = state["head.head.weight"].shape[1], len(state["blocks.0.ffn.0.bias"])
    narrow = {"stream": dim, "heads": dim, "hidden": hidden}
    random = torch.Generator().manual_seed(0)
    copies = {
        "stream": _extended(torch.randperm(dim, generator=random), config.dim),
        "heads": _extended(torch.arange(dim), config.dim),  # whole heads
        "hidden": _extended(torch.randperm(hidden, generator=random), config.ffn_dim),
    }
    made = {}
    for name, value in state.items():
        rows, columns = _kinds(name)
        if name.endswith("modulation"):
            value = value[..., copies["stream"]]
        elif rows:
            value = value.unflatten(0, (-1, narrow[rows]))[:, copies[rows]].flatten(0, 1)  # six streams in time_projection
        if columns and value.ndim == 2:
            value = torch.nn.functional.pad(value, (0, len(copies[columns]) - value.shape[1]))
        made[name] = value.clone()
    return made


def _extended(copied: Tensor, count: int) -> Tensor:
    """All channels in order, then the first of those to copy, `count` in all."""
    return torch.cat([torch.arange(len(copied)), copied[: count - len(copied)]])


def _kinds(name: str) -> tuple[str | None, str | None]:
    return next(((rows, columns) for pattern, rows, columns in _AXES if re.search(pattern, name)), (None, None))
