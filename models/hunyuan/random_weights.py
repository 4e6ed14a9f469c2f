"""Writes a tiny random checkpoint in the layout of the released HunyuanVideo-I2V: tests and demos live on it.

    python -m models.hunyuan.random_weights OUT [--variant token_replace|latent_concat] [--seed N] [--dim N] ...
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.files import write_atomic, write_json_atomic
from models.checkpoint import Shape, slots
from models.hunyuan.checkpoint import CLIP_FOLDER, LLAVA_FOLDER, TRANSFORMER_FILE, VAE_FILE
from models.hunyuan.config import VARIANT_OF_CHANNELS, HunyuanConfig, Variant, rope_axes
from models.hunyuan.transformer import HunyuanTransformer

State = dict[str, Tensor]

_LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_LLAMA_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<pad>",
    "<image>",
)
_CLIP_SIDE, _CLIP_PATCH = 336, 14


@dataclass(frozen=True)
class TinySizes:
    """Sizes of the encoders; LLaVA's and CLIP's widths are the transformer's `text_dim` and `pooled_dim`."""

    text_layers: int = 4
    text_heads: int = 4
    vision_width: int = 32
    vision_layers: int = 2
    clip_layers: int = 2
    clip_heads: int = 4
    vae_widths: tuple[int, ...] = (8, 8, 16, 16)
    vae_groups: int = 4


def tiny_config(variant: Variant = "token_replace", dim: int = 96, head_dim: int = 32) -> HunyuanConfig:
    """The default transformer: 3 heads of 32, two double and two single blocks."""
    channels = {name: count for count, name in VARIANT_OF_CHANNELS.items()}[variant]
    return HunyuanConfig(
        dim=dim, num_heads=dim // head_dim, mlp_dim=2 * dim, num_double=2, num_single=2, in_channels=channels,
        guidance_embed=variant == "token_replace", rope_axes=rope_axes(head_dim), num_refiner=2, text_dim=64,
        pooled_dim=48,
    )


def write_random_checkpoint(
    folder: Path, config: HunyuanConfig | None = None, sizes: TinySizes | None = None, seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> HunyuanConfig:
    """Write a complete checkpoint with random weights in the original layout.

    Args:
        config: the transformer's dimensions and variant; default: `tiny_config()`.
        dtype: of the transformer; the release has bfloat16. The other parts are float32.

    Returns:
        The transformer's dimensions.
    """
    config, sizes = config or tiny_config(), sizes or TinySizes()
    generator = torch.Generator().manual_seed(seed)
    transformer = {name: value.to(dtype) for name, value in random_transformer(config, generator).items()}
    _save_torch(folder / TRANSFORMER_FILE, {"module": transformer})
    state, settings = random_vae(sizes, generator)
    _save_torch(folder / VAE_FILE, {"state_dict": {f"vae.{name}": value for name, value in state.items()}})
    write_json_atomic((folder / VAE_FILE).parent / "config.json", settings)
    _write_llava(folder / LLAVA_FOLDER, config.text_dim, sizes, generator)
    _write_clip(folder / CLIP_FOLDER, config.pooled_dim, sizes, generator)
    return config


def random_transformer(config: HunyuanConfig, generator: torch.Generator) -> State:
    """Random weights in the original names, scaled so that every stage's output is of order one."""
    with torch.device("meta"):
        shapes = slots(HunyuanTransformer(config))
    return _random(shapes, generator)


def random_vae(sizes: TinySizes, generator: torch.Generator) -> tuple[State, dict[str, Any]]:
    """Random VAE in the original names, which are diffusers', and its config.json."""
    from diffusers import AutoencoderKLHunyuanVideo

    settings = {"block_out_channels": list(sizes.vae_widths), "norm_num_groups": sizes.vae_groups}
    with torch.device("meta"):
        model = AutoencoderKLHunyuanVideo(**settings)
    state = _random(slots(model), generator)
    state["decoder.conv_out.conv.weight"] *= 0.4  # few saturated pixels
    return state, settings | {"_class_name": "AutoencoderKLCausal3D", "scaling_factor": 0.476986}


def _random(shapes: Mapping[str, Shape], generator: torch.Generator) -> State:
    """Matrices with unit gain, norms near one, small biases."""
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("bias"):
            state[name] = 0.02 * noise
        elif len(shape) == 1:
            state[name] = 1 + 0.05 * noise
        else:
            state[name] = noise / math.sqrt(math.prod(shape[1:]))
    return state


def _write_llava(folder: Path, width: int, sizes: TinySizes, generator: torch.Generator) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vocabulary = _write_llava_tokenizer(folder)
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_width, intermediate_size=2 * sizes.vision_width, num_attention_heads=2,
        num_hidden_layers=sizes.vision_layers, image_size=_CLIP_SIDE, patch_size=_CLIP_PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=sizes.text_layers, num_attention_heads=sizes.text_heads,
        num_key_value_heads=sizes.text_heads, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=500000.0,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=vocabulary["<image>"],
        pad_token_id=vocabulary["<pad>"], vision_feature_layer=-2, vision_feature_select_strategy="default",
    )
    _save_pretrained(LlavaForConditionalGeneration, config, folder, generator)
    write_json_atomic(folder / "preprocessor_config.json", {
        "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": _CLIP_SIDE}, "do_resize": True,
        "crop_size": {"height": _CLIP_SIDE, "width": _CLIP_SIDE}, "do_center_crop": True, "resample": 3,
        "do_normalize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711], "do_rescale": True, "do_convert_rgb": True,
    })


def _write_clip(folder: Path, width: int, sizes: TinySizes, generator: torch.Generator) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary = _write_clip_tokenizer(folder)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=2 * width, num_attention_heads=sizes.clip_heads,
        num_hidden_layers=sizes.clip_layers, bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=vocabulary["<|endoftext|>"], pad_token_id=vocabulary["<|endoftext|>"],
    )
    _save_pretrained(CLIPTextModel, config, folder, generator)


def _save_pretrained(kind: Any, config: Any, folder: Path, generator: torch.Generator) -> None:
    """A transformers model with random weights, in its folder's layout."""
    model = kind(config)
    state = _random({name: tuple(value.shape) for name, value in model.state_dict().items()}, generator)
    model.load_state_dict(state)
    model.save_pretrained(folder)


def _write_llava_tokenizer(folder: Path) -> dict[str, int]:
    """A small tokenizer that splits text as LLaMA-3's does and knows every word of the prompt template.

    So the template has as many tokens as with the released vocabulary, which the released code counts on.
    """
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(_LLAMA_SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    text = re.sub(r"<[^>]*>", "\x00", TEMPLATE["template"])
    pieces = {piece for part in text.split("\x00") for piece, _ in split.pre_tokenize_str(part)}
    words = sorted(set(pre_tokenizers.ByteLevel.alphabet()) | pieces)
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _LLAMA_SPECIAL])
    begin = _LLAMA_SPECIAL[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, tokenizer.token_to_id(begin))],
    )
    write_atomic(folder / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    write_json_atomic(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": "<|end_of_text|>",
        "pad_token": "<pad>", "model_max_length": 8192,
    })
    return tokenizer.get_vocab()


def _write_clip_tokenizer(folder: Path) -> dict[str, int]:
    """CLIP's byte-level tokenizer without merges: every character is a token."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    end = "<|endoftext|>"
    write_atomic(folder / "vocab.json", lambda path: path.write_text(json.dumps(vocabulary)) and None)
    write_atomic(folder / "merges.txt", lambda path: path.write_text("#version: 0.2\n") and None)
    write_json_atomic(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "bos_token": "<|startoftext|>", "eos_token": end, "pad_token": end,
        "unk_token": end, "model_max_length": 77,
    })
    return vocabulary


def _save_torch(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, lambda partial: _dump(content, partial))


def _dump(content: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:  # given a path, torch would write the temporary name into the file
        torch.save(content, file)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("random_weights", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="new folder to write")
    parser.add_argument("--variant", choices=sorted(VARIANT_OF_CHANNELS.values()), default="token_replace")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dim", type=int, default=96, help="width, a multiple of 32")
    parser.add_argument("--double-blocks", type=int, default=2)
    parser.add_argument("--single-blocks", type=int, default=2)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args(arguments)
    if given.out.exists():  # a typing error must not turn a real checkpoint into a random one
        parser.error(f"{given.out}: is there already; nothing is overwritten. Name a new folder.")
    config = replace(
        tiny_config(given.variant, given.dim), num_double=given.double_blocks, num_single=given.single_blocks
    )
    write_random_checkpoint(given.out, config, seed=given.seed, dtype=getattr(torch, given.dtype))
    print(f"{given.out}: random HunyuanVideo-I2V checkpoint, {given.variant}, seed {given.seed}")


if __name__ == "__main__":
    main()
