"""Dimensions of a Wan-I2V transformer, read from its weights and its config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import UserError
from models.checkpoint import Shape, guess_content

Expert = Literal["high", "low"]
"""Which of Wan2.2's two transformers: the one for high noise or the one for low."""

_HEAD_DIM = 128  # of every released Wan2.1 transformer
_I2V_CHANNELS = 36
BOUNDARY = 0.9
"""Noise level at and above which Wan2.2-I2V-A14B's expert for high noise is used (`boundary` of the release)."""
_MAX_LAYERS = 1000  # no model has more; a file that claims so is damaged
_ORIGINAL_FIELDS = (
    "dim", "eps", "ffn_dim", "freq_dim", "in_dim", "model_type", "num_heads", "num_layers", "out_dim",
    "text_len",
)
_DIFFUSERS_FIELDS = {
    "num_attention_heads": "num_heads", "in_channels": "in_dim", "out_channels": "out_dim",
    "ffn_dim": "ffn_dim", "num_layers": "num_layers", "freq_dim": "freq_dim", "text_dim": "text_dim",
    "image_dim": "image_dim", "eps": "eps",
}
_FROM_JSON = ("num_heads", "eps", "text_len")


@dataclass(frozen=True)
class WanConfig:
    """Constructor values of the transformer, named as in the original config.json.

    Wan2.2's is Wan2.1's without the image branch: `image_dim` is None.

    `in_dim` counts 16 noisy latent, 4 mask and 16 condition latent channels; `patch_size` is (frames,
    height, width) in latent cells.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 36
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    image_dim: int | None = 1280
    eps: float = 1e-6
    patch_size: tuple[int, int, int] = (1, 2, 2)
    model_type: str = "i2v"

    @property
    def reads_image(self) -> bool:
        """Whether there is an image branch."""
        return self.image_dim is not None

    @property
    def variant(self) -> str:
        return f"wan2.{1 if self.reads_image else 2}-{self.model_type}"

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @classmethod
    def i2v_14b(cls) -> WanConfig:
        """Wan2.1-I2V-14B, 480P and 720P alike."""
        return cls(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

    @classmethod
    def from_tensors(
        cls, shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None = None,
        where: object = "checkpoint",
    ) -> WanConfig:
        """Read the dimensions from tensor shapes (original names), the rest from a config.json.

        Args:
            shapes: name to shape, without prefixes.
            config_json: the original's or diffusers' config.json; without one: head size 128, eps 1e-6, 512
                tokens.
            where: the file or folder to name in messages.

        Raises:
            UserError: not the transformer of Wan2.1-I2V or Wan2.2-I2V-A14B, or the config.json contradicts the weights.
        """
        _require_i2v(shapes, where)
        given = _original_fields(config_json or {})
        sizes = _sizes(shapes, where)
        for field, size in sizes.items():
            if field in given and field != "patch_size" and given[field] != size:
                raise UserError(
                    f"{where}: the weights have {field} = {size}, the config.json says {given[field]!r}. Use "
                    "the config.json that came with these weights."
                )
        rest = {field: given[field] for field in _FROM_JSON if given.get(field) is not None}
        rest.setdefault("num_heads", sizes["dim"] // _HEAD_DIM)
        config = cls(**sizes, **rest)
        _require_valid(config, where)
        return config

    def original_json(self) -> dict[str, Any]:
        """The fields of the released config.json."""
        fields = {name: getattr(self, name) for name in _ORIGINAL_FIELDS}
        return {"_class_name": "WanModel", "_diffusers_version": "0.30.0"} | fields

    def diffusers_json(self) -> dict[str, Any]:
        """The fields of diffusers' transformer/config.json."""
        fields = {theirs: getattr(self, ours) for theirs, ours in _DIFFUSERS_FIELDS.items()}
        return fields | {
            "_class_name": "WanTransformer3DModel", "attention_head_dim": self.head_dim,
            "patch_size": [*self.patch_size], "added_kv_proj_dim": self.dim if self.reads_image else None,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024, "pos_embed_seq_len": None,
        }


def _require_i2v(shapes: Mapping[str, Shape], where: object) -> None:
    patch = shapes.get("patch_embedding.weight")
    if patch is None or len(patch) != 5:
        some = ", ".join(list(shapes)[:5]) or "none"
        raise UserError(
            f"{where}: no Wan transformer: patch_embedding.weight is missing among {len(shapes)} tensors "
            f"({some}). Expected the weights of Wan2.1-I2V or Wan2.2-I2V-A14B. {guess_content(shapes)}"
        )
    if patch[1] == 16:
        raise UserError(
            f"{where}: this is Wan2.1-T2V: 16 input channels; LoRA-Edit needs an I2V checkpoint with 36."
        )
    if patch[1] != _I2V_CHANNELS:
        raise UserError(
            f"{where}: this Wan transformer has {patch[1]} input channels; LoRA-Edit needs an I2V checkpoint "
            "with 36."
        )
    if "img_emb.emb_pos" in shapes:
        raise UserError(
            f"{where}: this is Wan2.1-FLF2V (first and last frame); LoRA-Edit needs a Wan2.1-I2V checkpoint."
        )


def has_image_branch(names: Iterable[str]) -> bool:
    """Whether parameters of these original names read image features, as Wan2.1's do and Wan2.2's do not."""
    return any(part in name for name in names for part in ("img_emb.", ".k_img."))


def _original_fields(config_json: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of either layout in the original's field names; absent and null fields are left out."""
    if "num_attention_heads" not in config_json:
        return {key: value for key, value in config_json.items() if value is not None}
    fields = {ours: config_json.get(theirs) for theirs, ours in _DIFFUSERS_FIELDS.items()}
    head_dim = config_json.get("attention_head_dim")
    fields["dim"] = head_dim * config_json["num_attention_heads"] if head_dim else None
    return {key: value for key, value in fields.items() if value is not None}


def _sizes(shapes: Mapping[str, Shape], where: object) -> dict[str, Any]:
    patch = shapes["patch_embedding.weight"]
    blocks = {int(match[1]) for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    last = min(max(blocks, default=0), _MAX_LAYERS)
    if absent := [str(index) for index in range(last + 1) if index not in blocks]:
        listed = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
        raise UserError(
            f"{where}: an incomplete Wan transformer, blocks {listed} are missing. A shard may be missing: download "
            "the checkpoint again."
        )
    try:
        return {
            "dim": patch[0], "in_dim": patch[1], "patch_size": tuple(patch[2:]),
            "ffn_dim": shapes["blocks.0.ffn.0.weight"][0], "num_layers": max(blocks) + 1,
            "out_dim": shapes["head.head.weight"][0] // math.prod(patch[2:]),
            "freq_dim": shapes["time_embedding.0.weight"][1],
            "text_dim": shapes["text_embedding.0.weight"][1],
            "image_dim": shapes["img_emb.proj.0.weight"][0] if has_image_branch(shapes) else None,
        }
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{where}: an incomplete Wan transformer, {error} is missing or misshapen among {len(shapes)} "
            "tensors. A shard may be missing: download the checkpoint again."
        ) from error


def _require_valid(config: WanConfig, where: object) -> None:
    heads = config.num_heads
    if not isinstance(config.text_len, int) or config.text_len < 1 or not isinstance(config.eps, float):
        raise UserError(
            f"{where}: the config.json has text_len = {config.text_len!r}, eps = {config.eps!r}; expected a "
            "positive whole number and a small fraction."
        )
    if not isinstance(heads, int) or heads < 1 or config.dim % heads or config.head_dim % 2:
        raise UserError(
            f"{where}: {heads!r} heads do not divide dim {config.dim} into even parts. Put the config.json "
            "that came with the weights beside them."
        )


def transformer_shapes(config: WanConfig) -> dict[str, Shape]:
    """Names and shapes of all tensors of a Wan-I2V transformer, in the original names."""
    d, image = config.dim, config.image_dim
    shapes: dict[str, Shape] = {
        "patch_embedding.weight": (d, config.in_dim, *config.patch_size), "patch_embedding.bias": (d,)
    }
    shapes |= _linear("text_embedding.0", d, config.text_dim) | _linear("text_embedding.2", d, d)
    shapes |= _linear("time_embedding.0", d, config.freq_dim) | _linear("time_embedding.2", d, d)
    shapes |= _linear("time_projection.1", 6 * d, d)
    for index in range(config.num_layers):
        shapes |= {f"blocks.{index}.{name}": shape for name, shape in _block_shapes(config).items()}
    shapes |= {"head.modulation": (1, 2, d)}
    shapes |= _linear("head.head", config.out_dim * math.prod(config.patch_size), d)
    if image is None:
        return shapes
    shapes |= _norm("img_emb.proj.0", image) | _linear("img_emb.proj.1", image, image)
    return shapes | _linear("img_emb.proj.3", d, image) | _norm("img_emb.proj.4", d)


def _block_shapes(config: WanConfig) -> dict[str, Shape]:
    d = config.dim
    shapes: dict[str, Shape] = {"modulation": (1, 6, d)}
    image = ("k_img", "v_img") if config.reads_image else ()
    for attention, names in (("self_attn", "qkvo"), ("cross_attn", (*"qkvo", *image))):
        for name in names:
            shapes |= _linear(f"{attention}.{name}", d, d)
        shapes |= {f"{attention}.norm_q.weight": (d,), f"{attention}.norm_k.weight": (d,)}
    shapes |= {f"cross_attn.norm_{name}.weight": (d,) for name in image[:1]}
    shapes |= _norm("norm3", d)
    return shapes | _linear("ffn.0", config.ffn_dim, d) | _linear("ffn.2", d, config.ffn_dim)


def _linear(name: str, out_features: int, in_features: int) -> dict[str, Shape]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _norm(name: str, features: int) -> dict[str, Shape]:
    return {f"{name}.weight": (features,), f"{name}.bias": (features,)}
