"""A job at its source's own size, its media read again for a result of that size: training works without them.

Axes: F frames of the used clip, H W pixels of the source.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.errors import UserError
from dataset import images
from dataset.job import EditedFrame, EditJob, grey_levels, read_masks
from dataset.resize import scaled
from dataset.video import hash_media, read_media


def at_source_size(job: EditJob) -> EditJob:
    """The same job with frames, mask and edited frame 0 as the source has them; other edited frames are left out.

    The frames, uint8 (F, H, W, 3), are the caller's own to write into. The mask, uint8 (F, H, W), is black outside the part
    of the picture that is used. An edited frame that was given at another size is scaled to the source's, over its frame.

    Raises:
        UserError: a file has changed since the job was read.
    """
    assert job.first_edit is not None, "without one there is no result"
    for key, path in (("source", job.source), ("mask", job.mask), ("edited_frame.0", job.first_edit.path)):
        if hash_media(path) != job.hashes[key]:
            raise UserError(f"{path}: has changed since the job was read, expected the same file. "
                            "Bring it back, or run inference.py again.")
    # The mask first: its colour channels are gone before the source takes its memory.
    mask = _mask(job)
    frames = read_media(job.source, job.start, len(job.frames), every=job.every).frames
    assert (job.fit.image(frames[-1]) == job.frames[-1]).all(), "the source is read as the job reads it"
    assert (job.fit.mask(mask) == job.grey_mask).all(), "the mask is read as the job reads it"
    return replace(job, frames=frames, grey_mask=mask, edited_frames=(_first_edit(job, frames[0]),),
                   crop=(0, 0, *job.original_size))


def _first_edit(job: EditJob, source: np.ndarray) -> EditedFrame:
    picture = images.read_image(job.first_edit.path)
    size = (picture.shape[1], picture.shape[0])
    part = picture if job.fit.is_worked_on(size) else job.fit.cut(scaled(picture, job.fit.source))
    return replace(job.first_edit, image=job.fit.laid_over(source, part), rescaled=size != job.fit.source)


def _mask(job: EditJob) -> np.ndarray:
    pictures, _ = read_masks(job.mask, job.start, job.every, len(job.frames))
    grey = grey_levels(job.mask, pictures)
    used = np.zeros((len(job.frames), *grey.shape[1:]), np.uint8)
    for frame, levels in zip(used, np.broadcast_to(grey, used.shape), strict=True):
        job.fit.cut(frame)[:] = job.fit.cut(levels)
    return used
