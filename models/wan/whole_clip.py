"""AutoencoderKLWan on a whole clip at once: the numbers of diffusers' chunked loop, in a quarter of its time on a CPU.

Most of that is torch's choice of a convolution: for the few frames of a chunk it takes its slow one, for a clip oneDNN's.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanMidBlock,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch import Tensor, nn
from torch.nn.functional import silu


def encode_moments(vae: AutoencoderKLWan, video: Tensor) -> tuple[Tensor, Tensor]:
    """Posterior mean and log-variance of a clip.

    Args:
        vae: a Wan2.1 VAE (not the residual Wan2.2 kind).
        video: (batch, 3, 1 + 4n, height, width) in [-1, 1].

    Returns:
        two tensors (batch, z_dim, 1 + n, height / 8, width / 8).
    """
    encoder = vae.encoder
    hidden = encoder.conv_in(video)
    for layer in encoder.down_blocks:
        hidden = _downsample(layer, hidden) if isinstance(layer, WanResample) else _residual(layer, hidden)
    hidden = _middle(encoder.mid_block, hidden)
    hidden = encoder.conv_out(silu(_norm(encoder.norm_out, hidden)))
    mean, logvar = vae.quant_conv(hidden).chunk(2, dim=1)
    return mean, logvar


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video (batch, 3, 1 + 4n, 8h, 8w) of latents (batch, z_dim, 1 + n, h, w); not clamped, so that gradients pass."""
    decoder = vae.decoder
    hidden = _middle(decoder.mid_block, decoder.conv_in(vae.post_quant_conv(latents)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            hidden = _residual(resnet, hidden)
        for layer in block.upsamplers or ():
            hidden = _upsample(layer, hidden)
    return decoder.conv_out(silu(_norm(decoder.norm_out, hidden)))


def _norm(norm: WanRMS_norm, hidden: Tensor) -> Tensor:
    """The same RMS norm; torch's own vector norm over the channel axis takes a seventh of a training step on a CPU."""
    length = hidden.float().square().sum(dim=1, keepdim=True).clamp_min(1e-24).rsqrt() * norm.scale
    return hidden * length.to(hidden.dtype) * norm.gamma.to(hidden.dtype)


def _residual(block: WanResidualBlock, hidden: Tensor) -> Tensor:
    inner = block.conv1(silu(_norm(block.norm1, hidden)))
    return block.conv2(silu(_norm(block.norm2, inner))) + block.conv_shortcut(hidden)


def _middle(block: WanMidBlock, hidden: Tensor) -> Tensor:
    hidden = _residual(block.resnets[0], hidden)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        hidden = _residual(resnet, attention(hidden))
    return hidden


def _downsample(layer: WanResample, hidden: Tensor) -> Tensor:
    """Halve space; halve time except for the first frame, which stays alone."""
    hidden = _spatial(layer.resample, hidden)
    if layer.mode != "downsample3d" or hidden.shape[2] == 1:
        return hidden
    return torch.cat([hidden[:, :, :1], layer.time_conv(hidden)], dim=2)


def _upsample(layer: WanResample, hidden: Tensor) -> Tensor:
    """Double space; double time except for the first frame, which the time convolution never sees."""
    if layer.mode == "upsample3d" and hidden.shape[2] > 1:
        first, rest = hidden[:, :, :1], layer.time_conv(hidden[:, :, 1:])
        rest = rest.unflatten(1, (2, hidden.shape[1])).movedim(1, 3).flatten(2, 3)
        hidden = torch.cat([first, rest], dim=2)
    return _spatial(layer.resample, hidden)


def _spatial(resample: nn.Module, hidden: Tensor) -> Tensor:
    """Apply a 2-D module to every frame."""
    batch, _, frames = hidden.shape[:3]
    folded = resample(hidden.transpose(1, 2).flatten(0, 1))
    return folded.unflatten(0, (batch, frames)).transpose(1, 2)
