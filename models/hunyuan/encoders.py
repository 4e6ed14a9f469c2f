"""HunyuanVideo-I2V's frozen encoders as released: causal 3D VAE, LLaVA-LLaMA-3 with the image, CLIP-L text.

The classes wrap those of diffusers and transformers. The library modules are imported when an encoder is built:
they are heavy.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError, first_line
from models.checkpoint import Tensors, guess_content, load_into
from models.hunyuan.keys import vae_from_comfyui
from models.hunyuan.single_files import RELEASED_PROCESSOR, is_whole_llava, load_clip_text, load_llava, needs_config
from models.layers import calls_shown

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoImageToVideoPipeline

_log = logging.getLogger(__name__)

SCALING_FACTOR = 0.476986
NORM_GROUPS = 32
VAE_PREFIXES = ("vae.", "first_stage_model.")
_COMFYUI_VAE = "encoder.down.0.block.0.conv1.conv.weight"
TILE = 256
"""Side in pixels of the VAE's tiles, a quarter of it overlapping, as in the original's scripts."""
TILE_STRIDE = TILE * 3 // 4
TEXT_TOKENS = 256
"""Tokens that LLaVA reads behind the template's head: the prompt and the assistant's header."""
PROMPT_TOKENS = TEXT_TOKENS - 4
"""The most of the prompt alone: the header's four are cut out again, and with a longer prompt its last four in their place."""


class HunyuanVAE:
    """HunyuanVideo's causal video VAE: 4 frames to 1 (the first alone), 8x8 pixels to 1, 16 channels.

    Frames larger than 256 pixels are worked on in overlapping tiles, as released: whole frames of 480P would need
    an attention mask of 26 GB. The library's tiling over *time*, which it has on by default and which the original
    does not have, is off: it changes the latents of every clip above 16 frames.
    """

    temporal_factor = 4
    spatial_factor = 8

    def __init__(self, model: AutoencoderKLHunyuanVideo) -> None:
        self.model = model
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.scale: float = model.config.scaling_factor
        model.use_framewise_encoding = model.use_framewise_decoding = False
        model.enable_tiling(
            tile_sample_min_height=TILE, tile_sample_min_width=TILE,
            tile_sample_stride_height=TILE_STRIDE, tile_sample_stride_width=TILE_STRIDE,
        )

    @classmethod
    def load(
        cls, tensors: Tensors, config_json: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> HunyuanVAE:
        """Build the VAE from its weights, in the original names, which are diffusers', or in ComfyUI's.

        Args:
            config_json: the config.json beside the weights, for the number of norm groups and the scaling factor.

        Raises:
            UserError: not the weights of a HunyuanVideo VAE.
        """
        from diffusers import AutoencoderKLHunyuanVideo

        tensors = vae_in_original_names(tensors)
        settings = _vae_settings(tensors, config_json or {})
        with torch.device("meta"):
            model = AutoencoderKLHunyuanVideo(**settings)
        load_into(model, tensors, lambda name, tensor: dtype, device)
        return cls(model.eval())

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode (B, 3, F, H, W) in [-1, 1] to normalised latents (B, 16, (F-1)/4+1, H/8, W/8), float32.

        The mode of the distribution, never a sample.
        """
        with calls_shown(self.model.encoder, _tiles(*video.shape[3:]), "encoding video"):
            return self.model.encode(video.to(self.device, self.dtype)).latent_dist.mode().float() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, 16, T, h, w) to (B, 3, 4(T-1)+1, 8h, 8w), float32, in [-1, 1]."""
        latents = (latents.to(self.device, torch.float32) / self.scale).to(self.dtype)
        height, width = (self.spatial_factor * size for size in latents.shape[3:])
        with calls_shown(self.model.decoder, _tiles(height, width), "decoding video"):
            return self.model.decode(latents).sample.float().clamp(-1, 1)


def _tiles(height: int, width: int) -> int:
    """Calls of encoder or decoder for a video of this size in pixels."""
    return 1 if max(height, width) <= TILE else math.ceil(height / TILE_STRIDE) * math.ceil(width / TILE_STRIDE)


def vae_layout(tensors: Tensors) -> str:
    """Naming scheme of a VAE's file."""
    return "comfyui" if any(name.endswith(_COMFYUI_VAE) for name in tensors) else "original"


def vae_in_original_names(tensors: Tensors) -> Tensors:
    """A VAE's weights without prefix, in the names of the original and of diffusers."""
    layout = vae_layout(tensors)
    tensors = tensors.stripped(*VAE_PREFIXES)
    return vae_from_comfyui(tensors) if layout == "comfyui" else tensors


def _vae_settings(tensors: Tensors, config_json: Mapping[str, Any]) -> dict[str, Any]:
    shapes = tensors.shapes
    first = "encoder.conv_in.conv.weight"
    if first not in shapes or "post_quant_conv.weight" not in shapes:
        raise UserError(
            f"{tensors.where}: not a HunyuanVideo VAE: {first} is missing among {len(tensors)} tensors. Expected the "
            f"content of hunyuan-video-i2v-720p/vae/pytorch_model.pt or hunyuan_video_vae_bf16.safetensors "
            f"(Kijai's or ComfyUI's names). {guess_content(tensors)}"
        )
    levels = sorted({int(m[1]) for name in shapes if (m := re.match(r"encoder\.down_blocks\.(\d{1,3})\.", name))})
    resnets = {int(m[1]) for name in shapes if (m := re.match(r"encoder\.down_blocks\.0\.resnets\.(\d{1,3})\.", name))}
    firsts = [f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight" for i in levels]
    if absent := [name for name in firsts if len(shapes.get(name, ())) != 5]:
        raise UserError(
            f"{tensors.where}: an incomplete HunyuanVideo VAE, {tensors.spell(absent[0])} is missing or misshapen. Download "
            "the file again."
        )
    widths, groups = [shapes[name][0] for name in firsts], config_json.get("norm_num_groups", NORM_GROUPS)
    if not widths or any(width % groups for width in widths):
        raise UserError(
            f"{tensors.where}: channels {widths} with norms of {groups} groups; expected HunyuanVideo's VAE (128, 256, 512, "
            "512 with 32)."
        )
    return {
        "block_out_channels": widths, "layers_per_block": len(resnets),
        "latent_channels": shapes["post_quant_conv.weight"][0],
        "down_block_types": ("HunyuanVideoDownBlock3D",) * len(levels),
        "up_block_types": ("HunyuanVideoUpBlock3D",) * len(levels),
        "norm_num_groups": groups,
        "scaling_factor": config_json.get("scaling_factor", SCALING_FACTOR),
    }


class HunyuanTextEncoder:
    """LLaVA-LLaMA-3 over template, picture and prompt, and CLIP-L's pooled prompt.

    The work is that of diffusers' pipeline, through its public `encode_prompt`.
    """

    def __init__(self, pipeline: HunyuanVideoImageToVideoPipeline, interleave: int) -> None:
        self.pipeline = pipeline
        self.interleave = interleave

    @classmethod
    def load(
        cls, llava: Path, tokenizer: Path, image_processor: Path | None, clip: Path, clip_tokenizer: Path,
        interleave: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16,
        llava_vision: Path | None = None,
    ) -> HunyuanTextEncoder:
        """Load both encoders from folders in transformers' layout or from single files, offline.

        Args:
            image_processor: folder of its configuration; None for the released one.
            llava_vision: the file of LLaVA's vision tower, where `llava` is the language model alone.
            interleave: keep every n-th image token: 2 for latent concat, 4 for token replace.
            dtype: the release runs both in float16.

        Raises:
            UserError: a folder does not hold what it should.
        """
        from diffusers import HunyuanVideoImageToVideoPipeline
        from transformers import (
            CLIPImageProcessorPil,
            CLIPTextModel,
            CLIPTokenizer,
            LlavaForConditionalGeneration,
            PreTrainedTokenizerFast,
        )

        # Reads tokenizer.json verbatim; the Llama class of transformers 5 would rebuild it, wrongly for LLaMA-3.
        words = _offline(PreTrainedTokenizerFast, tokenizer, padding_side="right")
        clip_words = _offline(CLIPTokenizer, clip_tokenizer)
        pipeline = HunyuanVideoImageToVideoPipeline(
            text_encoder=_model(LlavaForConditionalGeneration, llava, device, dtype) if is_whole_llava(llava)
            else load_llava(llava, llava_vision or llava, words, device, dtype),
            tokenizer=words,
            transformer=None, vae=None, scheduler=None,
            text_encoder_2=load_clip_text(clip, clip_words, device, dtype) if needs_config(clip)
            else _model(CLIPTextModel, clip, device, dtype),
            tokenizer_2=clip_words,
            image_processor=_offline(CLIPImageProcessorPil, image_processor) if image_processor
            else CLIPImageProcessorPil(**RELEASED_PROCESSOR),
        )
        _check_template(pipeline, tokenizer)
        _check_clip_tokenizer(pipeline, clip_tokenizer)
        return cls(pipeline, interleave)

    @torch.no_grad()
    def encode(self, prompt: str, image: Tensor) -> dict[str, Tensor]:
        """Text states of a prompt and a picture.

        Args:
            image: (3, H, W) in [-1, 1]; the image processor crops it to its square.

        Returns:
            `text` float32 (L, 4096), valid tokens first, then zeros; `text_length` int64 (), how many are valid;
            `pooled` float32 (768,).
        """
        self._tell_what_is_cut(prompt)
        states, pooled, mask = self.pipeline.encode_prompt(
            image=_picture(image), prompt=prompt, max_sequence_length=TEXT_TOKENS,
            image_embed_interleave=self.interleave,
        )
        valid = states[0][mask[0].bool()].float().cpu()
        text = F.pad(valid, (0, 0, 0, states.shape[1] - len(valid)))
        return {"text": text, "text_length": torch.tensor(len(valid)), "pooled": pooled[0].float().cpu()}

    def _tell_what_is_cut(self, prompt: str) -> None:
        """CLIP's part, of which only the pooled state is used, is told of by the library."""
        count = len(self.pipeline.tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if count > PROMPT_TOKENS:
            _log.warning(
                "The prompt has %d tokens, LLaVA reads %d: the last %d are cut off. It begins: %.60s",
                count, PROMPT_TOKENS, count - PROMPT_TOKENS, prompt,
            )


def _picture(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(((image + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _offline(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder}: cannot be read as {kind.__name__} ({first_line(error)}). Download the folder again."
        ) from error


def _model(kind: Any, folder: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    model, info = _offline(kind, folder, dtype=dtype, output_loading_info=True)
    if info["missing_keys"]:
        some = ", ".join(sorted(info["missing_keys"])[:5])
        raise UserError(
            f"{folder}: {len(info['missing_keys'])} weights of {kind.__name__} are missing ({some}). "
            "Download the folder again."
        )
    return model.to(device).eval().requires_grad_(False)


def _check_template(pipeline: HunyuanVideoImageToVideoPipeline, folder: Path) -> None:
    """The template is cut by position, so a tokenizer that spells it otherwise would yield nonsense in silence."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

    head = TEMPLATE["template"].partition("{}")[0]
    ids = pipeline.tokenizer(head)["input_ids"]
    config = pipeline.text_encoder.config
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    expected = (TEMPLATE["crop_start"], config.image_token_index, TEMPLATE["image_emb_len"])
    found = (len(ids), ids[TEMPLATE["image_emb_start"]], tokens)
    if found != expected:
        raise UserError(
            f"{folder}: not the tokenizer and picture size of LLaVA-LLaMA-3: the template has {found[0]} tokens "
            f"(expected {expected[0]}), the sixth is {found[1]} (expected {expected[1]}, the image), a picture has "
            f"{found[2]} (expected {expected[2]}). Use xtuner/llava-llama-3-8b-v1_1-transformers."
        )


def _check_clip_tokenizer(pipeline: HunyuanVideoImageToVideoPipeline, folder: Path) -> None:
    """In ComfyUI's folders two text encoders lie side by side: the other one's tokenizer would yield nonsense in silence."""
    tokens, vocabulary = len(pipeline.tokenizer_2), pipeline.text_encoder_2.config.vocab_size
    if tokens != vocabulary:
        raise UserError(
            f"{folder}: a tokenizer of {tokens} tokens for a CLIP of {vocabulary}. Expected vocab.json and merges.txt of "
            "openai/clip-vit-large-patch14."
        )
