"""Fills a folder with encoded training clips: `python -m pretraining.latents --vae vae.pt --out DIR --shards N`.

Run again to go on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import avg_pool2d

from common.errors import UserError
from common.files import write_atomic
from common.progress import progress
from loraedit_ext.evaluation.captions import caption
from loraedit_ext.evaluation.rendering import Rendered, render
from loraedit_ext.evaluation.scenes import Scene, another_future, random_scene
from models.wan import whole_clip
from models.wan.encoders import WanVAE
from pretraining import clips, loop, replicas, symmetries
from pretraining.conditioning import Conditioner

SHARD = 64
FUTURES = 4  # clips that share a first frame: their condition is encoded once, and no first frame gives its clip away
_ANYWHERE = 0.02  # of an object's weight is what a place without objects has, when windows are drawn
_STILL_CAPTIONS = 0.2  # share of captions that say nothing about motion, as a caption of the first frame alone


@dataclass
class LatentPool:
    """Encoded clips. Floating-point tensors, first axis the clips.

    Attributes:
        video, condition: (clips, 16, T, h, w), normalised latents of the clip and of its first-frame condition.
        text: (clips, TEXT_LEN, text width), zero-padded.
        image: (clips, tokens, image width).
        objects: (clips, h, w) in [0, 1], the share of a latent's pixels, over all frames, in which an object is seen.
    """

    video: Tensor
    condition: Tensor
    text: Tensor
    image: Tensor
    objects: Tensor

    def __len__(self) -> int:
        return len(self.video)

    @property
    def area(self) -> int:
        """Latents of a latent frame."""
        return self.video.shape[-2] * self.video.shape[-1]

    def take(self, indices: Tensor | slice) -> LatentPool:
        return LatentPool(*(part[indices].float() for part in vars(self).values()))

    def to(self, device: str) -> LatentPool:
        return LatentPool(*(part.to(device) for part in vars(self).values()))

    def windows(self, generator: torch.Generator) -> LatentPool:
        """Half of the height and width of each clip around a random point of an object, on the grid of 2x2 latents (a token).

        Away from the objects there is little left to learn: three quarters of the error lay in a quarter of the picture.
        """
        height, width = (side // 2 for side in self.video.shape[-2:])
        points = torch.multinomial(self.objects.flatten(1) + _ANYWHERE, 1, generator=generator)[:, 0]
        # The point's place in the window:
        drift = 0.25 + 0.5 * torch.rand((2, len(self)), generator=generator, device=generator.device)
        tops = _on_tokens(points // self.objects.shape[-1] - height * drift[0], height)
        lefts = _on_tokens(points % self.objects.shape[-1] - width * drift[1], width)

        rows = tops[:, None, None] + torch.arange(height, device=tops.device)[:, None]
        columns = lefts[:, None, None] + torch.arange(width, device=lefts.device)
        each = torch.arange(len(self), device=tops.device)[:, None, None]

        def cut(part: Tensor) -> Tensor:
            return part.movedim((-2, -1), (1, 2))[each, rows, columns].movedim((1, 2), (-2, -1)).contiguous()

        return LatentPool(cut(self.video), cut(self.condition), self.text, self.image, cut(self.objects))

    def joined(self, others: list[LatentPool]) -> LatentPool:
        return LatentPool(*(
            torch.cat([part, *(getattr(other, name) for other in others)]) for name, part in vars(self).items()
        ))


def _on_tokens(starts: Tensor, last: int) -> Tensor:
    """The even numbers from 0 to `last` nearest to where windows ought to start."""
    return (2 * (starts / 2).round().long()).clamp(0, last)


def encode_scenes(
    vae: AutoencoderKLWan, conditioner: Conditioner, scenes: list[tuple[Scene, bool]], futures: int = 1,
    size: int = clips.SIZE, variants: int = 1,
) -> LatentPool:
    """Encode scenes with their captions, in half precision.

    Args:
        vae: of latents as its config says.
        conditioner: of texts and first frames.
        scenes: each with whether its caption says how things move; each run of `futures` shares its first frame.
        futures: clips of a first frame.
        size: side of the clips in pixels.
        variants: of each clip, mirrored and turned (`symmetries`), 1 to 8: rendering takes the longer part of the time.
    """
    parts: dict[str, list[Tensor]] = {field.name: [] for field in fields(LatentPool)}
    for start in range(0, len(scenes), futures):
        group = scenes[start : start + futures]
        rendered = [render(scene, clips.FRAMES, (size, size)) for scene, _ in group]
        video = torch.stack([clips.to_tensor(one.video) for one in rendered])
        objects = torch.stack([object_share(one) for one in rendered])
        for variant in range(variants):
            words = [caption(symmetries.of_scene(scene, variant), motion) for scene, motion in group]
            encoded = _encode(vae, conditioner, symmetries.of_picture(video, variant), words)
            for name, part in (encoded | {"objects": symmetries.of_picture(objects, variant)}).items():
                parts[name].append(part)
    return LatentPool(**{name: torch.cat(values).half().cpu().contiguous() for name, values in parts.items()})


def _encode(vae: AutoencoderKLWan, conditioner: Conditioner, video: Tensor, words: list[str]) -> dict[str, Tensor]:
    """Of clips (clips, 3, frames, size, size) that share their first frame."""
    first, count = video[:1], len(video)
    # On a CPU one by one: four at a time fall out of its cache and take a third longer.
    latents = torch.cat([encode_normalised(vae, part) for part in video.split(1 if vae.device.type == "cpu" else count)])
    condition = encode_normalised(vae, clips.first_frame_condition(first))
    return {
        "video": latents,
        "condition": condition.expand(count, -1, -1, -1, -1),
        "text": torch.stack([conditioner.text(each) for each in words]),
        "image": conditioner.image(first[:, :, 0]).expand(count, -1, -1),
    }


def object_share(rendered: Rendered) -> Tensor:
    """Share of each latent's pixels, over all frames, in which an object is seen; (h, w) in [0, 1]."""
    seen = torch.from_numpy(rendered.visible).sum(0).mean(0)
    return avg_pool2d(seen[None], WanVAE.spatial_factor)[0]


@torch.no_grad()
def encode_normalised(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Mode of the posterior, normalised by the statistics of the VAE's config; float32."""
    with torch.autocast(vae.device.type, dtype=torch.bfloat16):
        mean, _ = whole_clip.encode_moments(vae, video.to(vae.device))
    shift, scale = statistics(vae)
    return (mean.float() - shift) / scale


@torch.no_grad()
def decode_normalised(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Video in [-1, 1] of normalised latents."""
    shift, scale = statistics(vae)
    with torch.autocast(vae.device.type, dtype=torch.bfloat16):
        return whole_clip.decode(vae, latents.to(vae.device) * scale + shift).float().clamp(-1, 1)


def statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Per-channel mean and standard deviation that the config names, as (1, z_dim, 1, 1, 1)."""
    names = ("latents_mean", "latents_std")
    shift, scale = (torch.tensor(vae.config[name], device=vae.device).view(1, -1, 1, 1, 1) for name in names)
    return shift, scale


def training_scenes(shard: int, count: int = SHARD, seed: int = 0) -> list[tuple[Scene, bool]]:
    """Scenes of a shard, each with whether its caption says how things move; determined by seed and shard number."""
    rng = np.random.default_rng([seed, shard, 0x1A7])
    drawn: list[Scene] = []
    while len(drawn) < count:
        scene = random_scene(clips.training_seed(rng))
        drawn += [scene, *(another_future(scene, clips.training_seed(rng)) for _ in range(FUTURES - 1))]
    drawn = [clips.at_some_pace(scene, rng) for scene in drawn]
    return [(scene, bool(rng.random() > _STILL_CAPTIONS)) for scene in drawn]


def fill(
    out: Path, encode: Callable[[list[tuple[Scene, bool]]], LatentPool], shards: Sequence[int], minutes: float | None
) -> None:
    """Write the shards that are missing."""
    paths = {shard: out / f"{shard:05d}.safetensors" for shard in shards}
    missing = [shard for shard in shards if not paths[shard].exists()]
    started = time.monotonic()
    with progress(len(missing), f"encoding {SHARD} clips each", unit="shard") as bar:
        for shard in missing:
            tensors = vars(encode(training_scenes(shard)))
            write_atomic(paths[shard], partial(save_file, tensors))
            bar.update()
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break


def load_shards(folder: Path, known: set[str]) -> list[LatentPool]:
    """Shards of a folder that are not in `known` yet; adds their names to it."""
    names = replicas.agreed(sorted(path.name for path in folder.glob("*.safetensors")))
    fresh = [name for name in names if name not in known]
    known.update(fresh)
    return [_shard(folder / name) for name in fresh]


class PoolFolder:
    """The clips of a folder of shards, on the device: the first shard's for validation, all others to train on.

    Raises:
        UserError: fewer than two shards.
    """

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device = folder, device
        self._known: set[str] = set()
        shards = self._fresh()
        if len(shards) < 2:
            raise UserError(
                f"{folder}: {len(shards)} shards of latents; expected two or more (the first is for validation). "
                "Run `python -m pretraining.latents` first."
            )
        self.validation = shards[0]
        self.training = shards[1].joined(shards[2:])

    def take_up(self) -> None:
        """Train on the shards that have appeared meanwhile, too."""
        if fresh := self._fresh():
            self.training = self.training.joined(fresh)

    def _fresh(self) -> list[LatentPool]:
        return [shard.to(self.device) for shard in load_shards(self.folder, self._known)]


def _shard(path: Path) -> LatentPool:
    tensors = load_file(path)
    expected = {field.name for field in fields(LatentPool)}
    if tensors.keys() != expected:
        raise UserError(
            f"{path}: holds {', '.join(sorted(tensors))}; expected {', '.join(sorted(expected))}. It is no shard of this "
            "version: make the folder again with `python -m pretraining.latents`."
        )
    return LatentPool(**tensors)


def main() -> None:
    from pretraining.vae import load_vae

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=loop.existing, required=True, help="VAE weights from pretraining.freeze")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--shards", type=int, default=300, help=f"how many, of {SHARD} clips each")
    parser.add_argument("--first", type=int, default=0, help="number of the first, for several processes side by side")
    parser.add_argument("--size", type=int, default=clips.SIZE, help="side of the clips in pixels; a folder holds one size")
    parser.add_argument("--variants", type=int, choices=range(1, symmetries.COUNT + 1), default=1, metavar="N",
                        help="mirror and turn each clip into so many, up to 8; new clips for less than rendering takes")
    parser.add_argument("--minutes", type=float, help="stop after this long; run again to go on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    with loop.started(options.device):
        vae, conditioner = load_vae(options.vae, options.device), Conditioner()
        shards = range(options.first, options.first + options.shards)[replicas.own()]
        fill(
            options.out, lambda scenes: encode_scenes(vae, conditioner, scenes, FUTURES, options.size, options.variants),
            shards, options.minutes,
        )


if __name__ == "__main__":
    sys.exit(loop.guarded(main))
