"""From generated frames to those of the result: source pixels put back exactly, colours and grain that meet them, a soft seam.

Axes: F frames, H W pixels.
"""

from __future__ import annotations

import cv2
import numpy as np

from common.progress import stepping
from dataset.images import channel_range
from dataset.job import EditJob
from dataset.original import at_source_size
from dataset.resize import Size
from loraedit_ext import masks, regimes
from loraedit_ext.config import EditSettings

DRIFT = 32.0
"""Grey levels by which a colour may have drifted; what differs by more is taken for another content and hardly counts."""

TILE, LEAST_TILES = 8, 16
"""Side in pixels of the tiles in which grain is looked for, and how many there must be."""
GRAIN_WIDTH = 1.0
"""Sigma in pixels of the blur that grain does not survive."""


def finished(job: EditJob, generated: np.ndarray, settings: EditSettings) -> np.ndarray:
    """The frames of an edit as [edit] wants them, from the generated ones: composited, or as they are."""
    if not settings.composite:
        return generated
    preserve = masks.with_first_frame(regimes.preserve_mask(job)).numpy()
    return composite(regimes.with_first_edit(job), generated, preserve, settings)


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
    preserve[0] &= whole.first_edit.rescaled  # a picture of this size is taken as it was given
    left, top, width, height = job.crop
    part = np.s_[top : top + height, left : left + width]  # beyond it nothing was made that the source could be compared with
    for index, frame in enumerate(stepping(whole.frames, "compositing")):
        if index == 0:
            made = regimes.first_picture(whole)
        else:
            made = job.fit.laid_over(frame, generated[index]).astype(np.float32)
            made[part] = matched(frame[part], made[part], preserve[index][part], settings, index)
        frame[:] = blended(frame, made, preserve[index], settings.feather)
    return whole.frames


def composite(kept: np.ndarray, generated: np.ndarray, preserve: np.ndarray, settings: EditSettings) -> np.ndarray:
    """Put preserved pixels back exactly, with colours and grain that meet them and a soft seam inside the edited region.

    Args:
        kept: uint8 (F, H, W, 3): the source, frame 0 edited.
        generated: uint8 (F, H, W, 3).
        preserve: bool (F, H, W).
    """
    out = np.empty_like(generated)
    for index, mask in enumerate(stepping(preserve, "compositing")):
        made = matched(kept[index], generated[index], mask, settings, index)
        out[index] = blended(kept[index], made, mask, settings.feather)
    return out


def matched(
    kept: np.ndarray, generated: np.ndarray, preserve: np.ndarray, settings: EditSettings, index: int
) -> np.ndarray:
    """A frame with colours and grain that meet the source's, float32 (H, W, 3); its number draws the grain."""
    made = color_matched(kept, generated, preserve, settings.color_match)
    if settings.grain:
        made = grained(kept, made, preserve, settings.grain, np.random.default_rng([settings.seed, index]))
    return made


def blended(kept: np.ndarray, generated: np.ndarray, preserve: np.ndarray, feather: int) -> np.ndarray:
    """The generated picture, (H, W, 3) of any type, inside the region, and uint8 `kept` outside.

    Args:
        feather: width in pixels of the seam; at this distance from a preserved pixel only the generated one counts.
    """
    out = kept.copy()
    if preserve.all():
        return out
    window = _around(~preserve, 1)  # in it each pixel of the region has its nearest preserved one
    weight = seam_weight(preserve[window], feather)[..., None]
    mixed = to_bytes(out[window] * (1 - weight) + generated[window] * weight)
    np.copyto(out[window], mixed, where=~preserve[window][..., None])
    return out


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """Grey levels within 0 to 255 rounded to uint8."""
    return np.rint(picture).astype(np.uint8)


def seam_weight(preserve: np.ndarray, feather: int) -> np.ndarray:
    """Weight of the generated pixel, float32 (H, W): 0 where preserved, rising to 1 over `feather` pixels."""
    if feather == 0 or not preserve.any():
        return (~preserve).astype(np.float32)
    return np.clip(_distance(~preserve) / feather, 0, 1, dtype=np.float32)


def color_matched(kept: np.ndarray, generated: np.ndarray, preserve: np.ndarray, reach: int) -> np.ndarray:
    """A generated frame whose colours meet the preserved ones at the border of the region.

    The model makes the preserved pixels too, so how far its colours are off is known beside the region. Local means of that,
    by a Gaussian of a quarter of the reach, are added inside and fade over the reach into what they have in common all around,
    which the whole region gets. Differences beyond `DRIFT` are another content (an object that the mask cuts off), and count
    the less the larger they are.

    Args:
        kept: uint8 (H, W, 3), the source.
        generated: (H, W, 3) in grey levels.
        preserve: bool (H, W).
        reach: in pixels; 0 changes nothing.

    Returns:
        float32 (H, W, 3) within 0 to 255; preserved pixels are as generated.
    """
    out = generated.astype(np.float32)
    if reach == 0 or preserve.all() or not preserve.any():
        return out
    window = _around(~preserve, 2 * reach)
    known = preserve[window].astype(np.float32)
    off = kept[window].astype(np.float32) - out[window]
    _, furthest = channel_range(np.abs(off))
    off *= (known / (1 + (furthest / DRIFT) ** 2))[..., None]
    share = _blurred(known, reach / 4)
    local = _blurred(off, reach / 4) / np.maximum(share, 1e-4)[..., None]
    overall = _common(local, known * (1 - share))
    nearness = np.clip(1 - _distance(~preserve[window]) / reach, 0, 1)[..., None]
    out[window] += (overall + nearness * (local - overall)) * (1 - known)[..., None]
    np.clip(out[window], 0, 255, out=out[window])
    return out


def _common(local: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What local differences (H, W, 3) have in common, (3,): their mean, shrunk by how far they are from agreeing on it."""
    total = max(float(weight.sum()), 1e-4)
    mean = np.tensordot(weight, local, 2) / total
    spread = np.tensordot(weight, (local - mean) ** 2, 2) / total
    return mean**3 / (mean**2 + spread + 1e-4)


def grained(
    kept: np.ndarray, generated: np.ndarray, preserve: np.ndarray, strength: float, random: np.random.Generator
) -> np.ndarray:
    """A generated frame with as much grain as the preserved pixels have: a VAE makes pictures smoother than a film is.

    Grain is the lower quartile of the standard deviations of a high-pass in tiles of the preserved part: flat tiles show it,
    others show their texture beside it. What is added is white noise of brightness, by the variance that is missing.

    Args:
        kept: uint8 (H, W, 3), the source.
        generated: (H, W, 3) in grey levels.
        preserve: bool (H, W).
        strength: 1 adds all that is missing.

    Returns:
        float32 (H, W, 3) within 0 to 255.
    """
    grey = (cv2.cvtColor(picture.astype(np.float32), cv2.COLOR_RGB2GRAY) for picture in (kept, generated))
    wanted, there = (_grain(picture, preserve) for picture in grey)
    if wanted <= there:
        return generated
    noise = random.standard_normal(preserve.shape, np.float32)
    missing = (wanted**2 - there**2) ** 0.5 / _grain(noise, np.ones_like(preserve))
    return np.clip(generated + strength * missing * noise[..., None], 0, 255)


def _grain(picture: np.ndarray, preserve: np.ndarray) -> float:
    """Of a picture of brightness, float32 (H, W); 0 where too little is preserved to tell."""
    high = picture - _blurred(picture, GRAIN_WIDTH)
    whole = _tiles(preserve).all((1, 3))
    return float(np.quantile(_tiles(high).std((1, 3))[whole], 0.25)) if whole.sum() >= LEAST_TILES else 0.0


def _tiles(picture: np.ndarray) -> np.ndarray:
    """(H, W) as (rows, TILE, columns, TILE), without what is left over."""
    height, width = (side // TILE for side in picture.shape)
    return picture[: height * TILE, : width * TILE].reshape(height, TILE, width, TILE)


def _around(region: np.ndarray, margin: int) -> tuple[slice, slice]:
    """The part of a picture that holds a region, wider by a margin: all that its border can depend on."""
    rows, columns = (np.flatnonzero(region.any(axis)) for axis in (1, 0))
    return tuple(slice(max(0, found[0] - margin), found[-1] + margin + 1) for found in (rows, columns))


def _blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(picture, (0, 0), sigma, borderType=cv2.BORDER_REFLECT)


def _distance(region: np.ndarray) -> np.ndarray:
    """Distance in pixels to the nearest pixel outside of the region, float32 (H, W)."""
    return cv2.distanceTransform(region.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
