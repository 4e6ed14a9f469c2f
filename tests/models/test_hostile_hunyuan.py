"""Whatever the files of a HunyuanVideo checkpoint hold, loading ends in a model or in a UserError."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hostile import spoilt
from hunyuan_parts import comfyui_name, make_parts, save, write_comfyui
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from common.errors import UserError
from loraedit_ext import inspect
from models.hunyuan.checkpoint import HunyuanCheckpoint, HunyuanTransformerFiles
from models.hunyuan.keys import LORA
from models.hunyuan.wrapper import HunyuanI2V

CPU = torch.device("cpu")
NEW_NAMES = ["", ".", "double_blocks.99999999999999999999.x", "single_blocks.-1.linear1.weight", "scaled_fp8", "{}", "a" * 300,
             "model.model.x", "double_blocks.0.img_attn.qkv.scale_weight", "ünïcode", "norm_out.linear.weight",
             "double_blocks.0.img_attn.qkv.comfy_quant", "x_embedder.proj.weight", "decoder.up.x.block.0.conv1.conv.weight",
             "encoder.down_blocks.7.resnets.0.conv1.conv.weight", "model.layers.7.x", "vision_model.encoder.layers.9.x"]
SHAPES = [(), (0,), (1,), (96,), (96, 96), (96, 0), (128, 128), (2, 3, 4, 5, 6), (96, 16, 1, 2, 2), (96, 33, 0, 2, 2)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"), "token_replace")


@pytest.fixture(scope="module")
def comfyui(parts, tmp_path_factory):
    return write_comfyui(tmp_path_factory.mktemp("comfyui"), parts)


def in_diffusers(state):
    """Only the names: the fused linears stay one tensor, under the name of their first part."""
    return {LORA.diffusers(name.replace("_qkv.", "_qkv#q.").replace("linear1.", "linear1#q.")): v for name, v in state.items()}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_transformers_renamed_misshapen_and_of_odd_dtypes(parts, tmp_path, data):
    state = data.draw(st.sampled_from([
        parts.transformer, {f"model.model.{comfyui_name(n)}": v for n, v in parts.transformer.items()},
        in_diffusers(parts.transformer),
    ]))
    path = save(tmp_path / "w.safetensors", spoilt(state, data, NEW_NAMES, SHAPES))
    with contextlib.suppress(UserError):
        model = HunyuanI2V(HunyuanTransformerFiles(path), CPU)
        model.load_weights(model.build_transformer().layers(), torch.float32, CPU, torch.float8_e4m3fn)
    with contextlib.suppress(UserError):
        inspect.describe(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_encoders_renamed_and_misshapen(comfyui, tmp_path, data):
    vision = comfyui["llm_path"].parent.parent / "clip_vision/llava_llama3_vision.safetensors"
    key = data.draw(st.sampled_from(["vae_path", "llm_path", "clip_path", "vision"]))
    source = comfyui.get(key, vision)
    folder = source.parent.name
    path = save(tmp_path / folder / source.name, spoilt(load_file(source), data, NEW_NAMES, SHAPES))
    paths = comfyui | ({} if key == "vision" else {key: path})
    with contextlib.suppress(UserError):
        checkpoint = HunyuanCheckpoint.open(None, **paths)
        checkpoint.describe_layout()
        checkpoint.identity()
        checkpoint.load_vae() if key == "vae_path" else checkpoint.load_text_encoder(dtype=torch.float32)
    with contextlib.suppress(UserError):
        inspect.describe(path)
