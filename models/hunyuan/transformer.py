"""The HunyuanVideo-I2V diffusion transformer, under the original checkpoint's parameter names.

Reference: Tencent-Hunyuan/HunyuanVideo-I2V `hyvideo/modules/models.py`. Image and text tokens travel as one
sequence, image first, and the residual stream is fp32 under bf16 autocast.
Axes: B batch, C T h w latents, N = T * h/2 * w/2 image tokens, L text tokens, S = N + L, D width, H heads, d head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.blocks import Tensors, TransformerBlock, slices
from models.hunyuan.config import REFINER_MLP_RATIO, SINUSOID_WIDTH, HunyuanConfig
from models.layers import (
    Float32LayerNorm,
    Float32Linear,
    PipelineLayer,
    RMSNorm,
    attention,
    freeze,
    linear_rows,
    rope_table,
    rotate,
    sinusoid,
    thaw,
    to_autocast,
)
from models.linears import OutputLinear

ROPE_THETA = 256.0
EPS = 1e-6


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attention of (B, S, H, d) tensors in which sample b has `lengths[b]` valid tokens, padding last.

    Samples are cut rather than masked, so that fused kernels apply. Outputs of padding are zero: (B, S, H*d).
    """
    total = q.shape[1]
    if len(set(lengths)) == 1:
        groups = [(slice(None), lengths[0])]
    else:
        groups = [(slice(index, index + 1), length) for index, length in enumerate(lengths)]
    outputs = [_padded(attention(q[who, :length], k[who, :length], v[who, :length]), total) for who, length in groups]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _padded(x: Tensor, length: int) -> Tensor:
    """(B, n, D) -> (B, length, D) with zeros behind."""
    return x if x.shape[1] == length else F.pad(x, (0, 0, 0, length - x.shape[1]))


class TimestepEmbedder(nn.Module):
    """(B,) timesteps or guidance -> fp32 (B, D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(Float32Linear(SINUSOID_WIDTH, dim), nn.SiLU(), Float32Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(sinusoid(t, SINUSOID_WIDTH, torch.float32))


class VectorEmbedder(nn.Module):
    """Pooled text features (B, pooled_dim) -> fp32 (B, D) (original `MLPEmbedder`)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.in_layer = Float32Linear(config.pooled_dim, config.dim)
        self.out_layer = Float32Linear(config.dim, config.dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(pooled)))


class TextProjection(nn.Module):
    """Mean text features (B, text_dim) -> fp32 (B, D)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.linear_1 = Float32Linear(config.text_dim, config.dim)
        self.linear_2 = Float32Linear(config.dim, config.dim)

    def forward(self, mean: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(mean)))


class MLP(nn.Module):
    """Feed-forward of a block."""

    def __init__(self, dim: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = activation
        self.fc2 = OutputLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class RefinerBlock(nn.Module):
    """Self-attention and feed-forward over the valid text tokens, with gates but no shifts."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.norm1 = Float32LayerNorm(dim, EPS)
        self.self_attn_qkv = nn.Linear(dim, 3 * dim)
        self.self_attn_proj = nn.Linear(dim, dim)
        self.norm2 = Float32LayerNorm(dim, EPS)
        self.mlp = MLP(dim, REFINER_MLP_RATIO * dim, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vector: Tensor, lengths: Sequence[int]) -> Tensor:
        gate, mlp_gate = self.adaLN_modulation(vector).float().unsqueeze(1).chunk(2, dim=-1)
        qkv = self.self_attn_qkv(to_autocast(self.norm1(x))).unflatten(-1, (3, self.num_heads, -1))
        x = x + self.self_attn_proj(ragged_attention(*qkv.unbind(2), lengths)) * gate
        return x + self.mlp(to_autocast(self.norm2(x))) * mlp_gate


class Refiner(nn.Module):
    """The blocks of the text refiner; a module of its own for the sake of the original's names."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RefinerBlock(config) for _ in range(config.num_refiner))


class TextRefiner(nn.Module):
    """LLaVA's features to text tokens (original `SingleTokenRefiner`)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.input_embedder = nn.Linear(config.text_dim, config.dim)
        self.t_embedder = TimestepEmbedder(config.dim)
        self.c_embedder = TextProjection(config)
        self.individual_token_refiner = Refiner(config)

    def forward(self, text: Tensor, timestep: Tensor, lengths: Tensor) -> Tensor:
        """text (B, L, text_dim), timestep (B,), lengths int (B,) of valid tokens -> fp32 (B, L, D)."""
        valid = torch.arange(text.shape[1], device=text.device) < lengths.unsqueeze(1)
        mean = (text.float() * valid.unsqueeze(-1)).sum(1) / lengths.unsqueeze(1)
        vector = self.t_embedder(timestep) + self.c_embedder(mean)
        x = self.input_embedder(text).float()
        counts = lengths.tolist()
        for block in self.individual_token_refiner.blocks:
            x = block(x, vector, counts)
        return x


@dataclass(frozen=True)
class TokenModulation:
    """Shifts, scales and gates of a stream of tokens, in threes: attention's, then the feed-forward's.

    Where preserved tokens have other ones, both results are computed and one is chosen: vectors spread over all
    tokens would be kept for backward (8 rows of the width per token in a double block).
    """

    noisy: tuple[Tensor, ...]
    """fp32 (B, 1, D) each."""
    clean: tuple[Tensor, ...] = ()
    """The same for preserved tokens; none if they have no other."""
    preserved: Tensor | None = None
    """bool (B, S, 1), which tokens these are."""

    def modulate(self, normalised: Tensor, third: int = 0) -> Tensor:
        """Scaled and shifted (B, S, D), in the autocast dtype."""
        return to_autocast(self._chosen(lambda shift, scale: normalised * (1 + scale) + shift, third, 0, 1))

    def gate(self, branch: Tensor, third: int = 0) -> Tensor:
        """A branch's output (B, S, D) times its gate, fp32."""
        return self._chosen(lambda gate: branch * gate, third, 2)

    def _chosen(self, apply: Callable[..., Tensor], third: int, *which: int) -> Tensor:
        noisy = apply(*(self.noisy[3 * third + index] for index in which))
        if not self.clean or self.preserved is None:
            return noisy
        return torch.where(self.preserved, apply(*(self.clean[3 * third + index] for index in which)), noisy)


class Modulation(nn.Module):
    """Modulation vector to shifts, scales and gates (original `ModulateDiT`)."""

    def __init__(self, dim: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(dim, factor * dim)

    def project(self, vector: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(vector)).float().unsqueeze(1).chunk(self.factor, dim=-1)

    def forward(self, vector: Tensor, clean: Tensor | None = None) -> tuple[Tensor, ...]:
        """Vector fp32 (B, D) of noisy tokens, and of preserved ones if theirs differs -> (B, 1, D) each."""
        return self.project(vector) if clean is None else (*self.project(vector), *self.project(clean))


@dataclass(frozen=True)
class Conditions:
    """What a block's pass depends on beside its input.

    Attributes:
        vector: fp32 (B, D), modulation vector.
        rope: fp32 (2, n, d/2) of the tokens at hand; None if they are of the text.
        lengths: valid tokens of each sample, padding last.
        clean: modulation vector (B, D) of preserved image tokens, if theirs differs.
        preserved: which of the tokens at hand these are, bool (B, n).
    """

    vector: Tensor
    rope: Tensor | None
    lengths: Sequence[int]
    clean: Tensor | None = None
    preserved: Tensor | None = None

    def part(self, where: slice) -> Conditions:
        """Of a piece of the tokens at hand."""
        return replace(
            self, rope=None if self.rope is None else self.rope[:, where],
            preserved=None if self.preserved is None else self.preserved[:, where],
        )


class DoubleBlock(TransformerBlock[Conditions]):
    """Image and text with weights of their own, attending jointly (original `MMDoubleStreamBlock`)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        dim, head_dim, hidden = config.dim, config.head_dim, config.mlp_dim
        self.num_heads = config.num_heads
        self.norm = Float32LayerNorm(dim, EPS, elementwise_affine=False)
        self.img_mod = Modulation(dim, 6)
        self.img_attn_qkv = nn.Linear(dim, 3 * dim)
        self.img_attn_q_norm = RMSNorm(head_dim, EPS)
        self.img_attn_k_norm = RMSNorm(head_dim, EPS)
        self.img_attn_proj = nn.Linear(dim, dim)
        self.img_mlp = MLP(dim, hidden, nn.GELU(approximate="tanh"))
        self.txt_mod = Modulation(dim, 6)
        self.txt_attn_qkv = nn.Linear(dim, 3 * dim)
        self.txt_attn_q_norm = RMSNorm(head_dim, EPS)
        self.txt_attn_k_norm = RMSNorm(head_dim, EPS)
        self.txt_attn_proj = nn.Linear(dim, dim)
        self.txt_mlp = MLP(dim, hidden, nn.GELU(approximate="tanh"))

    def pieces(self, x: Tensor, at: Conditions, most: int) -> list[tuple[slice, Conditions]]:
        """Image tokens, which come first, and text tokens apart."""
        image = at.rope.shape[1]
        text = replace(at, rope=None, preserved=None)
        return [
            *((where, at.part(where)) for where in slices(0, image, most)),
            *((where, text) for where in slices(image, x.shape[1], most)),
        ]

    def shared(self, at: Conditions) -> Tensors:
        """The text's six modulation vectors (B, 1, D), then the image's, then those of preserved tokens."""
        return *self.txt_mod(at.vector), *self.img_mod(at.vector, at.clean)

    def normalise(self, x: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        return self._modulation(shared, at).modulate(self.norm(x))

    def project(self, normalised: Tensor, shared: Tensors, at: Conditions) -> Tensors:
        linear = self.txt_attn_qkv if at.rope is None else self.img_attn_qkv
        return heads(linear(normalised), self.num_heads)

    def turn(self, q: Tensor, k: Tensor, at: Conditions) -> tuple[Tensor, Tensor]:
        if at.rope is None:
            return self.txt_attn_q_norm(q), self.txt_attn_k_norm(k)
        return rotate(self.img_attn_q_norm(q), at.rope), rotate(self.img_attn_k_norm(k), at.rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Conditions) -> Tensor:
        return ragged_attention(q, k, v, at.lengths)

    def finish(self, x: Tensor, attended: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        modulation = self._modulation(shared, at)
        project, mlp = (self.txt_attn_proj, self.txt_mlp) if at.rope is None else (self.img_attn_proj, self.img_mlp)
        x = x + modulation.gate(project(attended))
        return x + modulation.gate(mlp(modulation.modulate(self.norm(x), 1)), 1)

    def _modulation(self, shared: Tensors, at: Conditions) -> TokenModulation:
        return token_modulation(shared[:6] if at.rope is None else shared[6:], 6, at.preserved)


class SingleBlock(TransformerBlock[Conditions]):
    """Attention and feed-forward side by side over all tokens (original `MMSingleStreamBlock`)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.widths = (3 * dim, config.mlp_dim)
        self.norm = Float32LayerNorm(dim, EPS, elementwise_affine=False)
        self.modulation = Modulation(dim, 3)
        self.linear1 = nn.Linear(dim, sum(self.widths))
        self.q_norm = RMSNorm(config.head_dim, EPS)
        self.k_norm = RMSNorm(config.head_dim, EPS)
        self.linear2 = OutputLinear(dim + config.mlp_dim, dim)

    def pieces(self, x: Tensor, at: Conditions, most: int) -> list[tuple[slice, Conditions]]:
        text = x.shape[1] - at.rope.shape[1]
        preserved = None if at.preserved is None else F.pad(at.preserved, (0, text))
        whole = replace(at, rope=with_text(at.rope, text), preserved=preserved)
        return [(where, whole.part(where)) for where in slices(0, x.shape[1], most)]

    def shared(self, at: Conditions) -> Tensors:
        """Three modulation vectors (B, 1, D), then those of preserved tokens."""
        return self.modulation(at.vector, at.clean)

    def normalise(self, x: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        return token_modulation(shared, 3, at.preserved).modulate(self.norm(x))

    def project(self, normalised: Tensor, shared: Tensors, at: Conditions) -> Tensors:
        return heads(linear_rows(self.linear1, normalised, slice(self.widths[0])), self.num_heads)

    def turn(self, q: Tensor, k: Tensor, at: Conditions) -> tuple[Tensor, Tensor]:
        return rotate(self.q_norm(q), at.rope), rotate(self.k_norm(k), at.rope)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, at: Conditions) -> Tensor:
        return ragged_attention(q, k, v, at.lengths)

    def finish(self, x: Tensor, attended: Tensor, shared: Tensors, at: Conditions) -> Tensor:
        hidden = linear_rows(self.linear1, self.normalise(x, shared, at), slice(self.widths[0], None))
        out = self.linear2(torch.cat([attended, F.gelu(hidden, approximate="tanh")], dim=-1))
        return x + token_modulation(shared, 3, at.preserved).gate(out)


def heads(qkv: Tensor, count: int) -> tuple[Tensor, ...]:
    """(B, n, 3*D) -> q, k, v (B, n, H, d)."""
    return qkv.unflatten(-1, (3, count, -1)).unbind(2)


def token_modulation(vectors: Tensors, count: int, preserved: Tensor | None) -> TokenModulation:
    """`count` vectors of noisy tokens, perhaps as many of preserved ones, and which these are, bool (B, n)."""
    return TokenModulation(vectors[:count], vectors[count:], None if preserved is None else preserved.unsqueeze(-1))


def with_text(rope: Tensor, text: int) -> Tensor:
    """(2, N, d/2) -> (2, N + text, d/2): text tokens do not turn (cosine 1, sine 0)."""
    still = torch.stack([torch.ones_like(rope[0, :1]), torch.zeros_like(rope[0, :1])])
    return torch.cat([rope, still.expand(-1, text, -1)], dim=1)


class PatchEmbed(nn.Module):
    """Latents (B, C, T, h, w) to patches (B, D, T, h/2, w/2)."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.dim, kernel_size=config.patch_size, stride=config.patch_size)

    def forward(self, latents: Tensor) -> Tensor:
        return self.proj(latents)


class FinalLayer(nn.Module):
    """Modulated norm and projection to velocity patches, in fp32; the same modulation for all tokens."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        t, h, w = config.patch_size
        self.norm_final = Float32LayerNorm(config.dim, EPS, elementwise_affine=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Float32Linear(config.dim, 2 * config.dim))
        self.linear = Float32Linear(config.dim, t * h * w * config.out_channels)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """x (B, N, D), vector (B, D) -> (B, N, out_channels * patch)."""
        shift, scale = self.adaLN_modulation(vector).unsqueeze(1).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class EmbedLayer(PipelineLayer):
    """First pipeline layer: latents, timestep and text features to tokens and constants.

    Output: hidden (B, S, D), then frozen: vector (B, D), rope (2, N, d/2), lengths int (B,), grid int (3,), and for
    the token-replace variant clean (B, D) and preserved uint8 (B, N).
    """

    def __init__(self, model: HunyuanTransformer) -> None:
        names = ["img_in", "txt_in", "time_in", "vector_in"] + ["guidance_in"] * model.config.guidance_embed
        super().__init__({name: name for name in names})
        self.config = model.config
        for name in names:
            self.add_module(name, model.get_submodule(name))

    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        latents, timestep, text, text_length, pooled, guidance, preserved = inputs
        patches = self.img_in(latents)
        img = rearrange(patches, "b d t h w -> b (t h w) d").float()
        hidden = torch.cat([img, self.txt_in(text, timestep, text_length)], dim=1)
        pooled = self.vector_in(pooled)
        vector = self.time_in(timestep) + pooled
        if self.config.guidance_embed:
            vector = vector + self.guidance_in(guidance)
        grid = tuple(patches.shape[2:])
        rope = rope_table(grid, self.config.rope_axes, ROPE_THETA).to(hidden.device)
        lengths = img.shape[1] + text_length
        stream = (hidden, freeze(vector), freeze(rope), lengths, torch.tensor(grid, device=hidden.device))
        if self.config.variant == "latent_concat":
            return stream
        clean = self.time_in(torch.zeros_like(timestep)) + pooled
        return (*stream, freeze(clean), self.tokens(preserved))

    def tokens(self, preserved: Tensor) -> Tensor:
        """(B, 1, T, h, w), 1 = preserve -> uint8 (B, N): a token is preserved if all its latents are."""
        _, h, w = self.config.patch_size
        return (-F.max_pool3d(-preserved.float(), (1, h, w))).flatten(1).to(torch.uint8)


class BlockLayer(PipelineLayer):
    """One transformer block as a pipeline layer."""

    def __init__(self, block: DoubleBlock | SingleBlock, origin: str) -> None:
        super().__init__({"block": origin})
        self.block = block

    def forward(self, stream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, vector, rope, lengths, _, *replace = stream
        clean, preserved = (thaw(replace[0]), replace[1].bool()) if replace else (None, None)
        hidden = self.run(self.block, hidden, Conditions(thaw(vector), thaw(rope), lengths.tolist(), clean, preserved))
        return (hidden, *stream[1:])


class HeadLayer(PipelineLayer):
    """Last pipeline layer: image tokens to the velocity (B, 16, T, h, w), fp32."""

    def __init__(self, model: HunyuanTransformer) -> None:
        super().__init__({"final_layer": "final_layer"})
        self.final_layer = model.final_layer
        self.patch_size = model.config.patch_size

    def forward(self, stream: tuple[Tensor, ...]) -> Tensor:
        hidden, vector, rope, _, grid, *_ = stream
        frames, height, width = grid.tolist()
        pt, ph, pw = self.patch_size
        return rearrange(
            self.final_layer(hidden[:, : rope.shape[1]], thaw(vector)),
            "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)",
            t=frames, h=height, w=width, pt=pt, ph=ph, pw=pw,
        )


class HunyuanTransformer(nn.Module):
    """HunyuanVideo-I2V, either variant: predicts the flow-matching velocity."""

    def __init__(self, config: HunyuanConfig) -> None:
        super().__init__()
        self.config = config
        self.img_in = PatchEmbed(config)
        self.txt_in = TextRefiner(config)
        self.time_in = TimestepEmbedder(config.dim)
        self.vector_in = VectorEmbedder(config)
        if config.guidance_embed:
            self.guidance_in = TimestepEmbedder(config.dim)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_double))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single))
        self.final_layer = FinalLayer(config)

    def layers(self) -> list[PipelineLayer]:
        """The transformer as a chain for the pipeline; shares this module's parameters."""
        doubles = (BlockLayer(block, f"double_blocks.{i}") for i, block in enumerate(self.double_blocks))
        singles = (BlockLayer(block, f"single_blocks.{i}") for i, block in enumerate(self.single_blocks))
        return list(chain([EmbedLayer(self)], doubles, singles, [HeadLayer(self)]))

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, text_length: Tensor, pooled: Tensor,
        guidance: Tensor, preserved: Tensor,
    ) -> Tensor:
        """Velocity of conditioned noisy latents.

        Args:
            latents: (B, in_channels, T, h, w) as the variant wants it (`HunyuanI2V.model_inputs`).
            timestep: (B,) in 0..1000.
            text: (B, L, text_dim), valid tokens first.
            text_length: int (B,), valid tokens.
            pooled: (B, pooled_dim).
            guidance: (B,), strength x 1000; used where the model embeds it.
            preserved: (B, 1, T, h, w), 1 where the latents are clean; used by the token-replace variant.

        Returns:
            fp32 (B, 16, T, h, w).
        """
        stream: tuple[Tensor, ...] | Tensor = (latents, timestep, text, text_length, pooled, guidance, preserved)
        for layer in self.layers():
            stream = layer(stream)
        return stream
