"""Guidance: which passes one sampling step of an edit takes, and how their velocities are put together.

    v = v_edit + (guidance - 1) (v_edit - v_negative) + (source_guidance - 1) (v_edit - v_source), the last where generated

The first difference is classifier-free guidance (Ho and Salimans 2022). The second is its counterpart for a LoRA of one
video. The motion regime has seen no picture but the source, so part of the source's look is burnt into the LoRA and shows
through the edit. `v_source` is the same model told the same except for the first frame, which is the source's own: where the
two velocities differ is what the edited frame is heeded for, and a weight above 1 restores what the LoRA has weakened. What it
gains: docs/experiments.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dataset.job import EditJob
from dataset.triple import EncodedTriple, Triple
from loraedit_ext import masks, regimes
from loraedit_ext.config import EditSettings
from loraedit_ext.encode import Unconditional

Weight = Tensor | float
"""Of the edit's velocity less a pass's: a number, or one for each latent (1, T, h, w). Of the edit itself: 0."""
Told = tuple[dict[str, Tensor], Weight]
"""A pass when it is encoded: conditioning without batch axis, and weight."""


@dataclass(frozen=True)
class Pass:
    """One of the passes of a sampling step."""

    sample: Triple | Unconditional
    weight: Weight


def passes(
    job: EditJob, settings: EditSettings, rule: masks.MaskRule, name: str = "edit", piece: regimes.Piece | None = None
) -> list[Pass]:
    """The edit, then what it is led away from.

    Args:
        settings: guidance that is 1 takes no pass.
        name: of the edit's sample; the others' names begin with it.
        piece: what of the clip is edited; default: all.

    Raises:
        UserError: the job has no edited first frame.
    """
    edit = replace(regimes.edit(job, settings.condition, piece), name=name)
    found = [Pass(edit, 0.0)]
    if settings.guidance != 1:
        negative = Unconditional(f"{name}-negative", edit.reference, settings.negative_prompt)
        found.append(Pass(negative, settings.guidance - 1))
    if settings.source_guidance != 1:
        source = replace(regimes.unedited(job, settings.condition, piece), name=f"{name}-source")
        generated = 1 - masks.latent_mask(edit.mask, rule)
        found.append(Pass(source, (settings.source_guidance - 1) * generated))
    return found


def count(settings: EditSettings) -> int:
    """How many `passes` a sampling step takes."""
    return 1 + (settings.guidance != 1) + (settings.source_guidance != 1)


def told(planned: Sequence[Pass], encoded: Mapping[str, EncodedTriple]) -> list[Told]:
    """What every pass is told, by the names of their samples; what a pass does not say is as in the edit."""
    edit = encoded[planned[0].sample.name].condition
    return [(edit | encoded[each.sample.name].condition, each.weight) for each in planned]


def combined(velocities: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """The velocity to follow, (B, C, T, h, w), of those of the passes and their weights, the edit first."""
    edit = velocities[0]
    return edit + sum(weight * (edit - other) for weight, other in zip(weights[1:], velocities[1:], strict=True))
