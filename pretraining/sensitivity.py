"""How much each latent channel matters to the picture, and what weight its error gets in training."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from models.wan import whole_clip
from pretraining import clips
from pretraining.latents import encode_normalised, statistics, training_scenes

_SHARD = 10**9  # of scenes to measure on; no pool grows so large
_CLIPS = 8


@torch.enable_grad()
def sensitivity(vae: AutoencoderKLWan, videos: Tensor) -> Tensor:
    """Squared change of the video per squared change of each latent channel, (channels,).

    The squared norm of the decoder's Jacobian, estimated by one random direction in the space of pixels for each clip
    (Hutchinson): E |J^T r|^2 = |J|^2 for r with independent entries of variance 1.

    Args:
        vae: latents as its config says.
        videos: (clips, 3, frames, height, width) in [-1, 1].
    """
    shift, scale = statistics(vae)
    noise = torch.Generator().manual_seed(0)
    found = []
    for video in videos:
        latents = encode_normalised(vae, video[None]).requires_grad_()
        direction = torch.randn(video[None].shape, generator=noise).to(latents)
        (gradient,) = torch.autograd.grad(whole_clip.decode(vae, latents * scale + shift), latents, direction)
        found.append(gradient.square().sum(dim=(0, 2, 3, 4)))
    return torch.stack(found).mean(0)


def channel_weights(vae: AutoencoderKLWan, size: int) -> Tensor:
    """Weights for the training loss, (1, channels, 1, 1, 1), mean 1: the root of each channel's sensitivity.

    Latents have unit variance in every channel, whatever it does in the picture. In the tiny VAE three channels carry the
    colours, and an error there is a hundred times as visible as in a channel of detail; a plain mean would spend most of
    a small model on what is hardly seen. The root, and not the sensitivity itself, because details make edges.

    Args:
        vae: latents as its config says.
        size: side in pixels of the clips to measure on, which are those to train on.
    """
    videos = torch.stack([clips.scene_video(scene, size=size) for scene, _ in training_scenes(_SHARD, _CLIPS)])
    weights = sensitivity(vae, videos.to(vae.device)).sqrt()
    return (weights / weights.mean()).view(1, -1, 1, 1, 1)
