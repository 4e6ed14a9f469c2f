"""From noise to the latents of an edit: what inference and the previews of a training run share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import cv2
import numpy as np
import torch
from torch import Tensor

from common.progress import progress, stepping
from dataset.job import EditJob
from dataset.original import at_source_size
from dataset.resize import Size
from loraedit_ext import flow, guidance, masks, regimes
from loraedit_ext.config import EditSettings
from models.base import I2VModel

Forward = Callable[[tuple[Tensor, ...], int], Tensor]
"""The transformer: batched inputs of its first layer, and the number of the pass, to the velocity (1, C, T, h, w)."""


@torch.no_grad()
def sample_latents(
    model: I2VModel, forward: Forward, passes: Sequence[guidance.Told], shape: tuple[int, ...],
    settings: EditSettings, device: torch.device, title: str,
) -> Tensor:
    """Sample an edit with a generator of its own, so that no other random state moves.

    Args:
        forward: the transformer, in evaluation mode.
        passes: what each is told, the edit first (`loraedit_ext.guidance`).
        shape: (C, T, h, w).
        title: of the progress bar.

    Returns:
        Normalised latents (C, T, h, w), fp32 on the CPU.
    """
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(settings.seed)).to(device)
    batched = [{name: tensor[None].to(device) for name, tensor in condition.items()} for condition, _ in passes]
    weights = [weight.to(device) if isinstance(weight, Tensor) else weight for _, weight in passes]
    embedded = settings.embedded_guidance or 1.0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        velocities = [
            forward(model.model_inputs(x, t.to(x.device).expand(len(x)), condition, embedded), number)
            for number, condition in enumerate(batched)
        ]
        return guidance.combined(velocities, weights)

    sigmas = flow.inference_sigmas(settings.steps, settings.shift, settings.sampler)
    start = model.start_latents(noise, batched[0])
    with progress(settings.steps, title, unit="step", leave=False) as bar:
        x = flow.sample(predict, start, sigmas, settings.sampler, on_step=lambda _i, _x: bar.update() and None)
    return model.final_latents(x, batched[0])[0].cpu()


def finished(job: EditJob, generated: np.ndarray, settings: EditSettings) -> np.ndarray:
    """The frames of an edit as [edit] wants them, from the generated ones: composited, or as they are."""
    if not settings.composite:
        return generated
    preserve = masks.with_first_frame(regimes.preserve_mask(job)).numpy()
    return composite(regimes.with_first_edit(job), generated, preserve, settings.feather)


def result_size(job: EditJob, settings: EditSettings) -> Size:
    """(width, height) of the result: without compositing nothing of the source is in it, and it stays as the model made it."""
    return job.original_size if settings.size == "source" and settings.composite else job.size


def is_laid_back(job: EditJob, settings: EditSettings) -> bool:
    """Whether the result is the source's own frames with what was generated laid over them, cut or scaled as it was."""
    return settings.size == "source" and settings.composite and not job.fit.whole


def finished_at_source_size(job: EditJob, generated: np.ndarray, settings: EditSettings) -> np.ndarray:
    """The edit at the source's own size: the generated region scaled up, over the source's own frames.

    Args:
        generated: uint8 (F, h, w, 3) at the working size, before compositing.

    Returns:
        uint8 (F, H, W, 3). Frame 0 is the edited picture where that was given at this size.

    Raises:
        UserError: the job's files have changed since it was read.
    """
    whole = at_source_size(job)
    preserve = regimes.preserve_mask(whole).numpy()
    preserve[0] &= whole.first_edit.enlarged  # a picture of this size is taken as it was given
    first = regimes.first_picture(whole)
    for index, frame in enumerate(stepping(whole.frames, "compositing")):
        made = job.fit.laid_over(frame, generated[index]) if index else first
        frame[:] = blended(frame, made, preserve[index], settings.feather)
    return whole.frames


def composite(kept: np.ndarray, generated: np.ndarray, preserve: np.ndarray, feather: int) -> np.ndarray:
    """Put preserved pixels back exactly, with a soft seam inside the edited region.

    Args:
        kept: uint8 (F, H, W, 3): the source, frame 0 edited.
        generated: uint8 (F, H, W, 3).
        preserve: bool (F, H, W).
        feather: width in pixels of the seam; at this distance from a preserved pixel only the generated one counts.
    """
    out = np.empty_like(generated)
    for index, mask in enumerate(stepping(preserve, "compositing")):
        out[index] = blended(kept[index], generated[index], mask, feather)
    return out


def blended(kept: np.ndarray, generated: np.ndarray, preserve: np.ndarray, feather: int) -> np.ndarray:
    """One frame of `composite`: uint8 (H, W, 3)."""
    weight = seam_weight(preserve, feather)[..., None]
    mixed = kept * (1 - weight) + generated * weight
    return np.where(preserve[..., None], kept, np.rint(mixed).astype(np.uint8))


def seam_weight(preserve: np.ndarray, feather: int) -> np.ndarray:
    """Weight of the generated pixel, float32 (H, W): 0 where preserved, rising to 1 over `feather` pixels."""
    generate = (~preserve).astype(np.uint8)
    if feather == 0 or not preserve.any():
        return generate.astype(np.float32)
    distance = cv2.distanceTransform(generate, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(distance / feather, 0, 1, dtype=np.float32)
