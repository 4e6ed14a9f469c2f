"""Writes the shipped checkpoint: `python -m pretraining.export --vae vae.pt --transformer transformer.pt --out DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from models.wan.keys import vae_keys
from models.wan.save import WanWeights, write_checkpoint
from pretraining import encoders
from pretraining.transformer import tiny_config

State = dict[str, torch.Tensor]
_LEVELS, _RES_BLOCKS = 4, 2


def assemble(vae: State, transformer: State) -> WanWeights:
    """All parts in the original names, bfloat16; `vae` has diffusers' names and latents normalised by `freeze`."""
    keys = vae_keys(_LEVELS, _RES_BLOCKS)
    tokenizer = encoders.build_tokenizer()
    return WanWeights(
        config=tiny_config(),
        transformer={name: value.bfloat16() for name, value in transformer.items()},
        text_encoder=encoders.text_encoder(encoders.vocabulary_rows(tokenizer)),
        image_encoder=encoders.image_encoder(),
        vae={keys.to_left(name): value.bfloat16() for name, value in vae.items()},
        tokenizer=tokenizer,
        image_heads=encoders.IMAGE_DIM // 80,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--transformer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    states = [torch.load(path, weights_only=True, map_location="cpu") for path in (options.vae, options.transformer)]
    write_checkpoint(options.out, assemble(*states), shards=1)
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
