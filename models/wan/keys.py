"""Parameter names of Wan's parts: original release on the left, diffusers or transformers on the right."""

from __future__ import annotations

import re
from collections.abc import Iterable

from models.keymap import KeyMap
from models.lora_names import LoraNames

_CONDITION = "condition_embedder"
TRANSFORMER = KeyMap([
    ("text_embedding.0", f"{_CONDITION}.text_embedder.linear_1"),
    ("text_embedding.2", f"{_CONDITION}.text_embedder.linear_2"),
    ("time_embedding.0", f"{_CONDITION}.time_embedder.linear_1"),
    ("time_embedding.2", f"{_CONDITION}.time_embedder.linear_2"),
    ("time_projection.1", f"{_CONDITION}.time_proj"),
    ("img_emb.proj.0", f"{_CONDITION}.image_embedder.norm1"),
    ("img_emb.proj.1", f"{_CONDITION}.image_embedder.ff.net.0.proj"),
    ("img_emb.proj.3", f"{_CONDITION}.image_embedder.ff.net.2"),
    ("img_emb.proj.4", f"{_CONDITION}.image_embedder.norm2"),
    ("img_emb.emb_pos", f"{_CONDITION}.image_embedder.pos_embed"),
    ("blocks.{}.self_attn.q", "blocks.{}.attn1.to_q"),
    ("blocks.{}.self_attn.k", "blocks.{}.attn1.to_k"),
    ("blocks.{}.self_attn.v", "blocks.{}.attn1.to_v"),
    ("blocks.{}.self_attn.o", "blocks.{}.attn1.to_out.0"),
    ("blocks.{}.self_attn.norm_q", "blocks.{}.attn1.norm_q"),
    ("blocks.{}.self_attn.norm_k", "blocks.{}.attn1.norm_k"),
    ("blocks.{}.cross_attn.q", "blocks.{}.attn2.to_q"),
    ("blocks.{}.cross_attn.k", "blocks.{}.attn2.to_k"),
    ("blocks.{}.cross_attn.v", "blocks.{}.attn2.to_v"),
    ("blocks.{}.cross_attn.o", "blocks.{}.attn2.to_out.0"),
    ("blocks.{}.cross_attn.k_img", "blocks.{}.attn2.add_k_proj"),
    ("blocks.{}.cross_attn.v_img", "blocks.{}.attn2.add_v_proj"),
    ("blocks.{}.cross_attn.norm_q", "blocks.{}.attn2.norm_q"),
    ("blocks.{}.cross_attn.norm_k", "blocks.{}.attn2.norm_k"),
    ("blocks.{}.cross_attn.norm_k_img", "blocks.{}.attn2.norm_added_k"),
    ("blocks.{}.ffn.0", "blocks.{}.ffn.net.0.proj"),
    ("blocks.{}.ffn.2", "blocks.{}.ffn.net.2"),
    ("blocks.{}.norm3", "blocks.{}.norm2"),
    ("blocks.{}.modulation", "blocks.{}.scale_shift_table"),
    ("head.modulation", "scale_shift_table"),
    ("head.head", "proj_out"),
])

LORA = LoraNames("wan", "diffusion_model.", [*TRANSFORMER.left, "patch_embedding"], TRANSFORMER, bare=("modulation",))

_T5 = "encoder.block.{}.layer"
TEXT_ENCODER = KeyMap([
    ("token_embedding", "shared"),
    ("norm", "encoder.final_layer_norm"),
    ("blocks.{}.norm1", f"{_T5}.0.layer_norm"),
    ("blocks.{}.norm2", f"{_T5}.1.layer_norm"),
    ("blocks.{}.attn.q", f"{_T5}.0.SelfAttention.q"),
    ("blocks.{}.attn.k", f"{_T5}.0.SelfAttention.k"),
    ("blocks.{}.attn.v", f"{_T5}.0.SelfAttention.v"),
    ("blocks.{}.attn.o", f"{_T5}.0.SelfAttention.o"),
    ("blocks.{}.pos_embedding.embedding", f"{_T5}.0.SelfAttention.relative_attention_bias"),
    ("blocks.{}.ffn.gate.0", f"{_T5}.1.DenseReluDense.wi_0"),
    ("blocks.{}.ffn.fc1", f"{_T5}.1.DenseReluDense.wi_1"),
    ("blocks.{}.ffn.fc2", f"{_T5}.1.DenseReluDense.wo"),
])

# The fused to_qkv stays fused in the map (left name, right stem "qkv"); the loader splits it.
IMAGE_ENCODER = KeyMap([
    ("cls_embedding", "embeddings.class_embedding"),
    ("pos_embedding", "embeddings.position_embedding.weight"),
    ("patch_embedding", "embeddings.patch_embedding"),
    ("pre_norm", "pre_layrnorm"),
    ("post_norm", "post_layernorm"),
    ("transformer.{}.norm1", "encoder.layers.{}.layer_norm1"),
    ("transformer.{}.norm2", "encoder.layers.{}.layer_norm2"),
    ("transformer.{}.attn.to_qkv", "encoder.layers.{}.self_attn.qkv_proj"),
    ("transformer.{}.attn.proj", "encoder.layers.{}.self_attn.out_proj"),
    ("transformer.{}.mlp.0", "encoder.layers.{}.mlp.fc1"),
    ("transformer.{}.mlp.2", "encoder.layers.{}.mlp.fc2"),
])


def vae_structure(names: Iterable[str]) -> tuple[list[int], int]:
    """Indices of the encoder's down-samplers and the residual blocks before each, from either scheme."""
    pattern = re.compile(r"encoder\.(?:downsamples|down_blocks)\.(\d+)\.resample\.")
    resamplers = sorted({int(match[1]) for name in names if (match := pattern.match(name))})
    return resamplers, resamplers[0] if resamplers else 0


def vae_keys(levels: int, num_res_blocks: int) -> KeyMap:
    """Names of the VAE: the original numbers the decoder's blocks through, diffusers per level."""
    pairs = [
        ("conv1", "quant_conv"), ("conv2", "post_quant_conv"),
        ("encoder.downsamples.{}.resample", "encoder.down_blocks.{}.resample"),
        ("encoder.downsamples.{}.time_conv", "encoder.down_blocks.{}.time_conv"),
        *_residual("encoder.downsamples.{}", "encoder.down_blocks.{}"),
    ]
    for half in ("encoder", "decoder"):
        pairs += [
            (f"{half}.conv1", f"{half}.conv_in"), (f"{half}.head.0", f"{half}.norm_out"),
            (f"{half}.head.2", f"{half}.conv_out"), (f"{half}.middle.1", f"{half}.mid_block.attentions.0"),
            *_residual(f"{half}.middle.0", f"{half}.mid_block.resnets.0"),
            *_residual(f"{half}.middle.2", f"{half}.mid_block.resnets.1"),
        ]
    resnets = num_res_blocks + 1
    for level in range(levels):
        first = level * (resnets + 1)
        for index in range(resnets):
            block = f"decoder.upsamples.{first + index}"
            pairs += _residual(block, f"decoder.up_blocks.{level}.resnets.{index}")
        sampler = f"decoder.upsamples.{first + resnets}"
        for part in ("resample", "time_conv"):
            pairs.append((f"{sampler}.{part}", f"decoder.up_blocks.{level}.upsamplers.0.{part}"))
    return KeyMap(pairs)


def _residual(left: str, right: str) -> list[tuple[str, str]]:
    return [
        (f"{left}.residual.0", f"{right}.norm1"), (f"{left}.residual.2", f"{right}.conv1"),
        (f"{left}.residual.3", f"{right}.norm2"), (f"{left}.residual.6", f"{right}.conv2"),
        (f"{left}.shortcut", f"{right}.conv_shortcut"),
    ]
