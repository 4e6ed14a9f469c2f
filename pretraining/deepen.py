"""A deeper transformer from a trained one, with the same output to begin with."""

from __future__ import annotations

import re

from torch import Tensor

_BLOCK = re.compile(r"blocks\.(\d+)\.")
_ADDED = re.compile(r"\.(self_attn\.o|cross_attn\.o|ffn\.2)\.")  # what a block adds to the residual stream


def depth(state: dict[str, Tensor]) -> int:
    """Number of blocks of a Wan transformer's weights."""
    return 1 + max(int(found[1]) for name in state if (found := _BLOCK.match(name)))


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
    grown = {name: value for name, value in state.items() if not _BLOCK.match(name)}
    for index, source in enumerate(sources):
        fresh = index > 0 and sources[index - 1] == source
        for name, value in state.items():
            if name.startswith(f"blocks.{source}."):
                target = _BLOCK.sub(f"blocks.{index}.", name)
                grown[target] = value * 0 if fresh and _ADDED.search(name) else value.clone()
    return grown
