"""Inference: the trained LoRA regenerates the masked region of the whole video from the edited first frame."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.files import hash_file
from dataset.cache import LatentCache
from dataset.job import FIELDS_BEFORE, EditJob
from loraedit_ext import lora, masks, regimes
from loraedit_ext.config import EditSettings, RunConfig
from loraedit_ext.editing import guidance, pieces
from loraedit_ext.editing.compositing import finished
from loraedit_ext.editing.experts import Expert, Transformers
from loraedit_ext.editing.sampling import computed_steps, sample_latents
from loraedit_ext.encode import encode_all
from loraedit_ext.forecast import count_tokens
from loraedit_ext.pipeline import World
from models.attention_backend import attention_backend
from models.base import I2VModel


@dataclass(frozen=True)
class Edit:
    """What came out, and how."""

    frames: np.ndarray
    """uint8 (F, H, W, 3), composited if asked for."""
    generated: np.ndarray
    """uint8 (F, H, W, 3), as the model made them."""
    facts: dict[str, Any]


class Editor:
    """A model with a LoRA, ready to edit jobs.

    Args:
        config: model, adapter and [edit] settings.
        model: the masked model.
        adapter: the LoRA, or None for the bare model.
        world: where the transformer runs, and with whom: processes take the passes of guidance by turns, at most one each.
        cache: of what the frozen encoders say, so that another seed or guidance does not load them again.
        stacked: LoRAs on top of it, each with its strength.
        other: the expert of Wan2.2 that `model` is not; the two take turns on the device.
    """

    def __init__(
        self, config: RunConfig, model: I2VModel, adapter: lora.LoraFile | None, world: World, cache: LatentCache,
        stacked: Sequence[tuple[lora.LoraFile, float]] = (), other: Expert | None = None,
    ) -> None:
        self.config, self.model, self.adapter, self.world, self.cache = config, model, adapter, world, cache
        own = Expert(model, [*([(adapter, config.edit.lora_strength)] if adapter else []), *stacked])
        self.experts = [own] if other is None else [own, other] if config.model.expert == "high" else [other, own]
        self.transformers = Transformers(config, self.experts, world)

    def edit(self, job: EditJob, seed: int | None = None, again: bool = False) -> Edit:
        """Encode, sample, decode, composite.

        Args:
            seed: of the noise; default: `edit.seed`.
            again: there will be another edit: the transformer waits for it if it can.
        """
        started, settings = time.perf_counter(), self.config.edit
        if seed is not None:
            settings = settings.model_copy(update={"seed": seed})
        planned = pieces.plan(job, settings.clip_frames, self.model.geometry.temporal_stride)

        def generate(piece: regimes.Piece, number: str) -> np.ndarray:
            title = "editing" if len(planned) == 1 else f"editing piece {number}"
            return self._generate(job, piece, settings, title, again or piece.span != planned[-1])

        generated = pieces.edit_all(job, planned, generate, settings.color_match if settings.composite else 0)
        if not again:
            self.transformers.free()
            self.model.free_encoders()
        frames = finished(job, generated, settings)
        facts = {
            "seconds": round(time.perf_counter() - started, 2),
            "tokens": count_tokens(self.model.geometry, (max(map(len, planned)), *job.frames.shape[1:3])),
            "computed_steps": sum(computed_steps(settings)),
            "pieces": [[span.start, span.stop] for span in planned],
            "loras": [_lora_facts(expert, each, strength) for expert in self.experts for each, strength in expert.stack],
        }
        return Edit(frames, generated, facts)

    def _generate(
        self, job: EditJob, piece: regimes.Piece, settings: EditSettings, title: str, again: bool
    ) -> np.ndarray:
        """The frames of a piece, uint8 (F, H, W, 3); the device holds the encoders or the transformer, never both.

        Args:
            again: another piece or edit follows.
        """
        told = self.told(job, piece)
        shape = self.model.geometry.latent_shape(len(piece.span), *job.frames.shape[1:3])
        forward = self.transformers.begin(again)
        with attention_backend(self.config.attention_backend):
            latents = sample_latents(self.model, forward, told, shape, settings, self.world, title)
        self.transformers.end()
        generated = regimes.to_pixels(self.model.decode_video(latents)) if self.world.is_main else None
        return self.world.broadcast(generated)

    def told(self, job: EditJob, piece: regimes.Piece | None = None) -> list[guidance.Told]:
        """What the passes of an edit are told, encoded or from the cache; of a piece, by default of the whole clip."""
        rule = self.config.mask_rule
        passes = guidance.passes(job, self.config.edit, rule, piece=piece)
        samples = [each.sample for each in passes]
        return guidance.told(passes, encode_all(self.model, samples, self.cache, rule, self.world))


def _lora_facts(expert: Expert, each: lora.LoraFile, strength: float) -> dict[str, Any]:
    name = expert.model.describe().get("expert")
    facts = {"path": str(each.path), "sha256": hash_file(each.path), "strength": strength}
    return facts | ({"expert": name} if name else {})


def check_lora(adapter: lora.LoraFile, model: I2VModel, job: EditJob, rule: masks.MaskRule) -> list[str]:
    """Refuse a LoRA of another model; tell what does not fit the job.

    Returns:
        One line for each thing that differs from the training and may be meant.
    """
    lora.check_model(adapter, model)
    facts = adapter.metadata
    if not facts:
        return [f"{adapter.path}: no LoRA-Edit metadata; taken as it is."]
    notes = []
    trained, now = FIELDS_BEFORE | facts.get("job", {}), job.fields()
    if facts.get("trigger") != job.trigger:
        notes.append(f"trigger: LoRA `{facts.get('trigger')}`, job `{job.trigger}`")
    if facts.get("mask_rule") != rule:
        notes.append(f"mask_rule: LoRA `{facts.get('mask_rule')}`, run `{rule}`")
    for key in ("size", "crop", "frames", "start", "every"):
        if trained.get(key) != now[key]:
            notes.append(f"{key}: LoRA {trained.get(key)}, job {now[key]}")
    for key in ("source", "mask"):
        if trained.get("hashes", {}).get(key) != now["hashes"][key]:
            notes.append(f"{key}: not the file that the LoRA was trained on ({now[key]})")
    return [f"{adapter.path}: {note}" for note in notes]
