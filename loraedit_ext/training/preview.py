"""Previews during training: the edit with the LoRA as it is, small and short, at a cost that the plan states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataset.job import EditedFrame, EditJob
from dataset.resize import Fit, Grid, fit
from dataset.triple import EncodedTriple, Triple
from dataset.video_writer import write_video
from loraedit_ext import forecast, regimes
from loraedit_ext.config import EditSettings, PreviewSettings, RunConfig
from loraedit_ext.editing.compositing import finished
from loraedit_ext.editing.guidance import Pass, passes, told
from loraedit_ext.editing.sampling import Forward, computed_steps, sample_latents
from loraedit_ext.encode import Unconditional
from loraedit_ext.pipeline import alone
from loraedit_ext.training.tracking import Clip
from models.base import Geometry, I2VModel

FOLDER = "previews"


@dataclass(frozen=True)
class Preview:
    """What is to be rendered, before it is encoded."""

    job: EditJob
    """The first frames of the run's job, scaled down."""
    settings: EditSettings
    """[edit] with the steps and guidance of [preview]."""
    passes: Sequence[Pass]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        frames, height, width = self.job.frames.shape[:3]
        return frames, height, width

    def samples(self) -> list[Triple | Unconditional]:
        """What the frozen encoders are needed for; all of it is encoded before the training begins."""
        return [each.sample for each in self.passes]


def plan_preview(config: RunConfig, job: EditJob, geometry: Geometry) -> Preview | None:
    """The preview of a run, or None where none is asked for.

    Raises:
        UserError: the job has no edited first frame.
    """
    if config.sample_every_n_steps is None:
        return None
    settings = config.edit.model_copy(update={"steps": config.preview.steps})
    if config.preview.guidance is not None:
        settings = settings.model_copy(update={"guidance": config.preview.guidance})
    small = shorten(job, config.preview, geometry)
    return Preview(small, settings, passes(small, settings, config.mask_rule, "preview"))


def shorten(job: EditJob, settings: PreviewSettings, geometry: Geometry) -> EditJob:
    """The first frames of a job, scaled down where they are larger than the preview may be."""
    grid = Grid(geometry.temporal_stride, geometry.size_step, settings.max_area)
    count = grid.frames_below(min(len(job.frames), settings.max_frames))
    width, height = job.size
    fitted = fit(job.size, job.size if width * height <= settings.max_area else grid.default_size(job.size))
    return replace(
        job, frames=fitted.frames(job.frames[:count]), grey_mask=fitted.mask(job.grey_mask[:count]),
        times=job.times[:count], clips=(range(count),), audio=None,
        edited_frames=tuple(_scaled(fitted, frame) for frame in job.edited_frames if frame.index < count),
    )  # fmt: skip


def _scaled(fitted: Fit, frame: EditedFrame) -> EditedFrame:
    return frame if fitted.size == fitted.source else replace(frame, image=fitted.image(frame.image))


def describe_preview(preview: Preview, config: RunConfig, job: EditJob, model: I2VModel) -> str:
    """What the previews will be and what each will cost; arithmetic, not measurement."""
    frames, height, width = preview.shape
    steps = sum(computed_steps(preview.settings))
    clip = max(len(clip) for clip in job.clips), *job.frames.shape[1:3]
    per_step = config.gradient_accumulation_steps * config.micro_batch_size_per_gpu
    share = steps * len(preview.passes) * forecast.forward(model, preview.shape)
    share /= per_step * forecast.training_sample(config, model, forecast.count_tokens(model.geometry, clip))
    return (
        f"previews  every {config.sample_every_n_steps} steps: {frames} frames of {width}x{height} "
        f"({forecast.count_tokens(model.geometry, preview.shape)} tokens), {steps} steps x {len(preview.passes)} pass(es); one "
        f"costs about {share:.2g} training steps, and the VAE's memory beside the transformer's; to {FOLDER}/stepN.mp4"
    )


class Previewer:
    """Renders the preview of a run.

    Args:
        preview: what to render.
        model: whose encoders are not loaded; its VAE is loaded for each preview and freed again.
        samples: the encoded `Preview.samples`, by name.
        device: where the sampler's state lives.
    """

    def __init__(
        self, preview: Preview, model: I2VModel, samples: Mapping[str, EncodedTriple], device: torch.device
    ) -> None:
        self.preview, self.model, self.device = preview, model, device
        self.told = told(preview.passes, samples)
        self.shape = model.geometry.latent_shape(*preview.shape)

    def sample(self, forward: Forward) -> Tensor:
        """Latents (C, T, h, w) of the edit; every process of a pipeline takes part."""
        return sample_latents(
            self.model, forward, self.told, self.shape, self.preview.settings, alone(self.device), "preview"
        )

    def write(self, latents: Tensor, path: Path) -> Clip:
        """Decode, composite if [edit] does, and write an mp4."""
        settings, job = self.preview.settings, self.preview.job
        try:
            frames = regimes.to_pixels(self.model.decode_video(latents))
        finally:
            self.model.free_encoders()
        frames = finished(job, frames, settings)
        write_video(path, frames, job.fps)
        return Clip(path, np.ascontiguousarray(frames))
