"""From noise to the latents of an edit: what inference and the previews of a training run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from common.progress import progress
from loraedit_ext import flow
from loraedit_ext.config import EditSettings
from loraedit_ext.editing import guidance, skipping
from loraedit_ext.pipeline import World
from models.base import I2VModel

Forward = Callable[[tuple[Tensor, ...], int], Tensor]
"""The transformer: batched inputs of its first layer, and the number of the pass, to the velocity (1, C, T, h, w)."""


def sample_latents(
    model: I2VModel, forward: Forward, passes: Sequence[guidance.Told], shape: tuple[int, ...],
    settings: EditSettings, world: World, title: str,
) -> Tensor:
    """Sample an edit with a generator of its own, so that no other random state moves.

    Args:
        forward: the transformer, in evaluation mode.
        passes: what each is told, the edit first (`loraedit_ext.editing.guidance`).
        shape: (C, T, h, w).
        world: processes that take the passes by turns; all of them sample the same latents.
        title: of the progress bar.

    Returns:
        Normalised latents (C, T, h, w), fp32 on the CPU.
    """
    predict = skipping.Skipping(velocity(model, forward, passes, settings, world), computed_steps(settings))
    return follow(model, predict, passes[0][0], shape, settings, world, title)


@torch.no_grad()
def follow(
    model: I2VModel, predict: skipping.Predict, condition: Mapping[str, Tensor], shape: tuple[int, ...],
    settings: EditSettings, world: World, title: str,
) -> Tensor:
    """From noise to latents along a velocity; arguments and result as in `sample_latents`.

    Args:
        predict: (x, t) -> velocity.
        condition: what the edit is told, without batch axis.
    """
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(settings.seed)).to(world.device)
    edit = _batched(condition, world.device)
    sigmas = flow.inference_sigmas(settings.steps, settings.shift, settings.sampler)
    start = model.start_latents(noise, edit)
    with progress(settings.steps, title, unit="step", leave=False, disable=not world.is_main) as bar:
        x = flow.sample(predict, start, sigmas, settings.sampler, on_step=lambda _i, _x: bar.update() and None)
    return model.final_latents(x, edit)[0].cpu()


def velocity(
    model: I2VModel, forward: Forward, passes: Sequence[guidance.Told], settings: EditSettings, world: World
) -> skipping.Predict:
    """(x, t) -> velocity (1, C, T, h, w), of all passes together; each process computes its own and learns the others'."""
    batched = [_batched(condition, world.device) for condition, _ in passes]
    weights = [weight.to(world.device) if isinstance(weight, Tensor) else weight for _, weight in passes]
    embedded = settings.embedded_guidance or 1.0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        own = {
            number: forward(model.model_inputs(x, t.to(x.device).expand(len(x)), condition, embedded), number)
            for number, condition in enumerate(batched) if world.owns(number)
        }  # fmt: skip
        velocities = [world.share(own.get(number, torch.empty_like(x)), number) for number in range(len(batched))]
        return guidance.combined(velocities, weights)

    return predict


def _batched(condition: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor[None].to(device) for name, tensor in condition.items()}


def computed_steps(settings: EditSettings) -> tuple[bool, ...]:
    """Which of the sampling steps ask the model."""
    sigmas = flow.inference_sigmas(settings.steps, settings.shift, settings.sampler)[:-1].tolist()
    return skipping.computed(sigmas, settings.compute_every, settings.boundary)
