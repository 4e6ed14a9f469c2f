"""Wan2.1's frozen encoders as released: video VAE, UMT5 text encoder, CLIP vision tower.

The classes wrap those of diffusers and transformers; dimensions come from the weights, whatever the layout.
The library modules are imported when an encoder is built: they are heavy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from models.checkpoint import Entry, Tensors, guess_content, load_into
from models.layers import calls_shown
from models.scaled_fp8 import dequantised
from models.wan.keys import IMAGE_ENCODER, TEXT_ENCODER, vae_keys, vae_structure
from models.wan.tokenizer import EMBEDDED, WanTokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection, UMT5EncoderModel

LATENTS_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
                0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
LATENTS_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
               3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
VAE_PREFIXES = ("first_stage_model.", "model.", "vae.")
STATISTICS = ("latents_mean", "latents_std")
WHOLE_CLIP = 2**28
"""Bytes of the widest activation up to which the VAE takes a clip in one piece; longer ones go through 4 frames at a time."""
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP_HEAD_DIM = 80  # ViT-H/14: 1280 wide, 16 heads


class WanVAE:
    """Wan2.1's causal video VAE: 4 frames to 1 (the first alone), 8x8 pixels to 1, 16 channels.

    Not re-entrant: the library keeps the causal cache on the module, so one call at a time per instance.
    """

    temporal_factor = 4
    spatial_factor = 8

    def __init__(self, model: AutoencoderKLWan, mean: Tensor, std: Tensor) -> None:
        self.model = model
        self.device, self.dtype = _placement(model)
        self.mean = mean.to(self.device, torch.float32).view(1, -1, 1, 1, 1)
        self.std = std.to(self.device, torch.float32).view(1, -1, 1, 1, 1)

    @classmethod
    def load(
        cls, tensors: Tensors, config_json: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32,
    ) -> WanVAE:
        """Build the VAE from its weights, in the original names or diffusers'.

        The normalisation statistics are, first found first used: two optional tensors `latents_mean` and
        `latents_std` (16,) beside the weights, the fields of that name in a diffusers config.json, those of
        Wan2.1.

        Raises:
            UserError: not the weights of a Wan2.1 VAE.
        """
        from diffusers import AutoencoderKLWan

        tensors = tensors.stripped(*VAE_PREFIXES)
        mean, std = _latent_statistics(tensors, config_json or {})
        tensors, settings = _vae_in_library_names(tensors.filtered(lambda name: name not in STATISTICS))
        if len(mean) != settings["z_dim"] or len(std) != settings["z_dim"]:
            raise UserError(
                f"{tensors.where}: the VAE has {settings['z_dim']} latent channels, its statistics "
                f"{len(mean)}; expected Wan2.1's VAE with 16."
            )
        with torch.device("meta"):
            model = AutoencoderKLWan(**settings)
        load_into(model, tensors, lambda name, tensor: dtype, device)
        return cls(model.eval(), mean, std)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Encode (B, 3, F, H, W) in [-1, 1] to normalised latents (B, 16, (F-1)/4+1, H/8, W/8), float32.

        The mode of the distribution, never a sample. F must be 4n+1 (the library would drop the rest).
        """
        frames, height, width = video.shape[2:]
        if frames % self.temporal_factor != 1 or height % self.spatial_factor or width % self.spatial_factor:
            raise UserError(
                f"a video of {frames} frames, {width}x{height}, does not fit Wan's latent grid: frames must "
                "be 4n+1, width and height multiples of 8."
            )
        video = video.to(self.device, self.dtype)
        if self._fits(len(video) * frames * height * width):
            from models.wan import whole_clip

            latents, _ = whole_clip.encode_moments(self.model, video)
        else:
            with calls_shown(self.model.encoder, 1 + frames // self.temporal_factor, "encoding video"):
                latents = self.model.encode(video).latent_dist.mode()
        return (latents.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode normalised latents (B, 16, T, h, w) to (B, 3, 4(T-1)+1, 8h, 8w), float32, in [-1, 1]."""
        latents = (latents.to(self.device, torch.float32) * self.std + self.mean).to(self.dtype)
        batch, _, frames, height, width = latents.shape
        if self._fits(batch * (self.temporal_factor * (frames - 1) + 1) * height * width * self.spatial_factor**2):
            from models.wan import whole_clip

            return whole_clip.decode(self.model, latents).float().clamp(-1, 1)
        with calls_shown(self.model.decoder, frames, "decoding video"):
            return self.model.decode(latents).sample.float()

    def _fits(self, pixels: int) -> bool:
        """Whether a video of so many pixels is short enough to go through in one piece."""
        return pixels * self.model.config.base_dim * self.dtype.itemsize <= WHOLE_CLIP


def _latent_statistics(tensors: Tensors, config_json: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    values = []
    for name, released in zip(STATISTICS, (LATENTS_MEAN, LATENTS_STD), strict=True):
        value = tensors[name] if name in tensors else config_json.get(name) or released
        values.append(torch.as_tensor(value, dtype=torch.float32).flatten())
    return values[0], values[1]


def _vae_in_library_names(tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """The weights in diffusers' names, and the constructor values that fit them."""
    original = "encoder.downsamples.0.residual.2.weight" in tensors
    if not original and "encoder.down_blocks.0.conv1.weight" not in tensors:
        raise UserError(
            f"{tensors.where}: not a Wan2.1 VAE: encoder.downsamples.0.residual.2.weight is missing among "
            f"{len(tensors)} tensors. Expected the content of Wan2.1_VAE.pth. {guess_content(tensors)}"
        )
    resamplers, blocks = vae_structure(tensors)
    if len(resamplers) != 3 or not 0 < blocks < 16:
        raise UserError(
            f"{tensors.where}: the VAE halves space {len(resamplers)} times, after {blocks} blocks each; expected "
            "Wan2.1's VAE: 3 times, after 2."
        )
    keys = vae_keys(len(resamplers) + 1, blocks)
    if original:
        tensors = tensors.renamed(keys.to_right, keys.to_left)
    return tensors, _vae_settings(tensors, resamplers, blocks)


def _vae_settings(tensors: Tensors, resamplers: list[int], blocks: int) -> dict[str, Any]:
    shapes = tensors.shapes
    temporal = [f"encoder.down_blocks.{index}.time_conv.weight" in shapes for index in resamplers]
    if sum(temporal) != 2:
        raise UserError(f"{tensors.where}: the VAE halves time {sum(temporal)} times; expected Wan2.1's: 2 times.")
    try:
        base = shapes["encoder.conv_in.weight"][0]
        firsts = [level * (blocks + 1) for level in range(len(resamplers) + 1)]
        widths = [shapes[f"encoder.down_blocks.{first}.conv1.weight"][0] for first in firsts]
        return {
            "base_dim": base, "decoder_base_dim": shapes["decoder.norm_out.gamma"][0],
            "z_dim": shapes["post_quant_conv.weight"][0], "dim_mult": [width // base for width in widths],
            "num_res_blocks": blocks, "attn_scales": [], "temperal_downsample": temporal,
        }
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{tensors.where}: an incomplete Wan VAE, {tensors.spell(str(error.args[0]))} is missing. "
            "Download the file again."
        ) from error


class WanTextEncoder:
    """umT5-XXL's encoder with Wan's tokenization; one prompt at a time, no padding."""

    def __init__(self, model: UMT5EncoderModel, tokenizer: WanTokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.device, self.dtype = _placement(model)

    @classmethod
    def load(
        cls, tensors: Tensors, tokenizer: WanTokenizer, config_json: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16,
    ) -> WanTextEncoder:
        """Build the encoder from its weights, in the original names or transformers'.

        Raises:
            UserError: not the weights of a UMT5 encoder.
        """
        from transformers import UMT5Config, UMT5EncoderModel

        tensors = _text_encoder_in_library_names(dequantised(tensors))
        config = UMT5Config(**_text_encoder_settings(tensors, config_json or {}))
        with torch.device("meta"):
            model = UMT5EncoderModel(config)
        model.encoder.embed_tokens = model.shared  # the library ties only what it loads itself
        load_into(model, tensors, lambda name, tensor: dtype, device)
        return cls(model.eval(), tokenizer)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Features of a prompt's tokens, end token last: (n_tokens, text_dim), float32."""
        return self.embed(self.tokenizer(prompt))

    @torch.no_grad()
    def embed(self, ids: list[int]) -> Tensor:
        """Features of token ids: (len(ids), text_dim), float32."""
        tokens = torch.tensor([ids], device=self.device)
        if int(tokens.max()) >= self.model.config.vocab_size:
            raise UserError(
                f"{self.tokenizer.folder}: token id {int(tokens.max())} is beyond the text encoder's "
                f"vocabulary of {self.model.config.vocab_size}; use the tokenizer that came with the encoder."
            )
        return self.model(input_ids=tokens).last_hidden_state[0].float()


def _text_encoder_in_library_names(tensors: Tensors) -> Tensors:
    tensors = tensors.filtered(lambda name: name != EMBEDDED)
    if "token_embedding.weight" in tensors:
        return tensors.renamed(TEXT_ENCODER.to_right, TEXT_ENCODER.to_left)
    if "shared.weight" in tensors:
        return tensors.filtered(lambda name: name != "encoder.embed_tokens.weight")
    return tensors.renamed(
        lambda name: "shared.weight" if name == "encoder.embed_tokens.weight" else name,
        lambda name: "encoder.embed_tokens.weight" if name == "shared.weight" else name,
    )


def _text_encoder_settings(tensors: Tensors, config_json: Mapping[str, Any]) -> dict[str, Any]:
    layer = "encoder.block.0.layer"
    shapes = tensors.shapes
    try:
        vocabulary, width = shapes["shared.weight"]
        buckets, heads = shapes[f"{layer}.0.SelfAttention.relative_attention_bias.weight"]
        inner = shapes[f"{layer}.0.SelfAttention.q.weight"][0]
        feed_forward = shapes[f"{layer}.1.DenseReluDense.wi_0.weight"][0]
        per_head = inner // heads
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{tensors.where}: not a UMT5 encoder: {tensors.spell(str(error.args[0]))} is missing among "
            f"{len(tensors)} tensors. Expected the content of models_t5_umt5-xxl-enc-bf16.pth. "
            f"{guess_content(tensors)}"
        ) from error
    return {
        "vocab_size": vocabulary, "d_model": width, "d_kv": per_head, "d_ff": feed_forward,
        "num_heads": heads,
        "num_layers": _count(tensors, r"encoder\.block\.(\d+)\."), "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": config_json.get("relative_attention_max_distance", 128),
        "layer_norm_epsilon": config_json.get("layer_norm_epsilon", 1e-6),
        "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0, "tie_word_embeddings": True,
    }


class WanImageEncoder:
    """CLIP ViT-H/14's vision tower without its last block, class token first, as Wan reads it."""

    def __init__(self, model: CLIPVisionModel) -> None:
        self.model = model
        self.device, self.dtype = _placement(model)
        self.image_size: int = model.config.image_size

    @classmethod
    def load(
        cls, tensors: Tensors, config_json: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, num_heads: int | None = None,
    ) -> WanImageEncoder:
        """Build the tower from its weights, in original or transformers names; the textual half is not read.

        Args:
            config_json: of a transformers folder; gives heads, activation and eps. Without one: heads 80
                wide, exact GELU, 1e-5, as in the original file.
            num_heads: overrides both.

        Raises:
            UserError: not the weights of a CLIP vision tower.
        """
        from transformers import CLIPVisionConfig, CLIPVisionModel

        tensors = _image_encoder_in_library_names(dequantised(tensors))
        settings = _image_encoder_settings(tensors, config_json or {}, num_heads)
        layers = _count(tensors, r"encoder\.layers\.(\d+)\.")
        tensors = tensors.filtered(lambda name: not name.startswith(f"encoder.layers.{layers - 1}."))
        with torch.device("meta"):
            model = CLIPVisionModel(CLIPVisionConfig(**settings, num_hidden_layers=layers - 1))
        load_into(model, tensors, lambda name, tensor: dtype, device)
        tokens = model.embeddings.num_positions
        model.embeddings.position_ids = torch.arange(tokens, device=device).unsqueeze(0)  # not in any file
        return cls(model.eval())

    def preprocess(self, image: Tensor) -> Tensor:
        """(3, H, W) in [-1, 1] to (1, 3, S, S), the tower's input, float32.

        The original's rule (upstream `wan/modules/clip.py`): bicubic, straight to the square, no
        antialiasing. Aspect is squashed and nothing is cropped.
        """
        size = (self.image_size, self.image_size)
        pixels = image.to(self.device, torch.float32).unsqueeze(0)
        pixels = F.interpolate(pixels, size, mode="bicubic", align_corners=False) * 0.5 + 0.5
        mean, std = (pixels.new_tensor(values).view(1, 3, 1, 1) for values in (_CLIP_MEAN, _CLIP_STD))
        return (pixels - mean) / std

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Features (tokens, width), float32, of an image (3, H, W) in [-1, 1]."""
        pixels = self.preprocess(image).to(self.dtype)
        return self.model(pixel_values=pixels).last_hidden_state[0].float()


def load_clip_image_model(
    tensors: Tensors, device: torch.device | str = "cpu", num_heads: int | None = None
) -> CLIPVisionModelWithProjection:
    """The whole tower with CLIP's projection, float32: what it was before Wan took its last block but one.

    The released file holds both, because upstream's module has them and loads it strictly (`wan/modules/clip.py`).

    Args:
        tensors: in original names, or transformers' with `visual_projection.weight`.
        num_heads: default: heads 80 wide.

    Raises:
        UserError: not the weights of a CLIP vision tower, or without its projection.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tensors = dequantised(tensors)
    head = next((entry for name, entry in tensors.entries.items() if name in ("visual.head", "head")), None)
    tower = _image_encoder_in_library_names(tensors)
    if head is not None:
        projection = head.derived(head.shape[::-1], head.dtype, torch.t)
    elif "visual_projection.weight" in tensors:
        projection = tensors.entries["visual_projection.weight"]
    else:
        raise UserError(f"{tensors.where}: no CLIP vision tower, or one without its projection (`visual.head`), which the CLIP "
                        "metrics need. Give the original models_clip file, or a CLIP folder.")
    settings = _image_encoder_settings(tower, {}, num_heads)
    layers = _count(tower, r"encoder\.layers\.(\d+)\.")
    config = CLIPVisionConfig(**settings, num_hidden_layers=layers, projection_dim=projection.shape[0])
    with torch.device("meta"):
        model = CLIPVisionModelWithProjection(config)
    entries = {f"vision_model.{name}": entry for name, entry in tower.entries.items()}
    whole = Tensors(entries | {"visual_projection.weight": projection}, tensors.where, tower.spell)
    load_into(model, whole, lambda name, tensor: torch.float32, device)
    embeddings = model.vision_model.embeddings
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).unsqueeze(0)  # not in any file
    return model.eval()


def _image_encoder_in_library_names(tensors: Tensors) -> Tensors:
    if any(name.startswith("visual.") for name in tensors):
        tensors = tensors.under("visual.")
    if "cls_embedding" in tensors:
        tensors = tensors.filtered(lambda name: name != "head")
        tensors = tensors.renamed(IMAGE_ENCODER.to_right, IMAGE_ENCODER.to_left)
        return Tensors(dict(_unfused(tensors)), tensors.where, tensors.spell)
    tensors = tensors.stripped("vision_model.")
    return tensors.filtered(lambda name: not name.endswith(("visual_projection.weight", "position_ids")))


def _unfused(tensors: Tensors) -> list[tuple[str, Entry]]:
    """Entries with to_qkv as three projections, and the embeddings without the original's leading ones."""
    entries: list[tuple[str, Entry]] = []
    for name, entry in tensors.entries.items():
        if ".qkv_proj." in name:
            shape = (entry.shape[0] // 3, *entry.shape[1:])
            for index, part in enumerate("qkv"):
                piece = entry.derived(shape, entry.dtype, lambda tensor, i=index: tensor.chunk(3)[i])
                entries.append((name.replace("qkv_proj", f"{part}_proj"), piece))
        elif name in ("embeddings.class_embedding", "embeddings.position_embedding.weight"):
            shape = entry.shape[2:] if name.endswith("class_embedding") else entry.shape[1:]
            flat = entry.derived(shape, entry.dtype, lambda tensor, to=shape: tensor.reshape(to))
            entries.append((name, flat))
        else:
            entries.append((name, entry))
    return entries


def _image_encoder_settings(
    tensors: Tensors, config_json: Mapping[str, Any], num_heads: int | None
) -> dict[str, Any]:
    shapes = tensors.shapes
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        tokens = shapes["embeddings.position_embedding.weight"][0]
        feed_forward = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"{tensors.where}: not a CLIP vision tower: {error} among {len(tensors)} tensors. Expected the "
            "visual part of models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth. "
            f"{guess_content(tensors)}"
        ) from error
    heads = num_heads or config_json.get("num_attention_heads") or max(1, width // _CLIP_HEAD_DIM)
    if width % heads:
        raise UserError(f"{tensors.where}: {heads} heads do not divide the width {width} of the tower.")
    return {
        "hidden_size": width, "intermediate_size": feed_forward, "num_attention_heads": heads,
        "patch_size": patch,
        "image_size": round((tokens - 1) ** 0.5) * patch, "hidden_act": config_json.get("hidden_act", "gelu"),
        "layer_norm_eps": config_json.get("layer_norm_eps", 1e-5),
    }


def _count(tensors: Tensors, pattern: str) -> int:
    """How many different indices `pattern` captures in the names; gaps come out in the key check."""
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype
