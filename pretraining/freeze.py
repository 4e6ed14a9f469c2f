"""Freezes the trained VAE's encoder: `python -m pretraining.freeze --vae vae.pt --out frozen.pt`.

An affine map is folded into the two 1x1x1 convolutions around the latents, so that the latents have exactly the
mean and standard deviation per channel that Wan2.1 publishes: every loader's built-in normalisation then fits.
The encoder is rounded to bf16, as it is shipped, before any latent is cached.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from common.files import write_atomic
from loraedit_ext.evaluation.scenes import random_scene
from models.wan import whole_clip
from pretraining import clips, latents, loop
from pretraining.vae import load_vae


@torch.no_grad()
def measure(vae: AutoencoderKLWan, count: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (z_dim,) of the latents of training clips."""
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(count):
        video = clips.scene_video(random_scene(clips.training_seed(rng)))[None].to(vae.device)
        with torch.autocast(vae.device.type, dtype=torch.bfloat16):
            means.append(whole_clip.encode_moments(vae, video)[0].float())
    stacked = torch.cat(means)
    return stacked.mean((0, 2, 3, 4)), stacked.std((0, 2, 3, 4))


@torch.no_grad()
def normalise(vae: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
    """Map latents of this mean and deviation onto those of the VAE's config, in place; reconstructions stay."""
    shift, scale = (part.flatten() for part in latents.statistics(vae))
    channels = len(mean)
    gain = scale / std
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] *= gain.view(-1, 1, 1, 1, 1)
    into.bias[:channels] = (into.bias[:channels] - mean) * gain + shift
    into.bias[channels:] += 2 * gain.log()  # of the log-variances
    back.bias += (back.weight.flatten(1) * (mean - shift / gain)).sum(1)
    back.weight /= gain.view(1, -1, 1, 1, 1)


@torch.no_grad()
def round_encoder(vae: AutoencoderKLWan) -> None:
    """Round the encoder's weights to bf16, kept as float32."""
    for part in (vae.encoder, vae.quant_conv):
        for parameter in part.parameters():
            parameter.copy_(parameter.bfloat16())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=loop.existing, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=256, help="clips to measure the latents on")
    options = parser.parse_args()
    loop.limit_threads("cpu")
    vae = load_vae(options.vae)
    mean, std = measure(vae, options.clips)
    print("latent mean", [round(value, 2) for value in mean.tolist()])
    print("latent std", [round(value, 2) for value in std.tolist()])
    normalise(vae, mean, std)
    round_encoder(vae)
    write_atomic(options.out, lambda path: torch.save(vae.state_dict(), path))


if __name__ == "__main__":
    sys.exit(loop.guarded(main))
