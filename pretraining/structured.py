"""Structured start of the tiny Wan VAE: before any training it is already an 8x8 block-average codec."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from models.wan import whole_clip

_QUIET = 0.1  # what is left of the random initialisation beside the structure
_STEADY = 3.0  # a constant channel that keeps RMS norms from reacting to the picture
_STEADY_CHANNEL = 15


@torch.no_grad()
def structure(vae: AutoencoderKLWan) -> None:
    """Overwrite a fresh VAE's weights in place.

    The trunk passes channels through (2x2 averages down, repeats up, time averaged and repeated), residual branches
    start small, and colours travel as +x/-x pairs, because silu(a) - silu(-a) = a passes an activation unharmed.
    Random weights stay underneath at a tenth of their size, so that all other channels can learn.
    """
    for part, down in ((vae.encoder, True), (vae.decoder, False)):
        for name, layer in part.named_modules():
            _layer(name, layer, down)
        _paired_input(part.conv_in)
        _paired_output(part.conv_out, 3)
    vae.encoder.conv_out.bias[vae.config.z_dim :] = -5.0  # a nearly noiseless posterior at first
    for conv in (vae.quant_conv, vae.post_quant_conv):
        conv.weight.zero_()
        conv.bias.zero_()
        _pass_through(conv.weight)


@torch.no_grad()
def calibrate(vae: AutoencoderKLWan, video: Tensor) -> None:
    """Scale the decoder's output channels so that the start reproduces `video` (batch, 3, frames, h, w) best."""
    mean, _ = whole_clip.encode_moments(vae, video)
    output = whole_clip.decode(vae, mean)
    axes = (0, 2, 3, 4)
    gain = (output * video).mean(axes) / output.square().mean(axes)
    vae.decoder.conv_out.weight.mul_(gain.view(-1, 1, 1, 1, 1))


def _layer(name: str, layer: nn.Module, down: bool) -> None:
    if name.endswith("conv_shortcut") and isinstance(layer, nn.Conv3d):
        _reset(layer)
        _pass_through(layer.weight)
    elif name.endswith(("conv2", "proj")):
        layer.weight.mul_(_QUIET)
        layer.bias.zero_()
    elif name.endswith("resample.1"):
        _reset(layer)
        if down:
            layer.weight[range(len(layer.weight)), range(len(layer.weight)), :2, :2] = 0.25
        else:
            _pass_through(layer.weight)
    elif name.endswith("time_conv"):
        _reset(layer)
        channels = layer.weight.shape[1]
        for half in range(layer.weight.shape[0] // channels):
            rows = range(half * channels, (half + 1) * channels)
            layer.weight[rows, range(channels), (1 if down else 2) :] = 0.5 if down else 1.0


def _reset(layer: nn.Module) -> None:
    layer.weight.mul_(_QUIET)
    layer.bias.zero_()
    diagonal = min(layer.weight.shape[:2])
    layer.weight[range(diagonal), range(diagonal)] = 0


def _pass_through(weight: Tensor) -> None:
    """Channel c in is channel c out, at the newest time tap and the central pixel."""
    count = min(weight.shape[:2])
    taps = (-1, *(size // 2 for size in weight.shape[3:])) if weight.ndim == 5 else tuple(
        size // 2 for size in weight.shape[2:]
    )
    weight[(range(count), range(count), *taps)] = 1.0


def _paired_input(conv: nn.Conv3d) -> None:
    """Channels 0-2 carry the first three inputs, 3-5 their negatives, one is constant."""
    conv.bias.zero_()
    for channel in range(3):
        conv.weight[[channel, channel + 3]] = 0
        conv.weight[channel, channel, -1, 1, 1] = 1.0
        conv.weight[channel + 3, channel, -1, 1, 1] = -1.0
    conv.weight[_STEADY_CHANNEL] = 0
    conv.bias[_STEADY_CHANNEL] = _STEADY


def _paired_output(conv: nn.Conv3d, count: int) -> None:
    """Undo the pairs behind the last SiLU."""
    conv.bias.zero_()
    conv.weight[:count] *= _QUIET
    for channel in range(count):
        conv.weight[channel, [channel, channel + 3]] = 0
        conv.weight[channel, channel, -1, 1, 1] = 1.0
        conv.weight[channel, channel + 3, -1, 1, 1] = -1.0
