"""Dimensions and variant of a HunyuanVideo-I2V transformer, read from its weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.errors import UserError
from models.checkpoint import Shape, guess_content

Variant = Literal["token_replace", "latent_concat"]
LATENT_CHANNELS = 16
VARIANT_OF_CHANNELS: dict[int, Variant] = {LATENT_CHANNELS: "token_replace", 2 * LATENT_CHANNELS + 1: "latent_concat"}
ROPE_SHARES = (2, 7, 7)
"""How the released model shares a head's channels among time, height and width: (16, 56, 56) of 128."""
SINUSOID_WIDTH = 256
REFINER_MLP_RATIO = 4


_WANTED = "LoRA-Edit needs HunyuanVideo-I2V, with 16 input channels (token replace) or 33 (latent concat)."
_RELATIVES = {
    "clean_x_embedder.": "FramePack", "byt5_in.": "HunyuanVideo 1.5 or HunyuanImage 2.1",
    "cond_type_embedding.": "HunyuanVideo 1.5", "img_in.weight": "a Flux transformer",
}
"""Models with the same blocks, by the names that only they have."""
_CHANNELS_OF_RELATIVES = {32: "SkyReels-V1-I2V", 65: "HunyuanVideo 1.5"}


@dataclass(frozen=True)
class HunyuanConfig:
    """Dimensions of the transformer.

    `in_channels` tells the variant: 16 is `token_replace`, 33 (16 noisy, 16 condition latents, 1 mask) is
    `latent_concat`. `rope_axes` says how many of a head's channels turn with time, height and width.
    """

    dim: int
    num_heads: int
    mlp_dim: int
    num_double: int
    num_single: int
    in_channels: int
    guidance_embed: bool
    rope_axes: tuple[int, int, int]
    out_channels: int = LATENT_CHANNELS
    num_refiner: int = 2
    text_dim: int = 4096
    pooled_dim: int = 768
    patch_size: tuple[int, int, int] = (1, 2, 2)

    @property
    def variant(self) -> Variant:
        return VARIANT_OF_CHANNELS[self.in_channels]

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def image_interleave(self) -> int:
        """Every how many-th image token of LLaVA the text states keep (upstream `hyvideo/inference.py`)."""
        return 2 if self.variant == "latent_concat" else 4

    @classmethod
    def i2v_13b(cls, variant: Variant) -> HunyuanConfig:
        """The released models: 20 double and 40 single blocks, 3072 wide."""
        channels = {name: count for count, name in VARIANT_OF_CHANNELS.items()}[variant]
        return cls(
            dim=3072, num_heads=24, mlp_dim=12288, num_double=20, num_single=40, in_channels=channels,
            guidance_embed=variant == "token_replace", rope_axes=(16, 56, 56),
        )

    @classmethod
    def from_shapes(
        cls, shapes: Mapping[str, Shape], config_json: Mapping[str, Any] | None = None, where: object = "checkpoint",
        spell: Callable[[str], str] = lambda name: name,
    ) -> HunyuanConfig:
        """Read everything from tensor shapes (original names), but the split of the rotary axes.

        Args:
            shapes: name to shape, without prefixes.
            config_json: diffusers' config.json, for `rope_axes_dim`; without one: the released proportion.
            where: the file or folder to name in messages.
            spell: an original name as the user's file has it, for messages.

        Raises:
            UserError: not a HunyuanVideo-I2V transformer, or an incomplete one.
        """
        _require_i2v(shapes, where, spell)
        try:
            patch = shapes["img_in.proj.weight"]
            dim, head = patch[0], shapes["double_blocks.0.img_attn_q_norm.weight"][0]
            config = cls(
                dim=dim, num_heads=dim // head, in_channels=patch[1], patch_size=(patch[2], patch[3], patch[4]),
                mlp_dim=shapes["double_blocks.0.img_mlp.fc1.weight"][0],
                num_double=_count(shapes, "double_blocks"),
                num_single=_count(shapes, "single_blocks"),
                num_refiner=_count(shapes, "txt_in.individual_token_refiner.blocks"),
                guidance_embed="guidance_in.mlp.0.weight" in shapes,
                rope_axes=tuple((config_json or {}).get("rope_axes_dim") or rope_axes(head)),
                out_channels=shapes["final_layer.linear.weight"][0] // math.prod(patch[2:]),
                text_dim=shapes["txt_in.input_embedder.weight"][1],
                pooled_dim=shapes["vector_in.in_layer.weight"][1],
            )
        except (KeyError, ValueError, TypeError, IndexError, ZeroDivisionError) as error:
            what = spell(error.args[0]) if isinstance(error, KeyError) else "a tensor that tells its dimensions"
            raise UserError(
                f"{where}: an incomplete HunyuanVideo transformer, {what} is missing or misshapen among "
                f"{len(shapes)} tensors. Download the checkpoint again."
            ) from error
        if config.dim % head or sum(config.rope_axes) != head or any(axis % 2 for axis in config.rope_axes):
            raise UserError(
                f"{where}: heads of {head} channels in a width of {dim}; expected the released model's heads of 128, "
                "or another multiple of 16 that divides the width."
            )
        return config


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, height and width, in the released model's proportion.

    Time gets an eighth, rounded down to an even number of at least 2; the rest is halved (even numbers).
    """
    side = head_dim * ROPE_SHARES[1] // sum(ROPE_SHARES) // 2 * 2
    return head_dim - 2 * side, side, side


def _require_i2v(shapes: Mapping[str, Shape], where: object, spell: Callable[[str], str]) -> None:
    for mark, relative in _RELATIVES.items():
        if any(name.startswith(mark) for name in shapes):
            raise UserError(f"{where}: this is {relative} ({spell(mark)}... is there). {_WANTED}")
    patch = shapes.get("img_in.proj.weight")
    if patch is None or len(patch) != 5:
        some = ", ".join(spell(name) for name in list(shapes)[:5]) or "none"
        raise UserError(
            f"{where}: no HunyuanVideo transformer: looked for img_in.proj.weight (official, Kijai's or ComfyUI's names) "
            f"and x_embedder.proj.weight (diffusers' names) with 5 axes; found {len(shapes)} tensors: {some}. {_WANTED} "
            f"{guess_content(shapes)}"
        )
    if patch[1] not in VARIANT_OF_CHANNELS:
        cause = f" This is {_CHANNELS_OF_RELATIVES[patch[1]]}." if patch[1] in _CHANNELS_OF_RELATIVES else ""
        raise UserError(f"{where}: this HunyuanVideo transformer has {patch[1]} input channels.{cause} {_WANTED}")


def _count(shapes: Mapping[str, Shape], blocks: str) -> int:
    """How many different indices follow `blocks` in the names; gaps come out in the key check.

    Raises:
        KeyError: none.
    """
    pattern = re.compile(rf"{re.escape(blocks)}\.(\d+)\.")
    found = {match[1] for name in shapes if (match := pattern.match(name))}
    if not found:
        raise KeyError(f"{blocks}.0")
    return len(found)
