"""Trains the tiny transformer: `python -m pretraining.transformer --latents DIR ... --out DIR [--steps N] [--minutes M]`.

Plain first-frame image-to-video by flow matching, as the released models were trained: the mask is 1 on frame 0 only.
Clips of several sizes lie in a folder each, and a step sees those of one. Run again to resume; shards that appear meanwhile
are taken up.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from common.errors import UserError
from loraedit_ext import flow
from models.base import TIMESTEPS
from models.blocks import TransformerBlock
from models.layers import sinusoid
from models.wan.config import WanConfig
from models.wan.encoders import WanVAE
from models.wan.transformer import Conditions, EmbedLayer, WanTransformer
from pretraining import encoders, loop, replicas
from pretraining.conditioning import Conditioner
from pretraining.graphs import Replayed
from pretraining.grow import grown
from pretraining.latents import LatentPool, PoolFolder
from pretraining.sensitivity import channel_weights
from pretraining.vae import load_vae

SHIFT = 2.0
TEXT_DROPOUT = 0.15
EMA = 0.999
_LOOK_EVERY = 100  # steps between two looks for new shards


def tiny_config() -> WanConfig:
    """About 6 M parameters, 6 heads of 32."""
    return WanConfig(
        dim=192, ffn_dim=576, num_heads=6, num_layers=9,
        text_dim=encoders.TEXT_DIM, text_len=encoders.TEXT_LEN, image_dim=encoders.IMAGE_DIM,
    )


def build(config: WanConfig, seed: int = 0) -> WanTransformer:
    """Fresh weights: linears with variance 1 / inputs, modulation and the head's output near zero."""
    torch.manual_seed(seed)
    model = WanTransformer(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    for parameter in (model.head.head.weight, model.head.modulation, *(block.modulation for block in model.blocks)):
        torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(model.time_projection[1].weight, std=0.02)
    for block in model.blocks:  # gates start open: a tiny model has no depth to lose by it
        with torch.no_grad():
            block.modulation[:, [2, 5]] = 0.5
    return model


def velocity(model: WanTransformer, noisy: Tensor, timestep: Tensor, y: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """The model's output with gradients for every parameter.

    `WanTransformer.forward` detaches the embeddings on their way through the pipeline: a LoRA needs no gradient there,
    pretraining does. Shapes as there.
    """
    patches = model.patch_embedding(torch.cat([noisy, y], dim=1))
    frames, height, width = patches.shape[2:]
    rope = _rope(model, (frames, height, width), noisy.device)
    time = model.time_embedding(sinusoid(timestep, model.config.freq_dim))
    modulation = model.time_projection(time).unflatten(1, (6, -1))
    at = Conditions(modulation, rope, (model.text_embedding(text), model.img_emb(image)))
    hidden = patches.flatten(2).transpose(1, 2).float()
    for block in model.blocks:
        hidden = block(hidden, at)
    pt, ph, pw = model.config.patch_size
    return rearrange(
        model.head(hidden, time), "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
        t=frames, h=height, w=width, pt=pt, ph=ph, pw=pw,
    )


@lru_cache
def _rope(model: WanTransformer, grid: tuple[int, int, int], device: torch.device) -> Tensor:
    """Kept: made anew and sent to a GPU at every step, it would wait there for the step before."""
    return EmbedLayer(model).rope(grid).to(device)


def compile_blocks(model: nn.Module) -> None:
    """torch.compile for the blocks, in place: they share one compiled program a shape, made in seconds."""
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            module.compile(dynamic=False)


def conditioning(condition: Tensor) -> Tensor:
    """(batch, 20, T, h, w): Wan's first-frame mask, 1 on latent frame 0, and the condition latents."""
    mask = torch.zeros_like(condition[:, :4])
    mask[:, :, 0] = 1
    return torch.cat([mask, condition], dim=1)


@dataclass(frozen=True)
class Options(loop.Options):
    """A transformer run.

    Attributes:
        latents: folders of shards that `pretraining.latents` fills; each step draws from one of them.
        batch: clips of the first folder's size a step; of larger ones as many fewer.
        start: weights to begin from instead of fresh ones; a smaller model's are grown.
        vae: weigh the error in each latent channel by what this VAE's decoder makes of it; None: all alike.
        windows: share of the steps that see windows of half the height and width, out of four times as many clips.
        graphs: on one GPU, replay a step as a CUDA graph: four times as fast as launching it kernel by kernel.
    """

    latents: Sequence[Path] = ()
    batch: int = 16
    start: Path | None = None
    vae: Path | None = None
    windows: float = 0.0
    graphs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.graphs and not self.device.startswith("cuda"):
            raise UserError(f"--graphs records steps on a GPU; --device is {self.device}, expected cuda. Leave --graphs out.")


class TransformerTraining(loop.Training):
    """Flow matching on the latent pool, with an exponential moving average of the weights."""

    evaluate_every = 500

    def __init__(self, options: Options) -> None:
        self.batch, self.windows = options.batch, options.windows
        model = self.fresh(options)
        if options.start:
            start = torch.load(options.start, weights_only=True, map_location="cpu")
            model.load_state_dict(grown(start, model.config))
        self.average = copy.deepcopy(model).requires_grad_(False).to(options.device)
        if options.compile:
            compile_blocks(model)
        self.silence = Conditioner().text("").to(options.device)
        self.folders = [PoolFolder(folder, options.device) for folder in options.latents]
        self.channel_weights = self._channel_weights(options)
        super().__init__(options, model, decay=0.01)
        self.following = torch.zeros((), device=options.device)
        self.learn_from = Replayed(self._learn_from) if options.graphs else self._learn_from

    @staticmethod
    def fresh(options: Options) -> nn.Module:
        """The transformer to train."""
        return build(tiny_config(), options.seed)

    @staticmethod
    def predict(model: nn.Module, noisy: Tensor, t: Tensor, clips: LatentPool) -> Tensor:
        """Velocity (clips, 16, T, h, w) of noisy latents, conditioned as released."""
        return velocity(model, noisy, t * TIMESTEPS, conditioning(clips.condition), clips.text, clips.image)

    def _channel_weights(self, options: Options) -> Tensor | None:
        if options.vae is None:
            return None
        size = self.folders[0].validation.video.shape[-1] * WanVAE.spatial_factor
        return channel_weights(load_vae(options.vae, options.device), size)

    def weights(self) -> dict[str, dict[str, Any]]:
        return {"transformer.pt": self.average.state_dict()}

    def state(self) -> dict[str, Any]:
        return super().state() | {"average": self.average.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.average.load_state_dict(state["average"])

    def learn(self) -> dict[str, Tensor | float]:
        if self.step % _LOOK_EVERY == 0:
            for folder in self.folders:
                folder.take_up()
        self.following.fill_(1 - min(EMA, 1 - 1 / (self.step / 4 + 1)))  # closely at first
        loss = self.learn_from(*self.draw())
        return {"loss": loss, "clips": sum(len(folder.training) for folder in self.folders)}

    def draw(self) -> tuple[Tensor, ...]:
        """This process's clips of the step, their noise levels and their noise."""
        noise = self.generator()
        clips = self._clips(noise)
        count, on, mine = (len(clips),), noise.device, replicas.own()
        t = flow.apply_shift(torch.sigmoid(torch.randn(count, generator=noise, device=on)), SHIFT)
        silent = torch.rand(count, generator=noise, device=on) < TEXT_DROPOUT
        clips.text = torch.where(silent[:, None, None], self.silence, clips.text)
        eps = torch.randn(clips.video.shape, generator=noise, device=on)
        return *vars(clips.take(mine)).values(), t[mine], eps[mine]

    def loss(self, *batch: Tensor) -> Tensor:
        """Of what `draw` gives."""
        *parts, t, noise = batch
        return flow.loss(*self._velocities(self.model, LatentPool(*parts), t, noise), self.channel_weights)

    def _learn_from(self, *batch: Tensor) -> Tensor:
        loss = self.loss(*batch)
        self.update(loss)
        return loss.detach()

    def _clips(self, noise: torch.Generator) -> LatentPool:
        """The step's batch for all processes, whole clips or windows, of one size."""
        choices = np.random.default_rng([self.options.seed, self.step])  # on the host: a GPU's would have to be waited for
        small = choices.random() < self.windows
        pools = [folder.training for folder in self.folders]
        pool = pools[choices.integers(len(pools))]
        full = 4 * self.batch if small else self.batch
        count = replicas.shareable(max(1, round(full * pools[0].area / pool.area)))
        clips = pool.take(torch.randint(len(pool), (count,), generator=noise, device=noise.device))
        return clips.windows(noise) if small else clips

    def _velocities(self, model: nn.Module, clips: LatentPool, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and true."""
        with torch.autocast(t.device.type, dtype=torch.bfloat16):
            predicted = self.predict(model, flow.add_noise(clips.video, noise, t), t, clips)
        return predicted, flow.velocity(clips.video, noise)

    @torch.no_grad()
    def after_update(self) -> None:
        average = list(self.average.parameters())
        ahead = torch._foreach_sub(list(self.model.parameters()), average)
        torch._foreach_mul_(ahead, self.following)
        torch._foreach_add_(average, ahead)

    def evaluate(self, final: bool) -> dict[str, float]:
        """Losses on each folder's clips that are never trained on; from the second on their names end in its number."""
        found: dict[str, float] = {}
        for number, folder in enumerate(self.folders, 1):
            suffix = f"_{number}" if number > 1 else ""
            found |= {f"{name}{suffix}": value for name, value in self._losses(folder.validation).items()}
        return found

    @torch.no_grad()
    def _losses(self, held_out: LatentPool) -> dict[str, float]:
        """Loss of the averaged weights at fixed noise levels and noise.

        `validation` weighs all channels alike, so that runs can be compared; `weighted` as in training.
        """
        generator = torch.Generator().manual_seed(5)
        clips = held_out.take(slice(None))
        t = flow.apply_shift(torch.linspace(0.02, 0.98, len(clips)), SHIFT).to(clips.video)
        noise = torch.randn(clips.video.shape, generator=generator).to(clips.video)
        pair = self._velocities(self.average, clips, t, noise)
        found = {"validation": flow.loss(*pair)}
        if self.channel_weights is not None:
            found["weighted"] = flow.loss(*pair, self.channel_weights)
        return {name: round(value.item(), 4) for name, value in found.items()}


def main() -> None:
    parser = loop.parser(__doc__, loop.Options(Path(), steps=12000, lr=2e-3))
    parser.add_argument("--latents", type=loop.existing, nargs="+", required=True,
                        help="folders of encoded clips, each of one size; steps draw from one of them")
    parser.add_argument("--batch", type=int, default=Options.batch)
    parser.add_argument("--start", type=loop.existing, help="weights to begin from (pretraining.export --unpack)")
    parser.add_argument("--vae", type=loop.existing, help="weigh latent channels by their part in this VAE's pictures")
    parser.add_argument("--windows", type=float, default=Options.windows,
                        help="share of the steps on windows of half the size, four times as many a step")
    parser.add_argument("--graphs", action="store_true", help="on one GPU, replay steps as CUDA graphs")
    options = Options(**vars(parser.parse_args()))
    with loop.started(options.device, options.threads):
        loop.run(TransformerTraining(options))


if __name__ == "__main__":
    sys.exit(loop.guarded(main))
