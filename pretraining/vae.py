"""Trains the tiny VAE: `python -m pretraining.vae --out DIR [--steps N] [--minutes M]`. Run again to resume."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from models.wan import whole_clip
from pretraining import clips, loop, replicas, shift
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
SHIFTED_BATCH, SHIFTED_SIDE = 2, 72
DECODER_SHAPES: tuple[Shape, ...] = ((2, 13, 64),)


@dataclass(frozen=True)
class Options(loop.Options):
    """A VAE run.

    Attributes:
        start: weights to begin from instead of the structured start.
        decoder_only: freeze the encoder and train on its latents.
        shifted: share of the steps that decode latents moved by a part of a latent; above 0, all steps see crops of clips at
            full size, around objects.
    """

    start: Path | None = None
    decoder_only: bool = False
    shifted: float = 0.0


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

    def learn(self) -> dict[str, Tensor | float]:
        loss, metrics = self.loss()
        self.update(loss)
        return metrics

    def loss(self) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Of this process's clips of the step, with what to report of them."""
        options = self.options
        batch, mine = self._batch(), replicas.own()
        video = batch[mine].to(options.device)
        down, right = self._shift()
        with torch.autocast(options.device.split(":")[0], dtype=torch.bfloat16):
            with torch.set_grad_enabled(not self.decoder_only):
                mean, logvar = (part.float() for part in whole_clip.encode_moments(self.vae, video))
            logvar = logvar.clamp(-20, 10)
            generator = self.generator()
            noise = torch.randn((len(batch), *mean.shape[1:]), generator=generator, device=generator.device)[mine]
            latents = mean + noise * (0.5 * logvar).exp()
            if down or right:
                latents, video = shift.moved(latents, down, right), shift.same_part(video, down, right)
            output = self.decode(self.vae, latents).float()
        error = reconstruction_error(output, video)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        name = "shifted" if down or right else "psnr"
        return error + KL_WEIGHT * kl, {"loss": error.item(), "kl": kl.item(), name: psnr(output.detach(), video)}

    def _batch(self) -> Tensor:
        """The clips of this step for all processes, (B, 3, F, H, W)."""
        options = self.options
        if options.shifted:
            return clips.object_batch(options.seed + 1, self.step, replicas.shareable(SHIFTED_BATCH), SHIFTED_SIDE)
        batch, frames, side = _shape(self.step, options.steps, self.decoder_only)
        return clips.vae_batch(options.seed + 1, self.step, replicas.shareable(batch), frames, side)

    def _shift(self) -> tuple[int, int]:
        """Pixels down and right by which this step's latents are moved."""
        rng = np.random.default_rng([self.options.seed, self.step, 0x5417])
        if rng.random() >= self.options.shifted:
            return 0, 0
        down, right = rng.integers(0, shift.STRIDE, 2)
        return int(down), int(right)


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
    """Mean PSNR in dB over held-out scenes: clips, first-frame conditions, single images, clips by half a latent moved."""
    video = clips.held_out_videos(count).to(vae.device)
    sums = {"video": 0.0, "condition": 0.0, "image": 0.0, "shifted": 0.0}
    for clip in video.split(1):
        targets = {"video": clip, "condition": clips.first_frame_condition(clip), "image": clip[:, :, :1], "shifted": clip}
        for name, target in targets.items():
            half = shift.STRIDE // 2 if name == "shifted" else None
            sums[name] += _coded_psnr(vae, target, half) / count
    return {name: round(value, 3) for name, value in sums.items()}


def _coded_psnr(vae: AutoencoderKLWan, video: Tensor, by: int | None) -> float:
    """PSNR of a video through the VAE, its latents moved `by` so many pixels down and right."""
    with torch.autocast(vae.device.type, dtype=torch.bfloat16):
        latents, _ = whole_clip.encode_moments(vae, video)
        if by is not None:
            latents, video = shift.moved(latents, by, by), shift.same_part(video, by, by)
        return psnr(whole_clip.decode(vae, latents).float(), video)


def main() -> None:
    parser = loop.parser(__doc__, loop.Options(Path()))
    parser.add_argument("--start", type=loop.existing, help="vae.pt to begin from")
    parser.add_argument("--decoder-only", action="store_true", help="freeze the encoder")
    parser.add_argument("--shifted", type=float, default=0.0, metavar="SHARE",
                        help="share of steps on latents moved by a part of a latent, e.g. 0.6 (pretraining/shift.py)")
    options = Options(**vars(parser.parse_args()))
    with loop.started(options.device, options.threads):
        loop.run(VAETraining(options))


if __name__ == "__main__":
    sys.exit(loop.guarded(main))
