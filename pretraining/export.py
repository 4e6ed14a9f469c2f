"""Writes the shipped checkpoint: `python -m pretraining.export --vae vae.pt --transformer transformer.pt --out DIR`.

`python -m pretraining.export --unpack CKPT --out DIR` goes the other way, to train a shipped model further.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch

from common.files import write_atomic
from models.wan.checkpoint import WanCheckpoint
from models.wan.keys import vae_keys
from models.wan.save import WanWeights, write_checkpoint
from pretraining import encoders, loop
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


def unpack(folder: Path) -> dict[str, State]:
    """File name -> weights of a shipped checkpoint in the names of pretraining, float32."""
    checkpoint = WanCheckpoint.open(folder)
    transformer = checkpoint.transformer_tensors()
    return {
        "vae.pt": {name: value.float() for name, value in checkpoint.load_vae("cpu").model.state_dict().items()},
        "transformer.pt": {name: transformer[name].float() for name in transformer},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=loop.existing)
    parser.add_argument("--transformer", type=loop.existing)
    parser.add_argument("--unpack", type=loop.existing, help="checkpoint folder to take apart instead")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.unpack:
        for name, weights in unpack(options.unpack).items():
            write_atomic(options.out / name, partial(torch.save, weights))
        return
    if not (options.vae and options.transformer):
        parser.error("--vae and --transformer, or --unpack")
    states = [torch.load(path, weights_only=True, map_location="cpu") for path in (options.vae, options.transformer)]
    write_checkpoint(options.out, assemble(*states), shards=1)
    size = sum(file.stat().st_size for file in options.out.rglob("*") if file.is_file())
    print(f"{options.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    sys.exit(loop.guarded(main))
