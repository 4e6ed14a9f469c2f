"""Whatever a checkpoint's files hold, loading ends in a model or in a UserError, never in another exception."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from hostile import DTYPES, spoilt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from wan_parts import GOLDEN_CONFIG, golden_weights

from common.errors import UserError
from loraedit_ext import inspect
from models.wan.checkpoint import WanCheckpoint, WanTransformerFiles, to_diffusers
from models.wan.save import write_checkpoint
from models.wan.wrapper import WanI2V

CPU = torch.device("cpu")
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NEW_NAMES = ["", ".", "blocks.0", "blocks.99999999999999999999.x", "blocks.-1.ffn.0.weight", "scaled_fp8", "a" * 300,
             "model.diffusion_model.x", "{}", "blocks.0.ffn.0.scale_weight", "img_emb.emb_pos", "ünïcode",
             "blocks.0.ffn.0.comfy_quant", "head.head.weight"]
SHAPES = [(), (0,), (1,), (96,), (96, 96), (96, 0), (2, 3, 4, 5, 6), (96, 36, 1, 2, 2), (96, 36, 0, 2, 2), (1, 6, 96)]
VALUES = st.sampled_from([None, 0, -1, 3, 7, 1e9, "x", [], {}, True, float("nan")])


def load_whole(files):
    model = WanI2V(files, CPU)
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), torch.float32, CPU, torch.float8_e4m3fn)


@FUZZ
@given(data=st.data())
def test_transformers_renamed_misshapen_and_of_odd_dtypes(golden, tmp_path, data):
    state = dict(golden("wan_i2v_dit").weights)
    if data.draw(st.booleans()):
        state = {to_diffusers(name): value for name, value in state.items()}
    save_file(spoilt(state, data, NEW_NAMES, SHAPES), tmp_path / "w.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN_CONFIG.original_json()))
    with contextlib.suppress(UserError):
        load_whole(WanTransformerFiles(transformer=tmp_path / "w.safetensors"))
    with contextlib.suppress(UserError):
        inspect.describe(tmp_path / "w.safetensors")


@FUZZ
@given(data=st.data())
def test_config_jsons_of_any_content(golden, tmp_path, data):
    path = tmp_path / "w.safetensors"
    if not path.exists():
        save_file(golden("wan_i2v_dit").weights, path)
    base = data.draw(st.sampled_from([GOLDEN_CONFIG.original_json(), GOLDEN_CONFIG.diffusers_json()]))
    for key in data.draw(st.lists(st.sampled_from(sorted(base)), max_size=3)):
        base[key] = data.draw(VALUES)
    (tmp_path / "config.json").write_text(json.dumps(base))
    with contextlib.suppress(UserError):
        load_whole(WanTransformerFiles(transformer=path))


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    made = {}
    for layout in ("original", "diffusers"):
        made[layout] = tmp_path_factory.mktemp(layout)
        write_checkpoint(made[layout], golden_weights(golden), layout)
    return made


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_encoders_renamed_and_misshapen(golden, folders, tmp_path, data):
    weights = golden_weights(golden)
    part = data.draw(st.sampled_from(["vae", "text_encoder", "image_encoder"]))
    state = dict(getattr(weights, part))
    if part == "image_encoder" and data.draw(st.booleans()):
        state = {f"visual.{name}": value for name, value in state.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(state)))
        value = state.pop(name)
        if data.draw(st.booleans()):
            state[name] = torch.zeros(data.draw(st.sampled_from(SHAPES)), dtype=data.draw(st.sampled_from(DTYPES)))
        elif data.draw(st.booleans()):
            state[data.draw(st.sampled_from(NEW_NAMES))] = value
    path = tmp_path / "part.safetensors"
    save_file({name: value.clone() for name, value in state.items()}, path)
    key = {"vae": "vae_path", "text_encoder": "llm_path", "image_encoder": "clip_path"}[part]
    with contextlib.suppress(UserError):
        checkpoint = WanCheckpoint.open(folders["original"], **{key: path})
        getattr(checkpoint, f"load_{part}")()
    with contextlib.suppress(UserError):
        inspect.describe(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_changed_or_cut(golden, tmp_path, data):
    path = tmp_path / "w.safetensors"
    save_file(golden("wan_i2v_dit").weights, path)
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN_CONFIG.original_json()))
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content[: data.draw(st.sampled_from([len(content), header, header // 2, 8, 3, 0, -5]))]))
    with contextlib.suppress(UserError):
        load_whole(WanTransformerFiles(transformer=path))
