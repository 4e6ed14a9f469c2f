"""HunyuanVideo LoRAs: targets, names, and that diffusers loads them as they are."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from loraedit_ext import lora
from loraedit_ext.config import AdapterSettings
from loraedit_ext.hunyuan import MaskedHunyuan
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.hunyuan.config import rope_axes
from models.hunyuan.random_weights import tiny_config
from models.hunyuan.transformer import HunyuanTransformer

CPU = torch.device("cpu")
DOUBLE = [f"{stream}_{part}" for stream in ("img", "txt") for part in ("attn_qkv", "attn_proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture
def model(tiny_hunyuan):
    return MaskedHunyuan(HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]), CPU)


def adapted(transformer, model, seed=0, rank=4):
    """The layers of a transformer with a LoRA whose effect is not zero."""
    layers = transformer.layers()
    lora.inject(transformer, model, AdapterSettings(rank=rank))
    lora.initialise(layers, seed, CPU)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in lora.trainable(layers).items():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)
    return layers


def test_exactly_the_block_linears_without_modulation_are_trained(model):
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), torch.float32, CPU)
    linears = [f"double_blocks.{i}.{part}" for i in range(2) for part in DOUBLE]
    linears += [f"single_blocks.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    names = set(lora.trainable(adapted(transformer, model)))
    assert names == {f"{linear}.lora_{ab}.weight" for linear in linears for ab in "AB"}


def test_an_exported_lora_has_comfyuis_names_and_loads_back(model, tmp_path):
    first, second = (model.build_transformer() for _ in range(2))
    for transformer in (first, second):
        model.load_weights(transformer.layers(), torch.float32, CPU)
    weights = lora.trainable(adapted(first, model, seed=1))
    lora.save(tmp_path / "lora.safetensors", weights, model, {"model": model.describe()}, 1.0, torch.float32)
    names = load_file(tmp_path / "lora.safetensors")
    assert all(re.match(r"transformer\.(double|single)_blocks\.\d+\.", name) for name in names)
    target = lora.trainable(adapted(second, model, seed=2))
    lora.load(target, lora.read(tmp_path / "lora.safetensors", model))
    assert all(torch.equal(weights[name], target[name]) for name in weights)


def wide_config():
    """The released width, which diffusers' converters count on; everything else as small as can be."""
    return replace(
        tiny_config("token_replace", dim=3072, head_dim=128), mlp_dim=64, num_double=1, num_single=1, num_refiner=0,
        text_dim=16, pooled_dim=16, rope_axes=rope_axes(128),
    )


def patterned(transformer: torch.nn.Module) -> None:
    """Random weights, cheaply: one random vector over and over, at an odd offset each time."""
    noise = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in transformer.parameters():
            repeats = parameter.numel() // len(noise) + 1
            values = noise.repeat(repeats)[: parameter.numel()].view(parameter.shape)
            parameter.copy_(1 + 0.05 * values if parameter.ndim == 1 else values / parameter[0].numel() ** 0.5)
            noise = noise.roll(7919)


def diffusers_twin(transformer: HunyuanTransformer):
    """diffusers' class on the same memory, through diffusers' own converter."""
    from diffusers import HunyuanVideoTransformer3DModel
    from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

    config = transformer.config
    with torch.device("meta"):
        twin = HunyuanVideoTransformer3DModel(
            num_layers=1, num_single_layers=1, num_refiner_layers=0, mlp_ratio=config.mlp_dim / config.dim,
            text_embed_dim=config.text_dim, pooled_projection_dim=config.pooled_dim, rope_axes_dim=config.rope_axes,
            image_condition_type="token_replace",
        )
    state = convert_hunyuan_video_transformer_to_diffusers(dict(transformer.state_dict()))
    twin.load_state_dict(state, assign=True)
    return twin.eval()


@pytest.mark.slow
@torch.no_grad()
def test_diffusers_loads_an_exported_lora_with_the_same_effect(model, tmp_path):
    from diffusers import HunyuanVideoImageToVideoPipeline

    with torch.device("meta"):
        transformer = HunyuanTransformer(wide_config()).requires_grad_(False)
    transformer = transformer.to_empty(device="cpu").eval()
    patterned(transformer)
    twin = diffusers_twin(transformer)
    generator = torch.Generator().manual_seed(0)
    latents, text, pooled = (
        torch.randn(shape, generator=generator) for shape in ((1, 16, 2, 4, 4), (1, 6, 16), (1, 16))
    )
    preserved = torch.zeros(1, 1, 2, 4, 4)
    preserved[:, :, 0] = 1
    timestep, guidance = torch.tensor([600.0]), torch.tensor([6000.0])

    def theirs():
        return twin(latents, timestep, text, torch.ones(1, 6), pooled, guidance).sample

    def ours():
        return transformer(latents, timestep, text, torch.tensor([6]), pooled, guidance, preserved)

    bare = theirs()
    assert (ours() - bare).abs().max() < 1e-4
    weights = lora.trainable(adapted(transformer, model))
    path = tmp_path / "adapter_model.safetensors"
    lora.save(path, weights, model, {}, 1.0, torch.float32)
    pipeline = HunyuanVideoImageToVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=twin, vae=None, scheduler=None, text_encoder_2=None,
        tokenizer_2=None, image_processor=None,
    )
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    changed = theirs()
    assert (changed - bare).abs().max() > 0.1
    assert (ours() - changed).abs().max() < 1e-4
