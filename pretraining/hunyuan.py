"""Trains a tiny HunyuanVideo-I2V (`latent_concat`): `python -m pretraining.hunyuan --latents DIR --out DIR`.

Plain first-frame image-to-video by flow matching, as released: the mask is 1 on latent frame 0 only, the condition
latents are the first frame's there and zero behind it. It learns on the tiny Wan's latents and text features, because the
two families' latents have one shape. Nothing ships these weights: they decide questions of conditioning
(`benchmarks/hunyuan_product.py`) for which no small released model exists.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from models.base import TIMESTEPS
from models.hunyuan.config import LATENT_CHANNELS, HunyuanConfig, rope_axes
from models.hunyuan.transformer import ROPE_THETA, Conditions, HunyuanTransformer, SingleBlock
from models.layers import rope_table
from pretraining import encoders, loop
from pretraining.latents import LatentPool
from pretraining.transformer import Options, TransformerTraining

_HEAD_DIM = 32


def tiny_config() -> HunyuanConfig:
    """5 M parameters: 6 heads of 32, two double and four single blocks."""
    return HunyuanConfig(
        dim=192, num_heads=6, mlp_dim=576, num_double=2, num_single=4, in_channels=2 * LATENT_CHANNELS + 1,
        guidance_embed=False, rope_axes=rope_axes(_HEAD_DIM), num_refiner=1, text_dim=encoders.TEXT_DIM,
        pooled_dim=encoders.TEXT_DIM,
    )


def build(config: HunyuanConfig, seed: int = 0) -> HunyuanTransformer:
    """Fresh weights: linears with variance 1 / inputs, modulation and the head's output near zero, gates half open."""
    torch.manual_seed(seed)
    model = HunyuanTransformer(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "final_layer" in name:
            torch.nn.init.zeros_(parameter)
        elif "_mod." in name or "modulation" in name.lower():
            torch.nn.init.normal_(parameter, std=0.02)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    with torch.no_grad():
        for block in (*model.double_blocks, *model.single_blocks):
            linears = [block.modulation] if isinstance(block, SingleBlock) else [block.img_mod, block.txt_mod]
            for linear in linears:
                linear.linear.bias.view(-1, 3, config.dim)[:, 2] = 0.5
        for block in model.txt_in.individual_token_refiner.blocks:
            block.adaLN_modulation[1].bias.fill_(0.5)
    return model


def text_inputs(text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zero-padded features (batch, length, width) as `HunyuanTransformer.forward` takes text: with lengths and pooled.

    Padding counts as text, so that all samples are equally long; the pooled vector is the mean of the words.
    """
    words = (text != 0).any(-1).sum(1, keepdim=True).clamp(min=1)
    lengths = torch.full((len(text),), text.shape[1], device=text.device)
    return text, lengths, text.sum(1) / words


def conditioning(condition: Tensor) -> Tensor:
    """(batch, 17, T, h, w): the first frame's latents and the released mask, both zero behind latent frame 0."""
    first = torch.zeros_like(condition)
    first[:, :, 0] = condition[:, :, 0]
    mask = torch.zeros_like(condition[:, :1])
    mask[:, :, 0] = 1
    return torch.cat([first, mask], dim=1)


def velocity(model: HunyuanTransformer, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """The model's output with gradients for every parameter, which `HunyuanTransformer.forward` keeps to its LoRA's.

    Args:
        latents: (batch, 33, T, h, w).
        timestep: (batch,) in 0..1000.
        text: zero-padded features.
    """
    text, lengths, pooled = text_inputs(text)
    patches = model.img_in(latents)
    grid = tuple(patches.shape[2:])
    words = model.txt_in(text, timestep, lengths)
    vector = model.time_in(timestep) + model.vector_in(pooled)
    rope = rope_table(grid, model.config.rope_axes, ROPE_THETA).to(latents.device)
    hidden = torch.cat([patches.flatten(2).mT.float(), words], dim=1)
    at = Conditions(vector, rope, [hidden.shape[1]] * len(hidden))
    for block in (*model.double_blocks, *model.single_blocks):
        hidden = block(hidden, at)
    _, height, width = model.config.patch_size
    return rearrange(
        model.final_layer(hidden[:, : math.prod(grid)], vector), "b (t h w) (c ph pw) -> b c t (h ph) (w pw)",
        t=grid[0], h=grid[1], w=grid[2], ph=height, pw=width,
    )  # fmt: skip


class HunyuanTraining(TransformerTraining):
    """Flow matching on the tiny Wan's latent pool."""

    @staticmethod
    def fresh(options: Options) -> HunyuanTransformer:
        return build(tiny_config(), options.seed)

    @staticmethod
    def predict(model: HunyuanTransformer, noisy: Tensor, t: Tensor, clips: LatentPool) -> Tensor:
        latents = torch.cat([noisy, conditioning(clips.condition)], dim=1)
        return velocity(model, latents, t * TIMESTEPS, clips.text)


def main() -> None:
    parser = loop.parser(__doc__, loop.Options(Path(), steps=4000, lr=2e-3))
    parser.add_argument("--latents", type=loop.existing, nargs="+", required=True,
                        help="folders of encoded clips (pretraining.latents)")
    parser.add_argument("--batch", type=int, default=Options.batch)
    options = Options(**vars(parser.parse_args()))
    with loop.started(options.device, options.threads):
        loop.run(HunyuanTraining(options))


if __name__ == "__main__":
    sys.exit(loop.guarded(main))
