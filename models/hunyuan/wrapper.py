"""HunyuanVideo-I2V as released, both variants, behind the interface of every image-to-video model.

Reference for the conditioning: Tencent-Hunyuan/HunyuanVideo-I2V
`hyvideo/diffusion/pipelines/pipeline_hunyuan_video.py` and `hyvideo/diffusion/flow/transport.py`.
Axes: B batch, F pixel frames, H W pixels, T latent frames, h w latent cells, L text tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.base import TIMESTEPS, Flops, Geometry, I2VModel
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.hunyuan.config import Variant
from models.hunyuan.keys import LORA
from models.hunyuan.transformer import HunyuanTransformer

STABILITY = 0.001
"""Share of the first frame's latents in the initial noise, upstream's stability mode (which goes with shift 7)."""


TEXT_TOKENS = 400
"""About as many as a prompt and its picture have."""


class HunyuanI2V(I2VModel):
    """HunyuanVideo-I2V, conditioned on its first frame.

    The conditioning is the same for both variants: `known` (16, T, h, w), clean latents where the video is preserved
    and zero elsewhere; `mask` (1, T, h, w), 1 there; `text`, `text_length`, `pooled`.
    What the transformer is shown differs: `latent_concat` gets known latents and mask as channels, `token_replace` gets
    known latents in place of the noisy ones and modulates these tokens as at timestep 0.
    """

    family = "hunyuan-video"
    lora_names = LORA
    lora_targets = (
        r"double_blocks\.\d+\.(img|txt)_(attn_qkv|attn_proj|mlp\.fc[12])|single_blocks\.\d+\.linear[12]"
    )
    condition_names = ("known", "mask", "text", "text_length", "pooled")
    kept_in_fp32 = ("norm",)
    large_linears = lora_targets
    trained_fps, trained_frames = 24, 129
    encoding_room = 20e9  # LLaVA, which each piece needs, has 16 and is read into host memory first
    geometry = Geometry()
    checkpoint: HunyuanCheckpoint

    @property
    def variant(self) -> Variant:
        return self.checkpoint.config.variant

    def describe(self) -> dict[str, Any]:
        config = self.checkpoint.config
        return {
            "family": self.family, "variant": f"hunyuan-i2v-{config.variant}", "dim": config.dim,
            "double_blocks": config.num_double, "single_blocks": config.num_single, "mlp_dim": config.mlp_dim,
        }

    def encode_prompt(self, prompt: str, reference: Tensor) -> dict[str, Tensor]:
        """`text` (L, text_dim): image and text tokens, valid ones first; `text_length` (); `pooled` (pooled_dim,)."""
        return self.run_encoder("text", lambda encoder: encoder.encode(prompt, reference))

    def encode_negative(self, prompt: str, reference: Tensor) -> dict[str, Tensor]:
        """As released, the picture of the unconditional pass is black."""
        return self.encode_prompt(prompt, torch.full_like(reference, -1.0))

    def encode_condition(
        self, video: Tensor, mask: Tensor, reference: Tensor, prompt: str
    ) -> dict[str, Tensor]:
        known, cells = self.known_region(video, mask)
        return {
            "known": self.encode_known(known, cells), "mask": cells,
            **self.encode_prompt(prompt, reference),
        }

    def encode_known(self, video: Tensor, cells: Tensor) -> Tensor:
        """Latents (16, T, h, w) of the known part, zero elsewhere.

        Frame 0 is encoded alone, as released: the VAE's group norms look at all frames, so its first latent of a
        longer video is another one. Later frames are encoded only if something of them is known.
        """
        shape = self.geometry.latent_shape(*video.shape[1:])
        latents = torch.zeros(shape)
        latents[:, :1] = self.encode_video(video[:, :1])
        if cells[:, 1:].any():
            latents[:, 1:] = self.encode_video(video)[:, 1:]
        return torch.where(cells.bool(), latents, 0.0)

    def known_region(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        _, frames, height, width = self.geometry.latent_shape(*video.shape[1:])
        known = torch.zeros_like(video)
        known[:, 0] = video[:, 0]
        cells = torch.zeros(1, frames, height, width)
        cells[:, 0] = 1
        return known, cells

    def flops(self, tokens: int) -> Flops:
        config = self.checkpoint.config
        dim, count, depth = config.dim, tokens + TEXT_TOKENS, config.num_double + config.num_single
        weights = 4 * dim**2 + 2 * dim * config.mlp_dim  # that a token meets, in a double and in a single block
        last = depth * dim * config.mlp_dim + config.num_single * dim**2
        return Flops(2 * count * (depth * weights - last), 2 * count * last, depth * 4 * count**2 * dim)

    def build_transformer(self) -> nn.Module:
        with torch.device("meta"):
            return HunyuanTransformer(self.checkpoint.config).requires_grad_(False).eval()

    def model_inputs(
        self, noisy: Tensor, t: Tensor, condition: dict[str, Tensor], guidance: float = 1.0
    ) -> tuple[Tensor, ...]:
        known, mask, *text = (condition[name] for name in self.condition_names)
        if self.variant == "latent_concat":
            latents = torch.cat([noisy, known, mask], dim=1)
        else:
            latents = self.final_latents(noisy, condition)
        return (latents, t * TIMESTEPS, *text, torch.full_like(t, guidance * TIMESTEPS), mask)

    def loss_weight(self, condition: dict[str, Tensor]) -> Tensor | None:
        """Token replace: only generated latents count; what the model says of preserved ones is never used."""
        return None if self.variant == "latent_concat" else 1 - condition["mask"]

    def start_latents(self, noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return (1 - STABILITY) * noise + STABILITY * condition["known"][:, :, :1]

    def final_latents(self, latents: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Token replace: preserved latents are the known ones, exactly."""
        if self.variant == "latent_concat":
            return latents
        return torch.where(condition["mask"].bool(), condition["known"], latents)
