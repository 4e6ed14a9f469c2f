"""Sharpens a trained transformer: `python -m pretraining.sharpen --start BEST --worse WORSE --latents DIR --out DIR`.

A small model hedges: where it is unsure it predicts a mixture of futures, and objects melt. A worse model of the same
data hedges more in the same places, so that the way from its prediction to the better one's leads on to a clear picture
(autoguidance: Karras et al. 2024, arXiv 2406.02507). Here that guidance is distilled into the weights (Meng et al. 2023,
arXiv 2210.03142), as the released HunyuanVideo's is, because the project samples with one pass of one model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.wan.transformer import WanTransformer
from pretraining import loop, transformer
from pretraining.deepen import depth
from pretraining.latents import LatentPool
from pretraining.transformer import TransformerTraining, build, tiny_config


@dataclass(frozen=True)
class Options(transformer.Options):
    """A sharpening run; `start` is teacher and beginning at once.

    Attributes:
        worse: weights of a model with the same architecture that saw the same data, with fewer blocks or steps.
        guidance: 1 is the teacher itself, 2 as far beyond it as the worse one stays behind.
    """

    worse: Path = Path()
    guidance: float = 2.0


class Sharpening(TransformerTraining):
    """Regression on worse + guidance * (teacher - worse)."""

    def __init__(self, options: Options) -> None:
        if options.start is None:
            raise UserError("--start is missing: the weights to sharpen")
        self.guidance = options.guidance
        self.teacher, self.worse = (_frozen(path, options.device) for path in (options.start, options.worse))
        super().__init__(options)

    @torch.no_grad()
    def target(self, noisy: Tensor, t: Tensor, clips: LatentPool, velocity: Tensor) -> Tensor:
        better, worse = (self.predict(m, noisy, t, clips, self.compiled) for m in (self.teacher, self.worse))
        return torch.lerp(worse.float(), better.float(), self.guidance)


def _frozen(path: Path, device: str) -> nn.Module:
    state = torch.load(path, weights_only=True, map_location="cpu")
    model: WanTransformer = build(replace(tiny_config(), num_layers=depth(state)))
    model.load_state_dict(state)
    return model.to(device).requires_grad_(False)


def main() -> None:
    parser = transformer.parser(__doc__, loop.Options(Path(), steps=1500, lr=5e-4))
    parser.add_argument("--worse", type=Path, required=True, help="weights of a worse model of the same clips")
    parser.add_argument("--guidance", type=float, default=Options.guidance)
    options = Options(**vars(parser.parse_args()))
    loop.one_thread(options.device)
    loop.run(Sharpening(options))


if __name__ == "__main__":
    main()
