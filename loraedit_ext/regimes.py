"""The paper on one page: how each regime builds its (condition, mask, target) triples from an edit job.

| regime             | condition video                            | mask (1 = preserve)                  | target      |
|--------------------|--------------------------------------------|--------------------------------------|-------------|
| naive (3.1)        | frame 0, then grey                         | frame 0                              | source      |
| motion (3.3.1)     | source, edit region grey, frame 0 whole    | frame 0, and outside the region      | source      |
| appearance (3.3.2) | one source frame, edit region grey         | outside the region                   | edited frame|
| edit (inference)   | as motion, frame 0 := edited frame 0       | as motion                            | -           |
| unedited (guidance)| as motion                                  | as motion                            | -           |

For the paper's ablations (figure 2) the edit can be told less or more than that, see `EditCondition`. A long clip is edited
piece by piece (`loraedit_ext.editing.pieces`); each piece but the first begins with what the one before it made.

Axes: F pixel frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from common.errors import UserError
from dataset.job import EditedFrame, EditJob
from dataset.triple import Triple
from loraedit_ext import difference, masks

Regime = Literal["naive", "motion", "appearance"]
REGIMES: tuple[Regime, ...] = get_args(Regime)
EditCondition = Literal["motion", "first_frame", "all", "none"]
"""What the model is told when it edits: `motion` is the method (figure 2, case 3); `first_frame` the released models'
own condition (case default), which the naive regime trains with; `all` the whole video (case 2); `none` nothing (case 1).
"""


def to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 (F, H, W, 3) -> float32 (3, F, H, W) in [-1, 1]."""
    return rearrange(torch.tensor(pixels), "f h w c -> c f h w").float() / 127.5 - 1


def to_pixels(video: Tensor) -> np.ndarray:
    """float (3, F, H, W) in [-1, 1] -> uint8 (F, H, W, 3), rounded."""
    return rearrange((video + 1) * 127.5, "c f h w -> f h w c").round().clamp(0, 255).to(torch.uint8).numpy()


def preserve_mask(job: EditJob, whole: bool = True) -> Tensor:
    """The job's mask, bool (F, H, W): True outside the region to edit, in frame 0 too.

    Args:
        whole: whether the region may be the whole of all frames, where nothing is then told to be preserved.
    """
    return masks.from_grey(torch.tensor(job.grey_mask), str(job.mask), whole)


def prompt(job: EditJob, caption: str) -> str:
    """The fixed special token p*, then the caption."""
    return f"{job.trigger} {caption}".strip()


def first_picture(job: EditJob) -> np.ndarray:
    """What counts of the edited first frame, uint8 (H, W, 3).

    Raises:
        UserError: the job has no edited first frame.
    """
    first = job.first_edit
    if first is None:
        raise UserError(
            f"job {job.name}: no edited first frame, and without one there is nothing to propagate. "
            "Add [[edited_frame]] with frame = 0 and image = \"...\"."
        )
    return edited_picture(job, first)


def with_first_edit(job: EditJob) -> np.ndarray:
    """The source with the edited first frame in place of frame 0, uint8 (F, H, W, 3).

    Raises:
        UserError: the job has no edited first frame.
    """
    return np.concatenate([first_picture(job)[None], job.frames[1:]])


def edited_picture(job: EditJob, edited: EditedFrame) -> np.ndarray:
    """What counts of an edited picture, uint8 (H, W, 3): with `keep_outside` the source's pixels outside the frame's mask."""
    if not job.keep_outside:
        return edited.image
    return within(edited.image, job.frames[edited.index], preserve_mask(job)[edited.index].numpy())


def within(picture: np.ndarray, source: np.ndarray, preserve: np.ndarray) -> np.ndarray:
    """An edited picture (H, W, 3) with the source's pixels wherever `preserve` (H, W) is True."""
    return np.where(preserve[..., None], source, picture)


def left_out(job: EditJob) -> list[str]:
    """One line for each edited picture of whose changes `keep_outside` leaves out more than a little, or that has none.

    Raises:
        UserError: a picture changes something, but nothing of that is in its frame's mask, so that all would be left out.
    """
    return [line for edited in job.edited_frames if job.keep_outside and (line := _left_out(job, edited))]


def _left_out(job: EditJob, edited: EditedFrame) -> str | None:
    preserve = preserve_mask(job)[edited.index].numpy()
    change = difference.left_out(job.frames[edited.index], edited.image, preserve)
    name = f"{job.name}: edited frame {edited.index}"
    if change.share == 1:
        raise UserError(
            f"{edited.path}: changes {change.touched.mean():.0%} of frame {edited.index}, but {job.mask} marks nothing "
            f"{'in that frame' if preserve.all() else 'of that'}, so nothing of the picture would be used. Paint the region "
            "white in that frame too (white = edit, black = keep); if nothing is to change there, give the source's own frame; "
            f"or set keep_outside = false in job {job.name} to take it whole."
        )
    if preserve.all():  # it may differ by less than counts as a change
        return f"{name}: nothing of {edited.path.name} is used, as the mask marks nothing in that frame."
    if not change.touched.any():
        return f"{name}: {edited.path.name} shows hardly any change of the source's frame; is it the edit of that frame?"
    if change.share <= difference.LITTLE:
        return None
    return (f"{name}: {change.share:.0%} of what {edited.path.name} changes lies outside the mask and is left out; "
            "keep_outside = false takes the picture whole.")  # fmt: skip


def naive(job: EditJob) -> list[Triple]:
    """Plain first-frame LoRA, the paper's ablation (3.1)."""
    height, width = job.frames.shape[1:3]
    return [
        _over_source(job, "naive", clip, masks.first_frame_only(len(clip), height, width)) for clip in job.clips
    ]


def motion(job: EditJob) -> list[Triple]:
    """Disentangle edit and background (3.3.1): regenerate the region, given the background."""
    preserve = preserve_mask(job, whole=False)
    return [
        _over_source(job, "motion", clip, masks.with_first_frame(preserve[clip.start : clip.stop]))
        for clip in job.clips
    ]


def appearance(job: EditJob) -> list[Triple]:
    """How the edit looks later on (3.3.2): one single-frame sample per edited frame behind the first."""
    preserve = preserve_mask(job, whole=False)
    return [_of_edited_frame(job, edited, preserve) for edited in job.edited_frames if edited.index > 0]


@dataclass(frozen=True, eq=False)
class Piece:
    """What of a clip is edited at once."""

    span: range
    """Its frames."""
    first: np.ndarray
    """uint8 (H, W, 3): the picture that it begins with."""


def whole_clip(job: EditJob) -> Piece:
    """All frames, from the edited first one on.

    Raises:
        UserError: the job has no edited first frame.
    """
    return Piece(range(len(job.frames)), first_picture(job))


def continuing(job: EditJob, span: range, made: np.ndarray) -> Piece:
    """A piece that begins with the edited picture of its first frame if there is one, else with what was made of it.

    Args:
        made: uint8 (H, W, 3), what the piece before generated there; with `keep_outside` its region alone counts.
    """
    index = span.start
    given = next((frame for frame in job.edited_frames if frame.index == index), None)
    if given is not None:
        return Piece(span, edited_picture(job, given))
    return Piece(span, within(made, job.frames[index], preserve_mask(job)[index].numpy()) if job.keep_outside else made)


def edit(job: EditJob, condition: EditCondition = "motion", piece: Piece | None = None) -> Triple:
    """Inference: as motion over the whole video, or a piece of it, with the edited first frame in place of frame 0."""
    piece = piece or whole_clip(job)
    return _to_generate(job, "edit", piece, condition)


def unedited(job: EditJob, condition: EditCondition = "motion", piece: Piece | None = None) -> Triple:
    """As the edit, prompt included, but for frame 0, which is the source's own: what source guidance leads away from."""
    span = piece.span if piece else range(len(job.frames))
    return _to_generate(job, "unedited", Piece(span, job.frames[span.start]), condition)


def _to_generate(job: EditJob, name: str, piece: Piece, condition: EditCondition) -> Triple:
    start, stop = piece.span.start, piece.span.stop
    preserve = _told(preserve_mask(job, whole=condition != "motion")[start:stop], condition)
    video = to_unit(np.concatenate([piece.first[None], job.frames[start + 1 : stop]]))
    return Triple(
        name=name,
        condition=masks.grey_fill(video, preserve),
        mask=preserve,
        target=None,
        reference=video[:, 0],
        prompt=prompt(job, job.first_edit.caption),
    )


def _told(preserve: Tensor, condition: EditCondition) -> Tensor:
    """The job's mask as the edit's condition has it, bool (F, H, W)."""
    if condition == "motion":
        return masks.with_first_frame(preserve)
    if condition == "first_frame":
        return masks.first_frame_only(*preserve.shape)
    return torch.full_like(preserve, condition == "all")


BUILDERS: dict[Regime, Callable[[EditJob], list[Triple]]] = {
    "naive": naive, "motion": motion, "appearance": appearance,
}  # fmt: skip


def _over_source(job: EditJob, regime: str, clip: range, preserve: Tensor) -> Triple:
    """A triple whose target is the source itself, over the frames of one training clip."""
    video = to_unit(job.frames[clip.start : clip.stop])
    return Triple(
        name=regime if len(job.clips) == 1 else f"{regime}@{clip.start}-{clip.stop - 1}",
        condition=masks.grey_fill(video, preserve),
        mask=preserve,
        target=video,
        reference=video[:, 0],
        prompt=prompt(job, job.caption),
    )


def _of_edited_frame(job: EditJob, edited: EditedFrame, preserve: Tensor) -> Triple:
    source = to_unit(job.frames[edited.index : edited.index + 1])
    mask = preserve[edited.index : edited.index + 1]
    return Triple(
        name=f"appearance@{edited.index}",
        condition=masks.grey_fill(source, mask),
        mask=mask,
        target=to_unit(edited_picture(job, edited)[None]),
        reference=source[:, 0],
        prompt=prompt(job, edited.caption),
    )
