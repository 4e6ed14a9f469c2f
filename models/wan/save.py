"""Writes complete Wan-I2V checkpoints: the original release's layout, or a diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.files import write_atomic, write_json_atomic
from models.parts import TRANSFORMER_STEM
from models.wan.checkpoint import (
    EXPERT_FOLDERS,
    IMAGE_ENCODER_FILE,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    to_diffusers,
)
from models.wan.config import WanConfig
from models.wan.encoders import STATISTICS
from models.wan.keys import IMAGE_ENCODER, TEXT_ENCODER, vae_keys, vae_structure

State = dict[str, Tensor]
Layout = Literal["original", "diffusers"]


@dataclass(frozen=True)
class WanWeights:
    """The weights of all parts, each in the original names; of Wan2.2 there is no image encoder and a second transformer.

    `image_encoder` is the vision tower without the prefix `visual.`; `vae` may hold `latents_mean` and
    `latents_std` where the statistics are not Wan2.1's; `tokenizer` is one of the tokenizers library.
    """

    config: WanConfig
    transformer: State
    text_encoder: State
    vae: State
    tokenizer: Any
    image_encoder: State | None = None
    image_heads: int = 1
    low_noise: State | None = None
    """Wan2.2's expert for low noise; `transformer` is then the one for high noise."""


def write_checkpoint(folder: Path, weights: WanWeights, layout: Layout = "original", shards: int = 2) -> None:
    """Write a checkpoint folder; `shards` files hold the transformer in the original layout."""
    if layout == "original":
        _write_original(folder, weights, shards)
        write_tokenizer(folder / TOKENIZER_FOLDER, weights.tokenizer)
    else:
        _write_diffusers(folder, weights)
        write_tokenizer(folder / "tokenizer", weights.tokenizer)


def write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """The tokenizer files of google/umt5-xxl, from one of the tokenizers library with its special ids."""
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_atomic(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    write_json_atomic(folder / "special_tokens_map.json", tokens)
    write_json_atomic(folder / "tokenizer_config.json", tokens | {"tokenizer_class": "T5Tokenizer"})


def _write_original(folder: Path, weights: WanWeights, shards: int) -> None:
    for name, state in _transformers(weights, "original").items():
        write_json_atomic(folder / name / "config.json", weights.config.original_json())
        _write_shards(folder / name, state, shards)
    _save_torch(folder / TEXT_ENCODER_FILE, weights.text_encoder)
    _save_torch(folder / VAE_FILE, weights.vae)
    if weights.image_encoder is None:
        return
    visual = {f"visual.{name}": value for name, value in weights.image_encoder.items()}
    textual = {"log_scale": torch.tensor(2.66), "textual.token_embedding.weight": torch.zeros(8, 4)}
    _save_torch(folder / IMAGE_ENCODER_FILE, visual | textual)


def _transformers(weights: WanWeights, layout: Layout) -> dict[str, State]:
    """The transformer's weights, or those of both experts, by folder."""
    number = 0 if layout == "original" else 1
    if weights.low_noise is None:
        return {(".", "transformer")[number]: weights.transformer}
    return {EXPERT_FOLDERS["high"][number]: weights.transformer, EXPERT_FOLDERS["low"][number]: weights.low_noise}


def _write_shards(folder: Path, state: State, shards: int) -> None:
    """Shards of about the same size, and the index that says which tensor lies where."""
    total = sum(value.nbytes for value in state.values())
    parts: dict[str, State] = {}
    written = 0
    for name, value in state.items():
        number = 1 + written * shards // total
        parts.setdefault(f"{TRANSFORMER_STEM}-{number:05d}-of-{shards:05d}.safetensors", {})[name] = value
        written += value.nbytes
    for file, part in parts.items():
        _save_safetensors(folder / file, part)
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json_atomic(folder / f"{TRANSFORMER_STEM}.safetensors.index.json", index)


def _write_diffusers(folder: Path, weights: WanWeights) -> None:
    transformers = _transformers(weights, "diffusers")
    for name, state in transformers.items():
        renamed = {to_diffusers(key): value for key, value in state.items()}
        _write_part(folder / name, TRANSFORMER_STEM, renamed, weights.config.diffusers_json())
    vae, vae_json = _vae_for_diffusers(weights.vae)
    _write_part(folder / "vae", TRANSFORMER_STEM, vae, vae_json)
    text = {TEXT_ENCODER.to_right(name): value for name, value in weights.text_encoder.items()}
    _write_part(folder / "text_encoder", "model", text, _umt5_json(text))
    encoders = {"text_encoder": ["transformers", "UMT5EncoderModel"]}
    if weights.image_encoder is not None:
        image = _clip_for_transformers(weights.image_encoder)
        _write_part(folder / "image_encoder", "model", image, _clip_json(image, weights.image_heads))
        encoders["image_encoder"] = ["transformers", "CLIPVisionModel"]
    write_json_atomic(folder / "model_index.json", {
        "_class_name": "WanImageToVideoPipeline",
        **{name: ["diffusers", "WanTransformer3DModel"] for name in transformers},
        "vae": ["diffusers", "AutoencoderKLWan"],
        **encoders,
        "tokenizer": ["transformers", "T5TokenizerFast"],
    })


def _write_part(folder: Path, stem: str, state: State, config: dict[str, Any]) -> None:
    _save_safetensors(folder / f"{stem}.safetensors", state)
    write_json_atomic(folder / "config.json", config)


def _vae_for_diffusers(vae: State) -> tuple[State, dict[str, Any]]:
    resamplers, blocks = vae_structure(vae)
    keys = vae_keys(len(resamplers) + 1, blocks)
    state = {keys.to_right(name): value for name, value in vae.items() if name not in STATISTICS}
    config = {
        "_class_name": "AutoencoderKLWan", "base_dim": vae["encoder.conv1.weight"].shape[0],
        "z_dim": vae["conv2.weight"].shape[0], "num_res_blocks": blocks,
    }
    return state, config | {name: vae[name].flatten().tolist() for name in STATISTICS if name in vae}


def _umt5_json(state: State) -> dict[str, Any]:
    vocabulary, width = state["shared.weight"].shape
    attention = "encoder.block.0.layer.0.SelfAttention"
    buckets, heads = state[f"{attention}.relative_attention_bias.weight"].shape
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "feed_forward_proj": "gated-gelu",
        "vocab_size": vocabulary, "d_model": width, "num_heads": heads,
        "d_kv": state[f"{attention}.q.weight"].shape[0] // heads,
        "d_ff": state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0],
        "num_layers": sum(name.endswith("wi_0.weight") for name in state), "layer_norm_epsilon": 1e-6,
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
    }


def _clip_json(state: State, heads: int) -> dict[str, Any]:
    width, _, patch, _ = state["vision_model.embeddings.patch_embedding.weight"].shape
    tokens = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    return {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "gelu",
        "hidden_size": width, "num_attention_heads": heads, "layer_norm_eps": 1e-5, "patch_size": patch,
        "intermediate_size": state["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": sum(name.endswith("mlp.fc1.weight") for name in state),
        "image_size": round((tokens - 1) ** 0.5) * patch,
    }


def _clip_for_transformers(image: State) -> State:
    state: State = {}
    for name, value in image.items():
        new = "vision_model." + IMAGE_ENCODER.to_right(name)
        if "qkv_proj" in new:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                state[new.replace("qkv_proj", f"{part}_proj")] = piece.contiguous()
        elif name in ("cls_embedding", "pos_embedding"):
            state[new] = value.reshape(value.shape[2:] if name == "cls_embedding" else value.shape[1:])
        elif name != "head":
            state[new] = value
    return state


def _save_torch(path: Path, state: State) -> None:
    write_atomic(path, lambda partial: _dump(state, partial))


def _dump(state: State, path: Path) -> None:
    with open(path, "wb") as file:  # given a path, torch would write the temporary name into the file
        torch.save(state, file)


def _save_safetensors(path: Path, state: State) -> None:
    write_atomic(path, lambda partial: save_file(state, partial, metadata={"format": "pt"}))
