"""The diffusion transformer of Wan2.1-I2V and, without the image branch, of Wan2.2-I2V, under the original names.

Reference: Wan-Video/Wan2.1 `wan/modules/model.py`. The residual stream is fp32 under bf16 autocast, as there.
Axes: B batch, C T h w latents, N = T * h/2 * w/2 tokens, D width, L text tokens, I image tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.blocks import Tensors, TransformerBlock, slices
from models.layers import (
    Float32LayerNorm,
    Float32Linear,
    PipelineLayer,
    RMSNorm,
    attention,
    freeze,
    rope_table,
    rotate,
    sinusoid,
    thaw,
    to_autocast,
)
from models.linears import OutputLinear
from models.wan.config import WanConfig

ROPE_THETA = 10000.0


class Attention(nn.Module):
    """Projections of an attention; q and k are normalised over the full width, before the split into heads."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q = nn.Linear(config.dim, config.dim)
        self.k = nn.Linear(config.dim, config.dim)
        self.v = nn.Linear(config.dim, config.dim)
        self.o = nn.Linear(config.dim, config.dim)
        self.norm_q = RMSNorm(config.dim, config.eps)
        self.norm_k = RMSNorm(config.dim, config.eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(Attention):
    """Attention over all video tokens, with rotary position embedding."""

    def project(self, x: Tensor) -> Tensors:
        """Queries, keys and values of tokens (B, n, D)."""
        return self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))

    def turn(self, q: Tensor, k: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys (B, n, H, d), normalised and rotated."""
        q, k = self.norm_q(q.flatten(2)), self.norm_k(k.flatten(2))
        return rotate(self.heads(q), rope), rotate(self.heads(k), rope)


class CrossAttention(Attention):
    """Attention to the text and, with its own keys and values, to the image tokens if there are any; the two are added."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if not config.reads_image:
            return
        self.k_img = nn.Linear(config.dim, config.dim)
        self.v_img = nn.Linear(config.dim, config.dim)
        self.norm_k_img = RMSNorm(config.dim, config.eps)

    def keys(self, text: Tensor, image: Tensor | None = None) -> tuple[Tensor, ...]:
        """Keys and values of the text (B, L, H, d) and of the image, if there is one."""
        of_text = self.heads(self.norm_k(self.k(text))), self.heads(self.v(text))
        if image is None:
            return of_text
        return *of_text, self.heads(self.norm_k_img(self.k_img(image))), self.heads(self.v_img(image))

    def forward(self, x: Tensor, *keys: Tensor) -> Tensor:
        """Tokens (B, n, D) and what `keys` gave -> (B, n, D)."""
        q = self.heads(self.norm_q(self.q(x)))
        attended = attention(q, *keys[:2])
        return self.o(attended + attention(q, *keys[2:]) if keys[2:] else attended)


class FeedForward(nn.Sequential):
    """Linear, tanh GELU, linear; named 0, 1, 2 as in the checkpoint."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim),
            nn.GELU(approximate="tanh"),
            OutputLinear(config.ffn_dim, config.dim),
        )


@dataclass(frozen=True)
class Conditions:
    """What a block's pass depends on beside its input.

    Attributes:
        modulation: fp32 (B, 6, D): shift, scale, gate of attention, then of feed-forward.
        rope: fp32 (2, n, d/2), of the tokens at hand.
        context: (B, L, D) projected text tokens, (B, I, D) projected image tokens if the model reads an image.
    """

    modulation: Tensor
    rope: Tensor
    context: tuple[Tensor, ...]


class Block(TransformerBlock[Conditions]):
    """Self-attention, cross-attention and feed-forward, the first and last modulated by the timestep."""

    modulation_vectors = slice(6)

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.norm1 = Float32LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = Float32LayerNorm(config.dim, config.eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = Float32LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = FeedForward(config)
        self.modulation = nn.Parameter(torch.zeros(1, 6, config.dim))

    def pieces(self, x: Tensor, at: Conditions, most: int) -> list[tuple[slice, Conditions]]:
        parts = slices(0, x.shape[1], most)
        return [(where, replace(at, rope=at.rope[:, where])) for where in parts]

    def shared(self, at: Conditions) -> Tensors:
        """Six modulation vectors (B, 1, D), then keys and values of text and image."""
        modulation = self.modulation.float() + at.modulation
        return *modulation.chunk(6, dim=1), *self.cross_attn.keys(*at.context)

    def normalise(self, x: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        shift, scale, *_ = shared
        return to_autocast(self.norm1(x) * (1 + scale) + shift)

    def project(self, normalised: Tensor, shared: Tensors, at: Conditions) -> Tensors:
        return self.self_attn.project(normalised)

    def turn(self, q: Tensor, k: Tensor, at: Conditions) -> tuple[Tensor, Tensor]:
        return self.self_attn.turn(q, k, at.rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Conditions) -> Tensor:
        return attention(q, k, v)

    def finish(self, x: Tensor, attended: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        _, _, gate, shift, scale, ffn_gate, *keys = shared
        x = x + self.self_attn.o(attended) * gate
        x = x + self.cross_attn(to_autocast(self.norm3(x)), *keys)
        return x + self.ffn(to_autocast(self.norm2(x) * (1 + scale) + shift)) * ffn_gate


class ImageProjection(nn.Module):
    """Image features to context tokens (original `MLPProj`)."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            Float32LayerNorm(image_dim),
            nn.Linear(image_dim, image_dim),
            nn.GELU(),
            nn.Linear(image_dim, dim),
            Float32LayerNorm(dim),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.proj(features)


class Head(nn.Module):
    """Final modulated norm and projection to velocity patches, in fp32."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = Float32LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Float32Linear(config.dim, config.out_dim * patch)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, N, D), time embedding (B, D) -> (B, N, patch * out_dim)."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale) + shift)


class EmbedLayer(PipelineLayer):
    """First pipeline layer: latents, timestep, text and image features to tokens and constants."""

    def __init__(self, model: WanTransformer) -> None:
        names = ["patch_embedding", "text_embedding", "time_embedding", "time_projection"]
        names += ["img_emb"] if model.config.reads_image else []
        super().__init__({name: name for name in names})
        self.config = model.config
        for name in names:
            setattr(self, name, getattr(model, name))

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """(noisy (B,16,T,h,w), timestep (B,), y (B,20,T,h,w), text (B,L,·), image (B,I,·) if any) -> stream."""
        noisy, timestep, y, text, *image = inputs
        patches = self.patch_embedding(torch.cat([noisy, y.to(noisy.dtype)], dim=1))
        hidden = rearrange(patches, "b d t h w -> b (t h w) d").float().contiguous()
        time = self.time_embedding(sinusoid(timestep, self.config.freq_dim))
        modulation = self.time_projection(time).unflatten(1, (6, -1))
        context = (self.text_embedding(text), *(self.img_emb(features) for features in image))
        grid = torch.tensor(patches.shape[2:], device=hidden.device)
        rope = self.rope(tuple(patches.shape[2:])).to(hidden.device)
        constants = (modulation, time, *map(to_autocast, context), rope)
        return (hidden, *(freeze(c) for c in constants), grid)

    def rope(self, grid: tuple[int, int, int]) -> Tensor:
        width = self.config.dim // self.config.num_heads
        side = 2 * (width // 6)
        return rope_table(grid, (width - 2 * side, side, side), ROPE_THETA)


class BlockLayer(PipelineLayer):
    """One transformer block as a pipeline layer."""

    def __init__(self, block: Block, index: int) -> None:
        super().__init__({"block": f"blocks.{index}"})
        self.block = block

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, modulation, _, *context, rope, _ = stream
        hidden = self.run(self.block, hidden, Conditions(thaw(modulation), thaw(rope), tuple(map(thaw, context))))
        return hidden, *stream[1:]


class HeadLayer(PipelineLayer):
    """Last pipeline layer: tokens to the velocity (B, 16, T, h, w), fp32."""

    def __init__(self, model: WanTransformer) -> None:
        super().__init__({"head": "head"})
        self.head = model.head
        self.patch_size = model.config.patch_size

    def forward(self, stream: tuple[Tensor, ...]) -> Tensor:
        hidden, _, time, *_, grid = stream
        frames, height, width = grid.tolist()
        pt, ph, pw = self.patch_size
        return rearrange(
            self.head(hidden, thaw(time)),
            "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)",
            t=frames, h=height, w=width, pt=pt, ph=ph, pw=pw,
        )


class WanTransformer(nn.Module):
    """Wan-I2V: predicts the flow-matching velocity of 36-channel conditioned latents."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            Float32Linear(config.freq_dim, dim), nn.SiLU(), Float32Linear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(dim, dim * 6))
        if config.image_dim is not None:
            self.img_emb = ImageProjection(config.image_dim, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def layers(self) -> list[PipelineLayer]:
        """The transformer as a chain for the pipeline; shares this module's parameters."""
        blocks = (BlockLayer(block, index) for index, block in enumerate(self.blocks))
        return list(chain([EmbedLayer(self)], blocks, [HeadLayer(self)]))

    def forward(self, noisy: Tensor, timestep: Tensor, y: Tensor, text: Tensor, *image: Tensor) -> Tensor:
        """Velocity of noisy latents.

        Args:
            noisy: (B, 16, T, h, w) latents at the timestep's noise level.
            timestep: (B,) in 0..1000.
            y: (B, 20, T, h, w) conditioning: 4 mask channels (1 = preserve), 16 condition latents.
            text: (B, L, text_dim) text features, trimmed or zero-padded; padded here to `text_len`.
            image: (B, I, image_dim) image features, if the model reads an image.

        Returns:
            fp32 (B, 16, T, h, w).
        """
        text = F.pad(text, (0, 0, 0, self.config.text_len - text.shape[1]))
        stream: tuple[Tensor, ...] | Tensor = (noisy, timestep, y, text, *image)
        for layer in self.layers():
            stream = layer(stream)
        return stream
