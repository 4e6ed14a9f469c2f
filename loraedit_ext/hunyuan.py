"""HunyuanVideo-I2V whose conditioning accepts a spatially varying mask: nothing but that."""

from __future__ import annotations

import torch
from torch import Tensor

from loraedit_ext import masks
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.hunyuan.wrapper import HunyuanI2V


class MaskedHunyuan(HunyuanI2V):
    """HunyuanVideo told of the whole mask: through its mask channel, or by which tokens are clean.

    With the first-frame mask it equals its base bit for bit.
    """

    def __init__(
        self, checkpoint: HunyuanCheckpoint, device: torch.device, rule: masks.MaskRule = "all", *,
        vae_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(checkpoint, device, vae_dtype=vae_dtype)
        self.rule = rule

    def known_region(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        cells = masks.latent_mask if self.variant == "latent_concat" else masks.token_mask
        return masks.grey_fill(video, mask), cells(mask, self.rule)

    def encode_known(self, video: Tensor, cells: Tensor) -> Tensor:
        """Latents (16, T, h, w) of the grey-filled video.

        `latent_concat` sees all of a latent frame of which something is preserved, where its base has zeros behind the
        mask: docs/hunyuan.md tells what that gained. A latent frame of which nothing is preserved stays zero, as released.
        """
        if self.variant == "latent_concat":
            cells = cells.amax(dim=(2, 3), keepdim=True).expand_as(cells)
        return super().encode_known(video, cells)
