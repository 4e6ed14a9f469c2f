"""Wan2.1-I2V whose conditioning accepts a spatially varying mask: nothing but that."""

from __future__ import annotations

import torch
from torch import Tensor

from loraedit_ext import masks
from models.wan.checkpoint import WanCheckpoint
from models.wan.wrapper import WanI2V


class MaskedWan(WanI2V):
    """Wan told of the whole mask through its four mask channels (paper section 3.2).

    With the first-frame mask it equals its base bit for bit.
    """

    def __init__(
        self, checkpoint: WanCheckpoint, device: torch.device, rule: masks.MaskRule = "all", *,
        vae_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(checkpoint, device, vae_dtype=vae_dtype)
        self.rule = rule

    def known_region(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return masks.grey_fill(video, mask), masks.wan_channels(mask, self.rule)
