"""Wan2.1-I2V and Wan2.2-I2V-A14B as released, behind the interface of every image-to-video model.

Reference for the conditioning: Wan-Video/Wan2.1 `wan/image2video.py`. Wan2.2's is the same but for the image features, which
it does not read.
Axes: F pixel frames, H W pixels, T latent frames, h w latent cells, L text tokens, I image tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Flops, Geometry, I2VModel
from models.wan.checkpoint import WanCheckpoint
from models.wan.keys import LORA
from models.wan.transformer import WanTransformer

IMAGE_TOKENS = 257
"""Of CLIP's ViT-H/14."""


class WanI2V(I2VModel):
    """Wan-I2V, conditioned on its first frame; of Wan2.2 one of the two experts."""

    family = "wan"
    lora_names = LORA
    lora_targets = r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qkvo]|ffn\.[02])"
    kept_in_fp32 = ("norm", "modulation")
    large_linears = r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.([qkvo]|k_img|v_img)|ffn\.[02])"
    trained_fps, trained_frames = 16, 81
    encoding_room = 8e9  # the VAE, if it works on the CPU; umT5 stays in its file's pages there
    geometry = Geometry()
    checkpoint: WanCheckpoint

    @property
    def condition_names(self) -> tuple[str, ...]:
        return ("y", "text", "image") if self.checkpoint.config.reads_image else ("y", "text")

    def describe(self) -> dict[str, Any]:
        config, expert = self.checkpoint.config, self.checkpoint.expert
        return {
            "family": self.family, "variant": config.variant, "dim": config.dim,
            "layers": config.num_layers, "ffn_dim": config.ffn_dim, "in_dim": config.in_dim,
        } | ({"expert": expert} if expert else {})

    @property
    def loaders(self) -> dict[str, Callable[[torch.device], Any]]:
        return super().loaders | ({"image": self.checkpoint.load_image_encoder} if self.checkpoint.config.reads_image else {})

    def encode_prompt(self, prompt: str, reference: Tensor) -> dict[str, Tensor]:
        """`text` (text_len, text_dim): the prompt's features, zero-padded and not masked, as the original does.

        Each prompt is encoded once: the pieces of a long clip have the same, and umT5 takes its time to load.
        """
        if prompt not in self._features:
            self._features[prompt] = self.run_encoder("text", lambda encoder: encoder.encode(prompt).cpu())
        features = self._features[prompt]
        return {"text": F.pad(features, (0, 0, 0, self.checkpoint.config.text_len - len(features)))}

    @cached_property
    def _features(self) -> dict[str, Tensor]:
        return {}

    def encode_condition(
        self, video: Tensor, mask: Tensor, reference: Tensor, prompt: str
    ) -> dict[str, Tensor]:
        """`y` (20, T, h, w): 4 mask channels, then 16 condition latents; `text`; of Wan2.1 `image` (I, image_dim)."""
        known, channels = self.known_region(video, mask)
        condition = {"y": torch.cat([channels, self.encode_video(known)])}
        if self.checkpoint.config.reads_image:
            condition["image"] = self.run_encoder("image", lambda encoder: encoder.encode(reference).cpu())
        return condition | self.encode_prompt(prompt, reference)

    def known_region(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        _, frames, height, width = self.geometry.latent_shape(*video.shape[1:])
        known = torch.zeros_like(video)
        known[:, 0] = video[:, 0]
        channels = torch.zeros(4, frames, height, width)
        channels[:, 0] = 1
        return known, channels

    def flops(self, tokens: int) -> Flops:
        config = self.checkpoint.config
        dim, image = config.dim, IMAGE_TOKENS if config.reads_image else 0
        outputs = 2 * tokens * dim * config.ffn_dim
        linears = 2 * tokens * 6 * dim**2 + outputs + 4 * (config.text_len + image) * dim**2
        attention = 4 * tokens * (tokens + config.text_len + image) * dim
        return Flops(*(config.num_layers * part for part in (linears, outputs, attention)))

    def build_transformer(self) -> nn.Module:
        with torch.device("meta"):
            return WanTransformer(self.checkpoint.config).requires_grad_(False).eval()
