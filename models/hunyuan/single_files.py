"""LLaVA-LLaMA-3 and CLIP-L from single files, as ComfyUI and Kijai repack them, into transformers' classes.

ComfyUI splits LLaVA: the language model is one file (`llava_llama3_fp16.safetensors`), the vision tower with the
projector another (`llava_llama3_vision.safetensors`). Sources of the names: ComfyUI `comfy/text_encoders/llama.py`,
`comfy/clip_model.py`, `comfy/clip_vision.py`. Dimensions come from the weights, the widths of heads and the constants
from the released configurations (xtuner/llava-llama-3-8b-v1_1-transformers, openai/clip-vit-large-patch14).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from common.errors import UserError
from models.checkpoint import Tensors, guess_content, load_into, open_tensors, read_config
from models.scaled_fp8 import dequantised

if TYPE_CHECKING:
    from transformers import CLIPTextModel, LlavaForConditionalGeneration

STEMS = ("model",)
_VISION_FILES = "*llava*vision*.safetensors"
_LLAMA_HEAD, _CLIP_HEAD = 128, 64
_TEXT_MARK = "embed_tokens.weight"
_VISION_MARK = "embeddings.class_embedding"
_PROJECTOR_MARK = "multi_modal_projector.linear_1.weight"
_CLIP_MARK = "embeddings.token_embedding.weight"
_BUFFERS = ("position_ids", "inv_freq")
IMAGE_TOKEN = "<image>"
RELEASED_PROCESSOR: dict[str, Any] = {
    "do_resize": True, "size": {"shortest_edge": 336}, "resample": 3, "do_center_crop": True,
    "crop_size": {"height": 336, "width": 336}, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""LLaVA's preprocessor_config.json, for files that come without one."""


def is_whole_llava(path: Path) -> bool:
    """Whether `path` is a folder in transformers' layout with the vision tower, which the library loads itself."""
    config = path / "config.json"
    return path.is_dir() and config.is_file() and "vision_config" in read_config(config)


def needs_config(path: Path) -> bool:
    """Whether `path` is a file, or a folder without config.json: dimensions must come from the weights."""
    return not (path.is_dir() and (path / "config.json").is_file())


def find_vision(llava: Path) -> Path | None:
    """The file with LLaVA's vision tower: the language model's own, one beside it, or one in ComfyUI's clip_vision folder.

    Raises:
        UserError: there are several.
    """
    if _prefix_of(open_tensors(llava, STEMS), _VISION_MARK) is not None:
        return llava
    near = llava if llava.is_dir() else llava.parent
    for folder in (near, near.parent / "clip_vision"):
        found = sorted(folder.glob(_VISION_FILES))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise UserError(f"{folder}: several files with LLaVA's vision tower ({names}). Keep one.")
        if found:
            return found[0]
    return None


def missing_vision(llava: Path) -> str:
    """What to tell a user whose LLaVA has no vision tower."""
    near = llava if llava.is_dir() else llava.parent
    return (
        f"llm: {llava} is LLaVA's language model alone; the vision tower and the projector are missing, and image-to-video "
        f"needs them. Looked for {_VISION_FILES} in {near} and {near.parent / 'clip_vision'}; not there. They are in "
        "llava_llama3_vision.safetensors (Comfy-Org/HunyuanVideo_repackaged, split_files/clip_vision): put it beside. Or set "
        "llm_path to the folder of xtuner/llava-llama-3-8b-v1_1-transformers, which has all."
    )


def load_llava(
    text: Path, vision: Path, tokenizer: Any, device: torch.device | str, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """LLaVA from the file (or folder) of its language model and the file of its vision tower and projector.

    The head over the vocabulary is left out: hidden states are all that is asked for.

    Args:
        tokenizer: knows the ids of `<image>` and of padding.

    Raises:
        UserError: names or shapes are not those of LLaVA-LLaMA-3.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language, tower = _opened(text), _opened(vision)
    language_part = _part(language, _TEXT_MARK, "LLaMA-3's language model (llava_llama3_fp16.safetensors)")
    tower_part = _part(tower, _VISION_MARK, "LLaVA's vision tower (llava_llama3_vision.safetensors)")
    projector = _part(tower, _PROJECTOR_MARK, "LLaVA's projector (llava_llama3_vision.safetensors)", keep=1)
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    if image is None or tokenizer.pad_token_id is None:
        raise UserError(
            f"{tokenizer.name_or_path}: the tokenizer knows no {IMAGE_TOKEN} or no padding; expected that of "
            "xtuner/llava-llama-3-8b-v1_1-transformers."
        )
    config = LlavaConfig(
        text_config=_llama_config(language_part), vision_config=_vision_config(tower_part),
        image_token_index=image, pad_token_id=tokenizer.pad_token_id,
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.lm_head = nn.Identity()
    parts = (
        (model.model.language_model, language_part), (model.model.vision_tower, tower_part),
        (model.model.multi_modal_projector, projector),
    )
    for module, tensors in parts:
        load_into(module, tensors, lambda name, tensor: dtype, device)
    inner, embeddings = model.model.language_model, model.model.vision_tower.embeddings
    inner.rotary_emb = type(inner.rotary_emb)(config.text_config).to(device)  # in no file
    embeddings.position_ids = torch.arange(embeddings.num_positions, device=device).unsqueeze(0)
    return model.eval()


def load_clip_text(
    path: Path, tokenizer: Any, device: torch.device | str, dtype: torch.dtype
) -> CLIPTextModel:
    """CLIP-L's text model from a single file (`clip_l.safetensors`).

    Raises:
        UserError: names or shapes are not those of CLIP's text model.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    tensors = _part(_opened(path), _CLIP_MARK, "CLIP-L's text model (clip_l.safetensors)")
    vocabulary, width = _shape(tensors, _CLIP_MARK)
    config = CLIPTextConfig(
        vocab_size=vocabulary, hidden_size=width, num_attention_heads=_heads(tensors, width, _CLIP_HEAD),
        intermediate_size=_shape(tensors, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=_count(tensors, r"encoder\.layers\.(\d+)\."),
        max_position_embeddings=_shape(tensors, "embeddings.position_embedding.weight")[0], hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        model = CLIPTextModel(config)
    load_into(model, tensors, lambda name, tensor: dtype, device)
    positions = config.max_position_embeddings
    model.embeddings.position_ids = torch.arange(positions, device=device).unsqueeze(0)
    return model.eval()


def _opened(path: Path) -> Tensors:
    return dequantised(open_tensors(path, STEMS))


def _prefix_of(tensors: Tensors, mark: str) -> str | None:
    """What stands before `mark` in the name that ends in it."""
    found = sorted((name for name in tensors if name == mark or name.endswith(f".{mark}")), key=len)
    return found[0].removesuffix(mark) if found else None


def _part(tensors: Tensors, mark: str, what: str, keep: int = 0) -> Tensors:
    """The tensors of one module, named from it on: those that share a prefix with the one whose name ends in `mark`.

    Args:
        keep: how many parts of `mark` belong to the prefix.
    """
    prefix = _prefix_of(tensors, mark)
    if prefix is None:
        raise UserError(
            f"{tensors.where}: not {what}: no name ends in {mark} among {len(tensors)} tensors "
            f"({', '.join(list(tensors)[:3]) or 'none'}). {guess_content(tensors)}"
        )
    prefix += "".join(f"{part}." for part in mark.split(".")[:keep])
    own = {mark.split(".")[keep], *_SIBLINGS[mark]}
    part = tensors.under(prefix)
    return part.filtered(lambda name: name.split(".")[0] in own and not name.endswith(_BUFFERS))


_SIBLINGS = {
    _TEXT_MARK: ("layers", "norm"), _VISION_MARK: ("encoder", "pre_layrnorm", "post_layernorm"),
    _PROJECTOR_MARK: ("linear_2",), _CLIP_MARK: ("encoder", "final_layer_norm"),
}
"""What else belongs to the module of each mark; a file may hold more, such as the head or the tokenizer."""


def _shape(tensors: Tensors, name: str, axes: int = 2) -> tuple[int, ...]:
    entry = tensors.entries.get(name)
    if entry is None or len(entry.shape) != axes or 0 in entry.shape:
        raise UserError(
            f"{tensors.where}: incomplete, {tensors.spell(name)} is missing or misshapen among {len(tensors)} tensors. "
            "Download the file again."
        )
    return entry.shape


def _count(tensors: Tensors, pattern: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(pattern, name))})


def _heads(tensors: Tensors, rows: int, width: int) -> int:
    if rows % width:
        raise UserError(
            f"{tensors.where}: {rows} channels are no whole number of heads of {width}; expected the released model."
        )
    return rows // width


def _llama_config(tensors: Tensors) -> Any:
    from transformers import LlamaConfig

    vocabulary, width = _shape(tensors, _TEXT_MARK)
    layer = "layers.0."
    q, k = (_shape(tensors, f"{layer}self_attn.{part}_proj.weight")[0] for part in "qk")
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width,
        intermediate_size=_shape(tensors, f"{layer}mlp.gate_proj.weight")[0],
        num_hidden_layers=_count(tensors, r"layers\.(\d+)\."), num_attention_heads=_heads(tensors, q, _LLAMA_HEAD),
        num_key_value_heads=_heads(tensors, k, _LLAMA_HEAD), head_dim=_LLAMA_HEAD, max_position_embeddings=8192,
        rms_norm_eps=1e-5, rope_theta=500000.0,
    )


def _vision_config(tensors: Tensors) -> Any:
    from transformers import CLIPVisionConfig

    width = _shape(tensors, _VISION_MARK, 1)[0]
    patch = _shape(tensors, "embeddings.patch_embedding.weight", 4)[-1]
    tokens = _shape(tensors, "embeddings.position_embedding.weight")[0]
    return CLIPVisionConfig(
        hidden_size=width, intermediate_size=_shape(tensors, "encoder.layers.0.mlp.fc1.weight")[0],
        num_hidden_layers=_count(tensors, r"encoder\.layers\.(\d+)\."),
        num_attention_heads=_heads(tensors, width, _CLIP_HEAD), image_size=round((tokens - 1) ** 0.5) * patch,
        patch_size=patch, hidden_act="quick_gelu",
    )
