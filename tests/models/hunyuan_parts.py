"""HunyuanVideo-I2V at tiny size, and the names that ComfyUI's repacked files have."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.hunyuan.checkpoint import TRANSFORMER_FILE, VAE_FILE
from models.hunyuan.random_weights import TinySizes, tiny_config, write_random_checkpoint

# Written by hand from ComfyUI's modules (comfy/ldm/hunyuan_video/model.py, comfy/ldm/flux/layers.py), not from the map
# under test: the original's name of each module that ComfyUI calls otherwise.
EMBEDDERS = {
    "time_in.mlp.0": "time_in.in_layer", "time_in.mlp.2": "time_in.out_layer",
    "guidance_in.mlp.0": "guidance_in.in_layer", "guidance_in.mlp.2": "guidance_in.out_layer",
    "txt_in.t_embedder.mlp.0": "txt_in.t_embedder.in_layer", "txt_in.t_embedder.mlp.2": "txt_in.t_embedder.out_layer",
    "txt_in.c_embedder.linear_1": "txt_in.c_embedder.in_layer",
    "txt_in.c_embedder.linear_2": "txt_in.c_embedder.out_layer",
}
REFINER = {"self_attn_qkv": "self_attn.qkv", "self_attn_proj": "self_attn.proj", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
DOUBLE = {
    "img_mod.linear": "img_mod.lin", "img_attn_qkv": "img_attn.qkv", "img_attn_proj": "img_attn.proj",
    "img_mlp.fc1": "img_mlp.0", "img_mlp.fc2": "img_mlp.2",
    "txt_mod.linear": "txt_mod.lin", "txt_attn_qkv": "txt_attn.qkv", "txt_attn_proj": "txt_attn.proj",
    "txt_mlp.fc1": "txt_mlp.0", "txt_mlp.fc2": "txt_mlp.2",
}
DOUBLE_NORMS = {
    "img_attn_q_norm.weight": "img_attn.norm.query_norm.scale", "img_attn_k_norm.weight": "img_attn.norm.key_norm.scale",
    "txt_attn_q_norm.weight": "txt_attn.norm.query_norm.scale", "txt_attn_k_norm.weight": "txt_attn.norm.key_norm.scale",
}
SINGLE = {"modulation.linear": "modulation.lin"}
SINGLE_NORMS = {"q_norm.weight": "norm.query_norm.scale", "k_norm.weight": "norm.key_norm.scale"}
BLOCKS = {
    "txt_in.individual_token_refiner.blocks": (REFINER, {}), "double_blocks": (DOUBLE, DOUBLE_NORMS),
    "single_blocks": (SINGLE, SINGLE_NORMS),
}
UNCHANGED = {
    "img_in.proj", "txt_in.input_embedder", "vector_in.in_layer", "vector_in.out_layer", "final_layer.linear",
    "final_layer.adaLN_modulation.1",
}


def comfyui_name(name: str) -> str:
    """ComfyUI's name of an original parameter of the transformer."""
    for blocks, (modules, norms) in BLOCKS.items():
        if match := re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name):
            module, _, leaf = match[2].rpartition(".")
            inner = norms.get(match[2]) or f"{modules.get(module, module)}.{leaf}"
            return f"{blocks}.{match[1]}.{inner}"
    module, _, leaf = name.rpartition(".")
    assert module in EMBEDDERS or module in UNCHANGED
    return f"{EMBEDDERS.get(module, module)}.{leaf}"


@dataclass(frozen=True)
class Parts:
    """A tiny checkpoint whose heads are as wide as the released ones, since single files do not say how wide they are."""

    folder: Path
    transformer: dict[str, torch.Tensor]
    vae: dict[str, torch.Tensor]
    llava: dict[str, torch.Tensor]
    clip: dict[str, torch.Tensor]


def make_parts(folder, variant):
    config = replace(tiny_config(variant), text_dim=128, pooled_dim=128)
    sizes = TinySizes(text_layers=3, text_heads=1, vision_width=128, clip_heads=2, vae_widths=(32,) * 4, vae_groups=32)
    write_random_checkpoint(folder, config, sizes)
    vae = torch.load(folder / VAE_FILE, weights_only=True)["state_dict"]
    return Parts(
        folder, torch.load(folder / TRANSFORMER_FILE, weights_only=True)["module"],
        {name.removeprefix("vae."): value for name, value in vae.items()},
        load_file(folder / "text_encoder_i2v/model.safetensors"), load_file(folder / "text_encoder_2/model.safetensors"),
    )


def save(path, state):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


def comfyui_vae(state):
    """ComfyUI's VAE, in the latent-diffusion names: levels of the decoder count from its output."""
    renamed = {}
    for name, value in state.items():
        new = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if match := re.match(r"encoder\.down_blocks\.(\d)\.(resnets\.(\d)|downsamplers\.0)\.(.+)", new):
            inner = f"block.{match[3]}" if match[3] else "downsample"
            new = f"encoder.down.{match[1]}.{inner}.{match[4]}"
        elif match := re.match(r"decoder\.up_blocks\.(\d)\.(resnets\.(\d)|upsamplers\.0)\.(.+)", new):
            inner = f"block.{match[3]}" if match[3] else "upsample"
            new = f"decoder.up.{3 - int(match[1])}.{inner}.{match[4]}"
        elif match := re.match(r"(encoder|decoder)\.mid_block\.resnets\.(\d)\.(.+)", new):
            new = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
        elif match := re.match(r"(encoder|decoder)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", new):
            inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}[match[2]]
            new = f"{match[1]}.mid.attn_1.{inner}.{match[3]}"
            value = value[..., None, None, None] if value.ndim == 2 else value  # its linears are convolutions
        renamed[new] = value
    return renamed


def language_model(state):
    """As `llava_llama3_fp16.safetensors`: a LLaMA with its head."""
    prefix = "language_model."
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def vision_tower(state):
    """As `llava_llama3_vision.safetensors`: CLIP's tower and the projector."""
    return {
        name if name.startswith("multi_modal") else name.replace("vision_tower.", "vision_model."): value
        for name, value in state.items() if not name.startswith("language_model.")
    }


def copy_tokenizers(parts, folder):
    for source, target, names in (
        ("text_encoder_i2v", folder, ("tokenizer.json", "tokenizer_config.json")),
        ("text_encoder_2", folder.parent / "tokenizer_2", ("vocab.json", "merges.txt", "tokenizer_config.json")),
    ):
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            shutil.copy(parts.folder / source / name, target / name)


def write_comfyui(root, parts, prefix="model.model."):
    """ComfyUI's folder of models, with the tokenizers that it keeps in its program."""
    transformer = {prefix + comfyui_name(name): value for name, value in parts.transformer.items()}
    copy_tokenizers(parts, root / "text_encoders")
    save(root / "clip_vision/llava_llama3_vision.safetensors", vision_tower(parts.llava))
    clip = {f"text_model.{name}": value for name, value in parts.clip.items()}
    llama = language_model(parts.llava) | {"tokenizer": torch.zeros(9, dtype=torch.uint8)}
    return {
        "transformer_path": save(root / "diffusion_models/hunyuan_video_i2v.safetensors", transformer),
        "vae_path": save(root / "vae/hunyuan_video_vae_bf16.safetensors", comfyui_vae(parts.vae)),
        "llm_path": save(root / "text_encoders/llava_llama3_fp16.safetensors", llama),
        "clip_path": save(root / "text_encoders/clip_l.safetensors", clip | {
            "logit_scale": torch.ones(()), "text_projection.weight": torch.ones(128, 128),
            "text_model.embeddings.position_ids": torch.arange(77)[None],
        }),
    }
