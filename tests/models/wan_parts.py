"""The golden vectors' weights as the parts of one Wan checkpoint, for tests that write it in each layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from models.wan.config import WanConfig
from models.wan.random_weights import build_tokenizer
from models.wan.save import WanWeights

GOLDEN_CONFIG = WanConfig(
    dim=96, ffn_dim=160, num_heads=3, num_layers=2, freq_dim=64, text_dim=64, image_dim=80
)
CLIP_HEADS = 2


def golden_weights(golden: Callable[[str], Any]) -> WanWeights:
    visual = {name.removeprefix("visual."): value for name, value in golden("clip_visual").weights.items()}
    return WanWeights(
        config=GOLDEN_CONFIG, transformer=golden("wan_i2v_dit").weights,
        text_encoder=golden("umt5_encoder").weights, image_encoder=visual, vae=golden("wan_vae").weights,
        tokenizer=build_tokenizer()[0], image_heads=CLIP_HEADS,
    )


def velocity(transformer: nn.Module, golden: Callable[[str], Any]) -> torch.Tensor:
    """What a transformer makes of the golden inputs."""
    i = golden("wan_i2v_dit").inputs
    text = torch.zeros(2, 512, 64)
    text[0, :17], text[1, :40] = i["context_0"], i["context_1"]
    with torch.no_grad():
        return transformer(i["x"], i["t"], i["y"], text, i["clip_fea"])


def with_statistics(weights: WanWeights, mean: torch.Tensor, std: torch.Tensor) -> WanWeights:
    return replace(weights, vae=weights.vae | {"latents_mean": mean, "latents_std": std})


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: dict[str, Any]) -> None:
    """Within the tolerance that the golden file states."""
    assert actual.shape == expected.shape
    limit = tolerance["atol"] + tolerance["rtol"] * expected.abs().max().item()
    assert (actual - expected).abs().max().item() <= limit
