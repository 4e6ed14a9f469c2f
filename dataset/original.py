"""A job's media at the source's own size, read again for a result of that size: training works without them.

Axes: F frames of the used clip, H W pixels of the source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from dataset import images
from dataset.job import EditJob, grey_levels, read_masks
from dataset.video import hash_media, read_media


@dataclass(frozen=True, eq=False)
class Original:
    """What a job's working size was made from."""

    frames: np.ndarray
    """uint8 (F, H, W, 3): the source, the caller's own to write into."""
    grey_mask: np.ndarray
    """uint8 (F, H, W), white = edit; black outside the part of the picture that is used."""
    first_edit: np.ndarray
    """uint8 (H, W, 3): the edited frame 0; one that was given at the working size, scaled up over the source's frame 0."""
    first_edit_is_enlarged: bool


def read_original(job: EditJob) -> Original:
    """Read the media of a job that has an edited frame 0.

    Raises:
        UserError: a file has changed since the job was read.
    """
    assert job.first_edit is not None, "without one there is no result"
    edited = job.first_edit.path
    for key, path in (("source", job.source), ("mask", job.mask), ("edited_frame.0", edited)):
        if hash_media(path) != job.hashes[key]:
            raise UserError(f"{path}: has changed since the job was read, expected the same file. "
                            "Bring it back, or run inference.py again.")
    # The mask first: its colour channels are gone before the source takes its memory.
    mask = _mask(job)
    frames = read_media(job.source, job.start, len(job.frames), every=job.every).frames
    picture = images.read_image(edited)
    enlarged = picture.shape != frames.shape[1:]
    if enlarged:
        small, picture = picture, frames[0].copy()
        job.fit.cut(picture)[:] = job.fit.enlarged(small)
    return Original(frames, mask, picture, enlarged)


def _mask(job: EditJob) -> np.ndarray:
    count = len(job.frames)
    still = job.mask.suffix.lower() in images.SUFFIXES
    pictures = images.read_mask(job.mask)[None] if still else read_masks(job.mask, job.start, job.every, count).frames
    grey = grey_levels(job.mask, pictures)
    used = np.zeros((count, *grey.shape[1:]), np.uint8)
    for frame, levels in zip(used, np.broadcast_to(grey, used.shape), strict=True):
        job.fit.cut(frame)[:] = job.fit.cut(levels)
    return used
