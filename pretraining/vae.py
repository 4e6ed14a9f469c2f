"""Trains the tiny VAE: `python -m pretraining.vae --out DIR [--steps N] [--minutes M]`. Run again to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from models.wan import whole_clip
from pretraining import clips, loop
from pretraining.structured import calibrate, structure

KL_WEIGHT = 1e-4
EDGE_WEIGHT = 2.0
BASE_DIM = 16
Shape = tuple[int, int, int]
# (share of the run at which the phase ends, batches (count, frames, side) that take turns)
PHASES: tuple[tuple[float, tuple[Shape, ...]], ...] = (
    (0.05, ((8, 1, 32), (4, 5, 32))),
    (0.55, ((4, 13, 32), (4, 5, 48), (6, 1, 64), (4, 13, 32))),
    (1.00, ((2, 13, 64), (4, 13, 32))),
)
DECODER_SHAPES: tuple[Shape, ...] = ((2, 13, 64),)


@dataclass(frozen=True)
class Options(loop.Options):
    """A VAE run.

    Attributes:
        start: weights to begin from instead of the structured start.
        decoder_only: freeze the encoder and train on its latents.
    """

    start: Path | None = None
    decoder_only: bool = False


def build(seed: int = 0) -> AutoencoderKLWan:
    """A Wan2.1 VAE of the real layout (8x8x4, z 16, two residual blocks a level) at base width 16, structured start."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(base_dim=BASE_DIM)
    structure(vae)
    calibrate(vae, clips.vae_batch(seed, 0, 8, 1, clips.VAE_SIZE))
    return vae


def load_vae(path: Path, device: str = "cpu") -> AutoencoderKLWan:
    """A VAE of `build`'s shape with weights from a file, ready for inference."""
    vae = AutoencoderKLWan(base_dim=BASE_DIM)
    vae.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    return vae.to(device).eval().requires_grad_(False)


class VAETraining(loop.Training):
    """Reconstruction with a light KL term, all in bf16 autocast."""

    def __init__(self, options: Options) -> None:
        vae = build(options.seed)
        if options.start:
            vae.load_state_dict(torch.load(options.start, weights_only=True, map_location="cpu"))
        if options.decoder_only:
            vae.encoder.requires_grad_(False)
            vae.quant_conv.requires_grad_(False)
        self.vae = vae
        self.decoder_only = options.decoder_only
        self.decode = torch.compile(whole_clip.decode, dynamic=False) if options.compile else whole_clip.decode
        super().__init__(options, vae)

    def weights(self) -> dict[str, dict[str, Any]]:
        return {"vae.pt": self.vae.state_dict()}

    def evaluate(self, final: bool) -> dict[str, float]:
        return evaluate(self.vae, 16 if final else 6)

    def loss(self) -> tuple[Tensor, dict[str, float]]:
        options = self.options
        batch, frames, side = _shape(self.step, options.steps, self.decoder_only)
        video = clips.vae_batch(options.seed + 1, self.step, batch, frames, side).to(options.device)
        with torch.autocast(options.device.split(":")[0], dtype=torch.bfloat16):
            with torch.set_grad_enabled(not self.decoder_only):
                mean, logvar = (part.float() for part in whole_clip.encode_moments(self.vae, video))
            logvar = logvar.clamp(-20, 10)
            noise = torch.randn(mean.shape, generator=self.generator()).to(mean)
            output = self.decode(self.vae, mean + noise * (0.5 * logvar).exp()).float()
        error = reconstruction_error(output, video)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        metrics = {"loss": error.item(), "kl": kl.item(), "psnr": psnr(output.detach(), video)}
        return error + KL_WEIGHT * kl, metrics


def reconstruction_error(output: Tensor, video: Tensor) -> Tensor:
    """L1 and squared error, with edges in space and time (where a small VAE blurs) weighing more."""
    steps = [video.diff(dim=axis).abs().mean(1, keepdim=True) for axis in (2, 3, 4)]
    edges = torch.zeros_like(video[:, :1])
    edges[:, :, 1:] += steps[0]
    edges[:, :, :, 1:] += steps[1]
    edges[..., 1:] += steps[2]
    weight = 1 + EDGE_WEIGHT * edges.clamp(max=1)
    error = output - video
    return ((error.abs() + 2 * error.square()) * weight).mean() / weight.mean()


def psnr(output: Tensor, video: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of values in [-1, 1], over the whole batch."""
    return -10 * math.log10(max((output.clamp(-1, 1) - video).square().mean().item() / 4, 1e-12))


def _shape(step: int, steps: int, decoder_only: bool) -> Shape:
    if decoder_only:
        return DECODER_SHAPES[step % len(DECODER_SHAPES)]
    shapes = next((shapes for end, shapes in PHASES if step < end * steps), PHASES[-1][1])
    return shapes[step % len(shapes)]


@torch.no_grad()
def evaluate(vae: AutoencoderKLWan, count: int = 16) -> dict[str, float]:
    """Mean PSNR in dB over held-out scenes: clips, first-frame conditions, single images."""
    video = clips.held_out_videos(count).to(vae.device)
    sums = {"video": 0.0, "condition": 0.0, "image": 0.0}
    for clip in video.split(1):
        targets = {"video": clip, "condition": clips.first_frame_condition(clip), "image": clip[:, :, :1]}
        for name, target in targets.items():
            with torch.autocast(vae.device.type, dtype=torch.bfloat16):
                mean, _ = whole_clip.encode_moments(vae, target)
                output = whole_clip.decode(vae, mean)
            sums[name] += psnr(output.float(), target) / count
    return {name: round(value, 3) for name, value in sums.items()}


def main() -> None:
    parser = loop.parser(__doc__, loop.Options(Path()))
    parser.add_argument("--start", type=Path, help="vae.pt to begin from")
    parser.add_argument("--decoder-only", action="store_true", help="freeze the encoder")
    options = Options(**vars(parser.parse_args()))
    loop.limit_threads(options.device, options.threads)
    loop.run(VAETraining(options))


if __name__ == "__main__":
    main()
