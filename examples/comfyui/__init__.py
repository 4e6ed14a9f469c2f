"""Nodes for ComfyUI that tell Wan2.1-I2V and HunyuanVideo-I2V what our LoRAs are trained with: source around the edit, mask.

Copy this folder into ComfyUI's `custom_nodes` (docs/comfyui.md). It stands alone: ComfyUI brings torch, and nothing of this
project is imported. A test holds it to the conditioning that training uses.

ComfyUI's tensors: IMAGE is (F, H, W, 3) in [0, 1], MASK is (F, H, W) in [0, 1]. F frames, T latent frames.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CELL, FRAMES_PER_LATENT, SIZE_STEP = 8, 4, 16
GREY = 0.5


def _inputs(**optional: Any) -> dict[str, Any]:
    """What ComfyUI offers as inputs of either node."""
    return {
        "required": {
            "positive": ("CONDITIONING",), "negative": ("CONDITIONING",), "vae": ("VAE",),
            "source": ("IMAGE", {"tooltip": "the frames of the video, 4n+1 of them, sides multiples of 16"}),
            "mask": ("MASK", {"tooltip": "white = edit; one for each frame, or one for all"}),
            "edited_first_frame": ("IMAGE",),
        },
        "optional": {
            **optional,
            "mask_rule": (["all", "nearest"], {"tooltip": "mask_rule of the training run"}),
            "keep_outside": ("BOOLEAN", {"default": True, "tooltip": "keep_outside of the job: of the edited first frame "
                                         "only what lies inside the first mask counts"}),
        },
    }


class _Node:
    """What ComfyUI asks of either node."""

    CATEGORY = "conditioning/video_models"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")
    RETURN_NAMES = ("positive", "negative", "latent")
    FUNCTION = "condition"


class LoraEditCondition(_Node):
    """Wan2.1-I2V conditioned on the edited first frame and on the source outside the mask (paper section 3.3.1)."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _inputs(clip_vision_output=("CLIP_VISION_OUTPUT", {"tooltip": "of the edited first frame"}))

    def condition(
        self, positive: list[Any], negative: list[Any], vae: Any, source: Tensor, mask: Tensor, edited_first_frame: Tensor,
        clip_vision_output: Any = None, mask_rule: str = "all", keep_outside: bool = True,
    ) -> tuple[list[Any], list[Any], dict[str, Tensor]]:
        """Both conditionings with the condition latents and Wan's four mask channels, and an empty latent to start from."""
        known, preserve = known_video(source, mask, edited_first_frame, keep_outside)
        values = {"concat_latent_image": vae.encode(known), "concat_mask": 1 - mask_channels(preserve, mask_rule)}
        if clip_vision_output is not None:
            values["clip_vision_output"] = clip_vision_output
        return _with(positive, values), _with(negative, values), _empty(source)


class LoraEditConditionHunyuan(_Node):
    """HunyuanVideo-I2V's first weights ("v1 (concat)", latent_concat here) conditioned on the same.

    ComfyUI tells the later ones ("v2 (replace)") of a known first frame only, so there is no node for them.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _inputs()

    def condition(
        self, positive: list[Any], negative: list[Any], vae: Any, source: Tensor, mask: Tensor, edited_first_frame: Tensor,
        mask_rule: str = "all", keep_outside: bool = True,
    ) -> tuple[list[Any], list[Any], dict[str, Tensor]]:
        """Both conditionings with the condition latents and the mask channel, and an empty latent to start from.

        Frame 0 is encoded alone: the VAE's norms look at all frames. A latent frame of which nothing is preserved is zero.
        """
        known, preserve = known_video(source, mask, edited_first_frame, keep_outside)
        cells = mask_channels(preserve, mask_rule).amin(1, keepdim=True)
        latents = torch.cat([vae.encode(known[:1]), vae.encode(known)[:, :, 1:]], dim=2)
        latents = latents * cells.amax((3, 4), keepdim=True).to(latents)
        values = {"concat_latent_image": latents, "concat_mask": 1 - cells}
        return _with(positive, values), _with(negative, values), _empty(source)


def known_video(source: Tensor, mask: Tensor, edited_first_frame: Tensor, keep_outside: bool) -> tuple[Tensor, Tensor]:
    """The condition video (F, H, W, 3), grey where nothing is known, and bool (F, H, W), True = preserve."""
    _check(source, mask, edited_first_frame)
    preserve = (mask < GREY).expand(len(source), -1, -1).clone()
    first = edited_first_frame[:1, ..., :3]
    if keep_outside:
        if preserve[0].all():
            raise ValueError("mask: its first frame is all black, so nothing of edited_first_frame would count; expected white "
                             "where it was edited. Is the mask inverted, or keep_outside meant to be false?")
        first = torch.where(preserve[:1, ..., None], source[:1, ..., :3], first)
    preserve[0] = True
    video = torch.cat([first, source[1:, ..., :3]])
    return torch.where(preserve[..., None], video, GREY), preserve


def _empty(source: Tensor) -> dict[str, Tensor]:
    frames, height, width = source.shape[:3]
    return {"samples": torch.zeros(1, 16, 1 + (frames - 1) // FRAMES_PER_LATENT, height // CELL, width // CELL)}


def mask_channels(preserve: Tensor, rule: str) -> Tensor:
    """Bool (F, H, W), True = preserve, as (1, 4, T, H / 8, W / 8): frame 0 four times, then four frames a latent frame."""
    frames, height, width = preserve.shape
    blocks = preserve.reshape(frames, height // CELL, CELL, width // CELL, CELL)
    cells = blocks.all(4).all(2) if rule == "all" else blocks[:, :, 0, :, 0]
    packed = torch.cat([cells[:1].expand(FRAMES_PER_LATENT, -1, -1), cells[1:]]).float()
    return packed.unflatten(0, (-1, FRAMES_PER_LATENT)).transpose(0, 1)[None]


def _check(source: Tensor, mask: Tensor, edited: Tensor) -> None:
    frames, height, width = source.shape[:3]
    if frames % FRAMES_PER_LATENT != 1 or height % SIZE_STEP or width % SIZE_STEP:
        raise ValueError(f"source: {frames} frames of {width}x{height}; expected 4n+1 frames and sides that are multiples of "
                         f"{SIZE_STEP}, as `train.py --dry_run` names them. Cut and resize it.")
    if len(mask) not in (1, frames):
        raise ValueError(f"mask: {len(mask)} frames; expected one for each of the source's {frames}, or one for all.")
    for name, picture in (("mask", mask), ("edited_first_frame", edited)):
        if picture.shape[1:3] != source.shape[1:3]:
            raise ValueError(f"{name}: {picture.shape[2]}x{picture.shape[1]}, expected the source's {width}x{height}.")


def _with(conditioning: list[Any], values: dict[str, Any]) -> list[Any]:
    return [[features, {**options, **values}] for features, options in conditioning]


NODE_CLASS_MAPPINGS = {"LoraEditCondition": LoraEditCondition, "LoraEditConditionHunyuan": LoraEditConditionHunyuan}
NODE_DISPLAY_NAME_MAPPINGS = {
    "LoraEditCondition": "LoRA-Edit condition (Wan2.1 I2V)",
    "LoraEditConditionHunyuan": "LoRA-Edit condition (HunyuanVideo I2V, v1 concat)",
}
