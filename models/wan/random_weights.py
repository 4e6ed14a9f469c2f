"""Writes a tiny random checkpoint in the layout of the released Wan2.1-I2V or Wan2.2-I2V: tests and the demo live on it.

    python -m models.wan.random_weights OUT [--variant wan2.1|wan2.2] [--layout original|diffusers] [--seed N] [--shards N] ...
"""

from __future__ import annotations

import argparse
import math
import string
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from models.checkpoint import Shape, slots
from models.wan.config import WanConfig, transformer_shapes
from models.wan.keys import vae_keys
from models.wan.save import Layout, State, WanWeights, write_checkpoint

Variant = Literal["wan2.1", "wan2.2"]
_WORDS = (
    "a an and are at background ball black blue bright camera car cat cinematic city close dark day dog "
    "face field flower forest from girl grass green hair her his horse house in is jumping left light "
    "looking man moving night of on orange over person purple red right river road round running scene sea "
    "shape shot sits sky small square standing static stands street sun table the to tree triangle turns "
    "under video view walking wall water wearing white wind with woman yellow"
)


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the encoders; the transformer's are a `WanConfig` with `text_dim` and `image_dim` to match."""

    text_layers: int = 2
    text_heads: int = 4
    text_ffn: int = 128
    image_layers: int = 3
    image_patch: int = 14
    image_size: int = 224
    vae_dim: int = 4


def tiny_config(variant: Variant = "wan2.1") -> WanConfig:
    """The default transformer: about 0.7 M parameters, 3 heads of 32."""
    image_dim = 80 if variant == "wan2.1" else None
    return WanConfig(dim=96, ffn_dim=192, num_heads=3, num_layers=4, text_dim=64, image_dim=image_dim)


def write_random_checkpoint(
    folder: Path, config: WanConfig | None = None, sizes: TinySizes | None = None,
    layout: Layout = "original", seed: int = 0, shards: int = 2, dtype: torch.dtype = torch.float32,
) -> WanConfig:
    """Write a complete checkpoint with random weights; both layouts hold the same for the same seed.

    Args:
        config: the transformer's dimensions; `text_dim` and `image_dim` also set the encoders' widths. Without an
            `image_dim` it is Wan2.2, with two experts.
        shards: files that the transformer's weights are spread over (original layout).
        dtype: of the transformer; the release has float32. UMT5 is bfloat16, VAE and CLIP float32, as there.

    Returns:
        The transformer's dimensions.
    """
    weights = random_weights(config or tiny_config(), sizes or TinySizes(), seed, dtype)
    write_checkpoint(folder, weights, layout, shards)
    return weights.config


def random_weights(config: WanConfig, sizes: TinySizes, seed: int, dtype: torch.dtype) -> WanWeights:
    """Random weights of all parts; the same for the same arguments."""
    tokenizer, vocabulary = build_tokenizer()
    generator = torch.Generator().manual_seed(seed)

    def transformer() -> State:
        return {name: value.to(dtype) for name, value in random_transformer(config, generator).items()}

    high = transformer()
    text = random_text_encoder(config.text_dim, vocabulary, sizes, generator)
    image = random_image_encoder(config.image_dim, sizes, generator) if config.image_dim else None
    return WanWeights(
        config=config, transformer=high, text_encoder=text, image_encoder=image, vae=random_vae(sizes.vae_dim, generator),
        tokenizer=tokenizer, image_heads=max(1, (config.image_dim or 0) // 80),
        low_noise=None if config.image_dim else transformer(),
    )


def random_transformer(config: WanConfig, generator: torch.Generator) -> State:
    """Random weights in the original names, scaled so that every stage's output is of order one."""
    state = _random(transformer_shapes(config), generator)
    for name in state:
        if name.endswith("modulation"):
            state[name] = torch.randn(state[name].shape, generator=generator) / math.sqrt(config.dim)
    return state


def random_text_encoder(
    width: int, vocabulary: int, sizes: TinySizes, generator: torch.Generator
) -> State:
    """Random UMT5 encoder in the original names, bfloat16."""
    shapes: dict[str, Shape] = {"token_embedding.weight": (vocabulary, width), "norm.weight": (width,)}
    for index in range(sizes.text_layers):
        block = f"blocks.{index}"
        shapes |= {f"{block}.attn.{name}.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{block}.ffn.{name}.weight": (sizes.text_ffn, width) for name in ("gate.0", "fc1")}
        shapes |= {f"{block}.ffn.fc2.weight": (width, sizes.text_ffn)}
        shapes |= {f"{block}.{name}.weight": (width,) for name in ("norm1", "norm2")}
        shapes |= {f"{block}.pos_embedding.embedding.weight": (32, sizes.text_heads)}
    state = _random(shapes, generator)
    for name in state:
        if name.endswith("attn.q.weight"):  # T5 does not scale its attention logits
            state[name] = state[name] / math.sqrt(width / sizes.text_heads)
        elif name.endswith("embedding.weight"):
            state[name] = torch.randn(state[name].shape, generator=generator)
    return {name: value.to(torch.bfloat16) for name, value in state.items()}


def random_image_encoder(width: int, sizes: TinySizes, generator: torch.Generator) -> State:
    """Random CLIP vision tower in the original names (without the prefix `visual.`)."""
    tokens = (sizes.image_size // sizes.image_patch) ** 2 + 1
    shapes: dict[str, Shape] = {
        "cls_embedding": (1, 1, width), "pos_embedding": (1, tokens, width), "head": (width, width),
        "patch_embedding.weight": (width, 3, sizes.image_patch, sizes.image_patch),
    }
    norms = ["pre_norm", "post_norm"]
    linears: list[tuple[str, int, int]] = []
    for index in range(sizes.image_layers):
        block = f"transformer.{index}"
        norms += [f"{block}.norm1", f"{block}.norm2"]
        linears += [(f"{block}.attn.to_qkv", 3 * width, width), (f"{block}.attn.proj", width, width),
                    (f"{block}.mlp.0", 4 * width, width), (f"{block}.mlp.2", width, 4 * width)]
    shapes |= {f"{name}.{leaf}": (width,) for name in norms for leaf in ("weight", "bias")}
    for name, out_features, in_features in linears:
        shapes |= {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}
    return _random(shapes, generator)


def random_vae(base_dim: int, generator: torch.Generator) -> State:
    """Random VAE in the original names."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        model = AutoencoderKLWan(base_dim=base_dim)
    keys = vae_keys(levels=4, num_res_blocks=2)
    state = _random({keys.to_left(name): shape for name, shape in slots(model).items()}, generator)
    state["conv1.weight"] *= 4.0  # latents near the released statistics
    state["decoder.head.2.weight"] *= 0.6  # few saturated pixels
    return state


def _random(shapes: Mapping[str, Shape], generator: torch.Generator) -> State:
    """Matrices with unit gain, norms near one, small biases."""
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            state[name] = 0.02 * noise
        elif name.endswith("gamma") or (len(shape) == 1 and name.endswith("weight")):
            state[name] = 1 + 0.05 * noise
        elif name.endswith("weight"):
            state[name] = noise / math.sqrt(math.prod(shape[1:]))
        else:
            state[name] = noise / math.sqrt(shape[-1])
    return state


def build_tokenizer(words: str = _WORDS) -> tuple[Any, int]:
    """A small tokenizer for any text with umT5's special ids, and the number of rows its embedding needs.

    Args:
        words: separated by spaces, are one piece each; all else is characters or bytes.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<s>", "<unk>"]
    pieces: dict[str, float] = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256))], 0.0)
    pieces |= dict.fromkeys(["▁", *string.printable.strip()], -8.0)
    pieces |= dict.fromkeys([f"▁{word}" for word in words.split()], -4.0)
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=3, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(replacement="▁")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer, math.ceil(tokenizer.get_vocab_size() / 64) * 64


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("random_weights", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="new folder to write")
    parser.add_argument("--variant", choices=["wan2.1", "wan2.2"], default="wan2.1")
    parser.add_argument("--layout", choices=["original", "diffusers"], default="original")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    config, sizes = tiny_config(), TinySizes()
    sizing = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "image_dim")
    for name in sizing:
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=getattr(config, name))
    parser.add_argument("--vae-dim", type=int, default=sizes.vae_dim)
    given = parser.parse_args(arguments)
    if given.out.exists():  # a typing error must not turn a real checkpoint into a random one
        parser.error(f"{given.out}: is there already; nothing is overwritten. Name a new folder.")
    config = replace(config, **{name: getattr(given, name) for name in sizing})
    if given.variant == "wan2.2":
        config = replace(config, image_dim=None)
    write_random_checkpoint(
        given.out, config, replace(sizes, vae_dim=given.vae_dim), given.layout, given.seed, given.shards,
        getattr(torch, given.dtype),
    )
    print(f"{given.out}: random {given.variant.title()}-I2V checkpoint, {given.layout} layout, seed {given.seed}")


if __name__ == "__main__":
    main()
