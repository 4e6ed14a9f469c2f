"""Measures a checkpoint on held-out scenes and draws contact sheets: `python -m pretraining.evaluate CKPT --out DIR`.

Everything goes through the project's ordinary loader, so it is the files that are measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from common.files import write_json_atomic
from loraedit_ext import flow
from loraedit_ext.evaluation.captions import caption
from loraedit_ext.evaluation.rendering import render
from loraedit_ext.evaluation.scenes import Scene
from models.base import TIMESTEPS
from models.wan.checkpoint import WanCheckpoint
from models.wan.encoders import WanImageEncoder, WanTextEncoder, WanVAE
from models.wan.transformer import WanTransformer
from pretraining import clips, loop, restart
from pretraining.latents import object_share
from pretraining.sensitivity import channel_weights
from pretraining.transformer import SHIFT, conditioning
from pretraining.vae import psnr

LEVELS = (0.15, 0.3, 0.5, 0.7, 0.85, 0.95)


class TinyModel:
    """The loaded parts, and image-to-video sampling with them."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        checkpoint = WanCheckpoint.open(folder)
        self.device = device
        self.vae: WanVAE = checkpoint.load_vae(device)
        self.text: WanTextEncoder = checkpoint.load_text_encoder()
        self.image: WanImageEncoder = checkpoint.load_image_encoder()
        self.transformer = WanTransformer(checkpoint.config)
        tensors = checkpoint.transformer_tensors()
        self.transformer.load_state_dict({name: tensors[name].float() for name in tensors})
        self.transformer.to(device).eval().requires_grad_(False)

    def context(self, video: Tensor, prompt: str) -> tuple[Tensor, Tensor, Tensor]:
        """Conditioning (1, 20, T, h, w), text and image features of a clip's first frame."""
        condition = self.vae.encode(clips.first_frame_condition(video)[None])
        text = self.text.encode(prompt)[None]
        return conditioning(condition), text.to(self.device), self.image.encode(video[:, 0])[None].to(self.device)

    def predict(self, x: Tensor, t: Tensor, context: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Velocity of latents x (1, 16, T, h, w) at noise level t (scalar or (1,))."""
        return self.transformer(x, t.reshape(1).to(x) * TIMESTEPS, *context)

    @torch.no_grad()
    def animate(
        self, video: Tensor, prompt: str, seed: int, steps: int = 25, shift: float = 3.0, guidance: float = 1.0
    ) -> Tensor:
        """A video (3, F, H, W) in [-1, 1] from the first frame of `video` and a prompt, by restart sampling."""
        context = self.context(video, prompt)
        silent = None if guidance == 1.0 else self.context(video, "")
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(context[0][:, :16].shape, generator=random).to(self.device)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            guided = self.predict(x, t, context)
            if silent is None:
                return guided
            free = self.predict(x, t, silent)
            return free + guidance * (guided - free)

        way = restart.levels(flow.inference_sigmas(steps, shift, "euler").tolist(), restart.RESTARTS)
        return self.vae.decode(restart.sample(predict, noise, way, random))[0].cpu()


def held_out(count: int, size: int, first: int = 0) -> list[tuple[Scene, Tensor]]:
    """Scenes that no training run sees, with their videos (3, FRAMES, size, size)."""
    scenes = [clips.held_out_scene(first + index) for index in range(count)]
    return [(scene, clips.scene_video(scene, size=size)) for scene in scenes]


@torch.no_grad()
def reconstruction(model: TinyModel, count: int, size: int) -> dict[str, float]:
    """Mean PSNR in dB of encoding and decoding held-out clips, first-frame conditions and single images."""
    scores: dict[str, list[float]] = {"video": [], "condition": [], "image": []}
    for _, video in held_out(count, size):
        targets = {"video": video, "condition": clips.first_frame_condition(video), "image": video[:, :1]}
        for name, target in targets.items():
            output = model.vae.decode(model.vae.encode(target[None]))[0].cpu()
            scores[name].append(psnr(output, target))
    return {f"vae_{name}_psnr": round(float(np.mean(values)), 2) for name, values in scores.items()}


@torch.no_grad()
def validation_loss(model: TinyModel, weights: Tensor, count: int, size: int) -> dict[str, float]:
    """Flow-matching loss on held-out clips, noise levels evenly spread over the training distribution's range.

    With all latent channels alike, and weighed by their part in the picture as in training (`channel_weights`).
    """
    levels = flow.apply_shift(torch.linspace(0.02, 0.98, count), SHIFT)
    noise = torch.Generator().manual_seed(5)
    plain = weighted = 0.0
    for (scene, video), t in zip(held_out(count, size), levels, strict=True):
        x = model.vae.encode(video[None])
        eps = torch.randn(x.shape, generator=noise).to(x)
        predicted = model.predict(flow.add_noise(x, eps, t.reshape(1).to(x)), t, model.context(video, caption(scene)))
        velocity = flow.velocity(x, eps)
        plain += flow.loss(predicted, velocity).item()
        weighted += flow.loss(predicted, velocity, weights).item()
    return {"transformer_loss": round(plain / count, 4), "transformer_weighted_loss": round(weighted / count, 4)}


@torch.no_grad()
def loss_by_level(model: TinyModel, weights: Tensor, count: int, size: int) -> dict[str, list[float]]:
    """Weighted loss after the first latent frame at each of `LEVELS`: over the picture, and on and beside objects."""
    noise = torch.Generator().manual_seed(3)
    sums = {"loss_by_level": torch.zeros(len(LEVELS)), "object_loss_by_level": torch.zeros(len(LEVELS))}
    for scene, video in held_out(count, size):
        x, context = model.vae.encode(video[None]), model.context(video, caption(scene))
        eps = torch.randn(x.shape, generator=noise).to(x)
        later = torch.ones_like(x[:, :1])
        later[:, :, 0] = 0
        share = object_share(render(scene, clips.FRAMES, (size, size))).to(x)
        near = (max_pool2d(share[None], 3, stride=1, padding=1) > 0).to(x)
        for index, level in enumerate(LEVELS):
            t = torch.tensor(level)
            predicted = model.predict(flow.add_noise(x, eps, t.reshape(1).to(x)), t, context)
            for total, place in zip(sums.values(), (later, later * near), strict=True):
                total[index] += flow.loss(predicted, flow.velocity(x, eps), weights * place).item()
    return {name: [round(value, 4) for value in (total / count).tolist()] for name, total in sums.items()}


def sheet(rows: list[list[Tensor]], path: Path, every: int = 3) -> None:
    """A PNG of videos (3, F, H, W): one row a scene, its videos side by side, every `every`-th frame of each."""
    lines = []
    for videos in rows:
        frames = [video[:, ::every].transpose(0, 1) for video in videos]
        gap = torch.ones(3, frames[0].shape[2], 4)
        parts = [torch.cat([*pictures, gap], dim=2) for pictures in frames]
        lines.append(torch.cat(parts, dim=2))
    pixels = (torch.cat(lines, dim=1).permute(1, 2, 0).clamp(-1, 1) * 127.5 + 127.5).byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@torch.no_grad()
def draw(model: TinyModel, out: Path, count: int, size: int, guidance: float) -> None:
    """Contact sheets: clip and reconstruction; clip and two samples from its first frame."""
    scenes = held_out(count, size, first=100)
    restored = [[video, model.vae.decode(model.vae.encode(video[None]))[0].cpu()] for _, video in scenes]
    sheet(restored, out / "reconstructions.png")
    samples = [
        [video, *(model.animate(video, caption(scene), seed, guidance=guidance) for seed in (0, 1))]
        for scene, video in scenes
    ]
    sheet(samples, out / "samples.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=loop.existing)
    parser.add_argument("--out", type=Path, required=True, help="folder of metrics.json and the sheets")
    parser.add_argument("--clips", type=int, default=64, help="held-out clips to measure on")
    parser.add_argument("--rows", type=int, default=10, help="scenes on the sheets")
    parser.add_argument("--size", type=int, default=clips.SIZE, help="side of the clips in pixels")
    parser.add_argument("--guidance", type=float, default=1.0, help="by captions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    loop.limit_threads(options.device)
    model = TinyModel(options.checkpoint, options.device)
    draw(model, options.out, options.rows, options.size, options.guidance)
    metrics: dict[str, Any] = {"clips": options.clips, "levels": LEVELS}
    metrics |= reconstruction(model, options.clips, options.size)
    weights = channel_weights(model.vae.model, options.size)
    for measure in (validation_loss, loss_by_level):
        metrics |= measure(model, weights, options.clips, options.size)
    write_json_atomic(options.out / "metrics.json", metrics)
    print(json.dumps(metrics))


if __name__ == "__main__":
    sys.exit(loop.guarded(main))
