"""Masks: their one meaning, and how each model family is told of it. No other file decides any of this.

`preserve` is a bool tensor (F, H, W): True = preserve, False = generate. In files white = edit.
Axes: F pixel frames, H W pixels, T latent frames, h w latent cells of 8x8 pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor

from common.errors import UserError

MaskRule = Literal["all", "nearest"]
"""How a latent cell gets its value: `all` preserves it only if all its pixels are preserved (careful: nothing of
the edited region leaks into a preserved cell); `nearest` reads its top left pixel, as the released code does."""

THRESHOLD = 128
"""Grey levels from here on are white: edit."""
CELL = 8
FRAMES_PER_LATENT = 4
TOKEN = 2
"""Latent cells along each side of a token."""


def from_grey(grey: Tensor, where: str, whole: bool = False) -> Tensor:
    """Turn a grey mask video into a preserve mask.

    Args:
        grey: uint8 (F, H, W), white = edit.
        where: the file or folder, for messages.
        whole: whether everything may be edited in all frames.

    Raises:
        UserError: nothing, or everything without `whole`, is to be edited in all frames.
    """
    preserve = grey < THRESHOLD
    if preserve.all():
        raise UserError(
            f"{where}: the mask is all black (brightest value {int(grey.max())}), so nothing would be edited. "
            f"Paint the region to edit white (>= {THRESHOLD})."
        )
    if not whole and not preserve.any():
        raise UserError(
            f"{where}: the mask is all white (darkest value {int(grey.min())}), so nothing would be preserved. "
            f"Paint the background black (< {THRESHOLD}). For a whole-frame edit (style, light) nothing needs to be preserved: "
            'train the regime naive alone, [[stage]] mix = { naive = 1 }, and edit with edit.condition = "first_frame" and '
            "edit.composite = false, as there is nothing to put back."
        )
    return preserve


def first_frame_only(frames: int, height: int, width: int) -> Tensor:
    """The released models' mask: frame 0 is known, the rest is generated."""
    preserve = torch.zeros(frames, height, width, dtype=torch.bool)
    preserve[0] = True
    return preserve


def with_first_frame(preserve: Tensor) -> Tensor:
    """Frame 0 preserved whole: it is the edited frame at inference (paper 3.3.1)."""
    preserve = preserve.clone()
    preserve[0] = True
    return preserve


def grey_fill(video: Tensor, preserve: Tensor) -> Tensor:
    """Set every pixel that is not preserved to mid-grey, 0 in [-1, 1].

    Args:
        video: (3, F, H, W).
        preserve: bool (F, H, W).
    """
    _check_shape(preserve, video.shape[1:])
    return video * preserve


def latent_cells(preserve: Tensor, rule: MaskRule = "all") -> Tensor:
    """(F, H, W) pixels -> bool (F, h, w) latent cells."""
    if preserve.shape[1] % CELL or preserve.shape[2] % CELL:
        raise UserError(f"mask of {preserve.shape[2]}x{preserve.shape[1]} pixels is not a multiple of {CELL}")
    if rule == "nearest":
        return preserve[:, ::CELL, ::CELL]
    return reduce(preserve, "f (h a) (w b) -> f h w", torch.all, a=CELL, b=CELL)


def wan_channels(preserve: Tensor, rule: MaskRule = "all") -> Tensor:
    """Wan's four mask channels, float32 (4, T, h, w), 1 = preserve.

    Frame 0 counts four times, then each group of four frames gives the four channels of one latent frame
    (upstream `wan/image2video.py`): channel c of latent frame t > 0 is pixel frame 4(t-1)+1+c.
    """
    cells = latent_cells(preserve, rule)
    if (len(cells) - 1) % FRAMES_PER_LATENT:
        raise UserError(f"{len(cells)} mask frames: the model takes 4n+1")
    first = repeat(cells[:1], "1 h w -> four h w", four=FRAMES_PER_LATENT)
    return rearrange(torch.cat([first, cells[1:]]), "(t c) h w -> c t h w", c=FRAMES_PER_LATENT).float()


def latent_mask(preserve: Tensor, rule: MaskRule = "all") -> Tensor:
    """One value per latent, float32 (1, T, h, w): 1 only if all pixel frames of the latent frame preserve it.

    HunyuanVideo-I2V's mask channel (33 channel variant).
    """
    return wan_channels(preserve, rule).amin(dim=0, keepdim=True)


def token_mask(preserve: Tensor, rule: MaskRule = "all") -> Tensor:
    """As `latent_mask`, but the same for the 2x2 latents of a token: 1 only if all four preserve it.

    HunyuanVideo-I2V's token replacement, whose unit is the token (16x16 pixels, 4 frames).
    """
    cells = latent_mask(preserve, rule)
    if cells.shape[2] % TOKEN or cells.shape[3] % TOKEN:
        raise UserError(f"mask of {cells.shape[3]}x{cells.shape[2]} latent cells is not a multiple of {TOKEN}")
    tokens = reduce(cells, "one t (h a) (w b) -> one t h w", "min", a=TOKEN, b=TOKEN)
    return repeat(tokens, "one t h w -> one t (h a) (w b)", a=TOKEN, b=TOKEN)


def _check_shape(preserve: Tensor, expected: torch.Size) -> None:
    if preserve.shape != expected:
        raise UserError(
            f"mask of shape {tuple(preserve.shape)} (frames, height, width) does not fit the video's "
            f"{tuple(expected)}; masks are never stretched."
        )
