"""LoRAs of other tools: every spelling has the same effect, round trips are exact, strange files are refused."""

from __future__ import annotations

import contextlib
import json
import math

import lora_round_trips
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.errors import UserError
from loraedit_ext import lora
from loraedit_ext.lora import convert
from loraedit_ext.wan import MaskedWan
from models.wan.checkpoint import WanCheckpoint
from models.wan.keys import LORA

CPU = torch.device("cpu")
# Written by hand from the tools' own files, not from the maps under test: original -> diffusers.
BLOCK = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}
NAMES = {f"blocks.{i}.{ours}": f"blocks.{i}.{theirs}" for i in range(4) for ours, theirs in BLOCK.items()}
OUTER = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_projection.1": "condition_embedder.time_proj", "head.head": "proj_out",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
}
RANK, ALPHA = 4, 2.0
LAYOUTS = ["comfyui A/B", "comfyui down/up", "diffusers", "diffusers with metadata", "kohya", "peft", "peft original",
           "bare"]


@pytest.fixture(scope="module")
def model(tiny_wan):
    return MaskedWan(WanCheckpoint.open(tiny_wan), CPU)


@pytest.fixture(scope="module")
def plain(model):
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), torch.float32, CPU)
    return {name: value.clone() for name, value in transformer.state_dict().items()}


def branches(plain, names=NAMES, rank=RANK, seed=0):
    """A and B of each linear, with an effect that shows."""
    g = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(rank, plain[f"{name}.weight"].shape[1], generator=g) * 0.1,
               torch.randn(plain[f"{name}.weight"].shape[0], rank, generator=g) * 0.1)
        for name in names
    }


def write_layout(folder, layout, pairs, alpha=ALPHA, theirs=NAMES):
    """A file as the tool would write it, alpha where the tool keeps it; returns the path and the true scale."""
    state, header = {}, {"format": "pt"}
    scale = alpha / RANK
    for name, (down, up) in pairs.items():
        if layout == "comfyui A/B":
            state |= {f"diffusion_model.{name}.lora_A.weight": down, f"diffusion_model.{name}.lora_B.weight": up}
        elif layout == "comfyui down/up":
            state |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up,
                      f"diffusion_model.{name}.alpha": torch.tensor(alpha)}
        elif layout == "kohya":
            key = "lora_unet_" + name.replace(".", "_")
            state |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up,
                      f"{key}.alpha": torch.tensor(alpha, dtype=torch.bfloat16)}
        else:
            prefix = {"peft": "base_model.model.", "peft original": "base_model.model.", "bare": ""}.get(
                layout, "transformer."
            )
            key = prefix + (name if layout in ("peft original", "bare") else theirs[name])
            default = ".default" if layout == "bare" else ""
            state |= {f"{key}.lora_A{default}.weight": down, f"{key}.lora_B{default}.weight": up}
    if layout == "diffusers with metadata":
        config = {"transformer.r": RANK, "transformer.lora_alpha": alpha, "transformer.alpha_pattern": {}}
        header["lora_adapter_metadata"] = json.dumps(config)
    if layout.startswith("peft"):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": alpha}))
    path = folder / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path, metadata=header)
    return path, 1.0 if layout in ("comfyui A/B", "diffusers", "bare") else scale


def inputs(model):
    config = model.checkpoint.config
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 16, 2, 4, 4), (1, 20, 2, 4, 4), (1, 8, config.text_dim), (1, 257, config.image_dim)]
    noisy, y, text, image = (torch.randn(shape, generator=g) for shape in shapes)
    return noisy, torch.tensor([400.0]), y, torch.nn.functional.pad(text, (0, 0, 0, 504)), image


def merged(model, plain, changes):
    """The output of the model with `changes` added to its weights: what any LoRA must amount to."""
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), torch.float32, CPU)
    transformer.load_state_dict({n: plain[n] + changes.get(n, 0.0) for n in plain}, assign=True)
    with torch.no_grad():
        return transformer(*inputs(model))


def stacked(model, stack):
    transformer = model.build_transformer()
    layers = transformer.layers()
    model.load_weights(layers, torch.float32, CPU)
    lora.attach(transformer, layers, lora.combine(stack), CPU)
    with torch.no_grad():
        return transformer(*inputs(model))


def assert_same_effect(actual, expected, bare):
    assert (expected - bare).abs().max() > 0.05
    torch.testing.assert_close(actual, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_spelling_has_the_effect_of_the_merged_weights(model, plain, tmp_path, layout):
    pairs = branches(plain)
    path, scale = write_layout(tmp_path, layout, pairs)
    found = lora.read(path, model)
    assert found.ranks == dict.fromkeys(NAMES, RANK)
    changes = {f"{name}.weight": scale * up @ down for name, (down, up) in pairs.items()}
    assert_same_effect(stacked(model, [(found, 1.0)]), merged(model, plain, changes), merged(model, plain, {}))
    assert lora.read(tmp_path, model).weights.keys() == found.weights.keys()  # the folder alone will do


def test_rslora_and_alpha_patterns_of_peft(model, plain, tmp_path):
    pairs = branches(plain, [name for name in NAMES if name.startswith("blocks.0.")])
    path, _ = write_layout(tmp_path, "peft", pairs)
    config = {"r": RANK, "lora_alpha": 6, "use_rslora": True, "alpha_pattern": {"^blocks.0.attn1.to_q": 3}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = lora.read(path, model).weights
    for name, alpha in (("blocks.0.self_attn.q", 3), ("blocks.0.self_attn.k", 6)):
        expected = pairs[name][1] * alpha / math.sqrt(RANK)
        torch.testing.assert_close(found[f"{name}.lora_B.weight"], expected)


def test_a_peft_file_without_its_config_is_refused_rather_than_guessed(model, plain, tmp_path):
    path, _ = write_layout(tmp_path, "peft", branches(plain))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UserError, match=r"strength of .* is unknown.*adapter_config\.json"):
        lora.read(path, model)


def test_a_distilled_lora_on_top_of_another(model, plain, tmp_path):
    """Other rank, other targets, image keys, outer linears, a convolution, norms, biases: as lightx2v's files have."""
    (tmp_path / "edit").mkdir()
    edit_pairs = branches(plain, [n for n in NAMES if "_img" not in n])
    edit_path, scale = write_layout(tmp_path / "edit", "comfyui down/up", edit_pairs)
    pairs = branches(plain, ["blocks.1.cross_attn.k_img", "blocks.0.self_attn.q", *OUTER], rank=7, seed=5)
    state = {}
    for name, (down, up) in pairs.items():
        state |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up}
    g = torch.Generator().manual_seed(8)
    conv_down = torch.randn(3, 36, 1, 2, 2, generator=g) * 0.1
    conv_up = torch.randn(96, 3, 1, 1, 1, generator=g) * 0.1
    extra = {
        "blocks.0.self_attn.norm_q.diff": torch.randn(96, generator=g) * 0.3, "blocks.2.ffn.0.diff_b": torch.randn(192),
        "blocks.3.modulation.diff": torch.randn(1, 6, 96, generator=g) * 0.1, "head.head.diff_b": torch.ones(64) * 0.2,
        "patch_embedding.lora_down.weight": conv_down, "patch_embedding.lora_up.weight": conv_up,
    }
    save_file(state | {f"diffusion_model.{k}": v for k, v in extra.items()}, tmp_path / "distilled.safetensors")
    stack = [(lora.read(edit_path, model), 0.8), (lora.read(tmp_path / "distilled.safetensors", model), 0.6)]
    changes = {f"{name}.weight": 0.8 * scale * up @ down for name, (down, up) in edit_pairs.items()}
    for name, (down, up) in pairs.items():
        key = f"{name}.weight"
        changes[key] = changes.get(key, 0.0) + 0.6 * up @ down
    changes["patch_embedding.weight"] = 0.6 * torch.einsum("or,rithw->oithw", conv_up[:, :, 0, 0, 0], conv_down)
    for name, parameter in (("blocks.0.self_attn.norm_q.diff", "blocks.0.self_attn.norm_q.weight"),
                            ("blocks.2.ffn.0.diff_b", "blocks.2.ffn.0.bias"),
                            ("blocks.3.modulation.diff", "blocks.3.modulation"),
                            ("head.head.diff_b", "head.head.bias")):
        changes[parameter] = 0.6 * extra[name]
    assert_same_effect(stacked(model, stack), merged(model, plain, changes), merged(model, plain, {}))
    assert lora.combine(stack).ranks["blocks.0.self_attn.q"] == RANK + 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trips_are_exact(model, plain, tmp_path, dtype):
    pairs = {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in branches(plain).items()}
    path, _ = write_layout(tmp_path, "comfyui A/B", pairs)
    lora_round_trips.assert_exact(path, tmp_path)


@pytest.mark.parametrize("to", ["comfyui", "diffusers", "kohya"])
def test_diffusers_own_loader_gives_exports_the_same_effect(model, plain, tmp_path, to):
    from diffusers import WanTransformer3DModel
    from diffusers.loaders import WanLoraLoaderMixin

    from models.wan.random_weights import write_random_checkpoint

    pairs = branches(plain)
    mixed = {name: branches(plain, [name], rank=6)[name] if name.endswith("ffn.0") else p for name, p in pairs.items()}
    path, _ = write_layout(tmp_path, "comfyui down/up", pairs if to != "diffusers" else mixed)
    export = tmp_path / "export.safetensors"
    assert convert.main([str(path), str(export), "--to", to]) == 0
    write_random_checkpoint(tmp_path / "diffusers", layout="diffusers")
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "diffusers" / "transformer")
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(export), return_lora_metadata=True)
    theirs.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    noisy, t, y, text, image = inputs(model)
    with torch.no_grad():
        reference = theirs(torch.cat([noisy, y], 1), t, text, image, return_dict=False)[0]
    ours = stacked(model, [(lora.read(path, model), 1.0)])
    assert (reference - merged(model, plain, {})).abs().max() > 0.05
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)
    if to == "diffusers":
        assert metadata["transformer.r"] == RANK


def test_our_metadata_and_a_tools_own_survive_a_conversion(model, plain, tmp_path):
    pairs = branches(plain, ["blocks.0.ffn.0"])
    weights = {f"blocks.0.ffn.0.lora_{ab}.weight": w for ab, w in zip("AB", pairs["blocks.0.ffn.0"], strict=True)}
    found = lora.LoraFile(tmp_path / "a.safetensors", weights, {"trigger": "p3rs0n,"}, header={"ss_note": "x"})
    lora.write(found, tmp_path / "a.safetensors", LORA)
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    again = lora.read(tmp_path / "b.safetensors", model)
    assert again.metadata == {"trigger": "p3rs0n,"}
    assert again.header["ss_note"] == "x"
    assert again.layout == "kohya"
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.get_tensor("lora_unet_blocks_0_ffn_0.alpha").item() == RANK


def test_differences_need_comfyuis_format_and_survive_it(model, plain, tmp_path):
    state = {"diffusion_model.blocks.0.norm3.diff": torch.ones(96), "diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(192)}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"2 norms or biases.*only ComfyUI's"):
        convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert not (tmp_path / "b.safetensors").exists()
    convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "comfyui")
    assert load_file(tmp_path / "b.safetensors").keys() == state.keys()


def test_conversion_refuses_to_overwrite(plain, tmp_path):
    path, _ = write_layout(tmp_path, "diffusers", branches(plain))
    before = path.read_bytes()
    with pytest.raises(UserError, match="is there already"):
        convert.convert(path, path, "comfyui")
    assert path.read_bytes() == before


A, B = torch.ones(4, 96), torch.ones(96, 4)
Q = "diffusion_model.blocks.0.self_attn.q"
BAD = {
    "half a branch": ({f"{Q}.lora_A.weight": A}, "only half a branch"),
    "shapes": ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": torch.ones(96, 5)}, r"A \(4, 96\), B \(96, 5\)"),
    "rank 0": ({f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0]}, "has shapes"),
    "scalar": ({f"{Q}.lora_A.weight": torch.tensor(1.0), f"{Q}.lora_B.weight": B}, "has shapes"),
    "integers": ({f"{Q}.lora_A.weight": A.int(), f"{Q}.lora_B.weight": B}, "expected floating point"),
    "nan alpha": ({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B, f"{Q}.alpha": torch.tensor(math.nan)},
                  "one finite number"),
    "long alpha": ({f"{Q}.lora_down.weight": A, f"{Q}.lora_up.weight": B, f"{Q}.alpha": torch.ones(2)},
                   "one finite number"),
    "twice": ({f"{Q}.lora_A.weight": A, f"{Q}.lora_down.weight": A + 1, f"{Q}.lora_B.weight": B}, "twice"),
    "LoHa": ({f"{Q}.hada_w1_a": A}, "looks like a LoHa"),
    "DoRA": ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.lora_magnitude_vector": torch.ones(96)}, "a DoRA"),
    "Hunyuan": ({"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": A}, "HunyuanVideo"),
    "SDXL": ({"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": A}, "Stable Diffusion"),
    "checkpoint": ({"blocks.0.self_attn.q.weight": B @ A}, "not a LoRA for wan"),
    "empty": ({}, "found none"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_lora_of_this_family_is_refused(model, tmp_path, case):
    state, message = BAD[case]
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=message):
        lora.read(tmp_path / "a.safetensors", model)


@pytest.mark.parametrize("state", [
    {f"{Q}.lora_A.weight": torch.ones(4, 80), f"{Q}.lora_B.weight": B},
    {f"{Q.replace('.0.', '.9.')}.lora_A.weight": A, f"{Q.replace('.0.', '.9.')}.lora_B.weight": B},
    {"diffusion_model.blocks.0.norm3.diff": torch.ones(80)}, {"diffusion_model.blocks.9.norm3.diff": torch.ones(96)},
])  # fmt: skip
def test_a_lora_of_another_size_is_refused_at_attachment(model, tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="of another model"):
        stacked(model, [(lora.read(tmp_path / "a.safetensors", model), 1.0)])


@pytest.mark.parametrize("header", ["[", "[]", '{"transformer.lora_alpha": "x"}', '{"transformer.lora_alpha": NaN}',
                                    '{"transformer.alpha_pattern": {"(a+)+": 1}}', "[" * 100_000])
def test_a_hostile_header_ends_in_a_user_error(model, tmp_path, header):
    state = {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B}
    save_file(state, tmp_path / "a.safetensors", metadata={"lora_adapter_metadata": header})
    with pytest.raises(UserError):
        lora.read(tmp_path / "a.safetensors", model)
    if header.startswith("["):
        save_file(state, tmp_path / "a.safetensors", metadata={"loraedit": header})
        with pytest.raises(UserError, match="loraedit"):
            lora.read(tmp_path / "a.safetensors", model)


PARTS = ["lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "lora_B.bias", "alpha", "diff",
         "diff_b", "lora_mid.weight", "dora_scale", ""]
PREFIXES = ["diffusion_model.", "transformer.", "lora_unet_", "base_model.model.", "", "base_model.model.transformer."]
MODULES = ["blocks.0.self_attn.q", "blocks_0_ffn_0", "blocks.1.attn2.add_k_proj", "patch_embedding", "blocks.0.norm3",
           "blocks.{}.x", "blocks.0.modulation", "{0}", "..", "head.head"]
SHAPES = [(), (0,), (4,), (4, 96), (96, 4), (4, 36, 1, 2, 2), (96, 4, 1, 1, 1), (1, 1), (2, 0)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_of_names_and_shapes_ends_in_a_lora_or_a_user_error(model, tmp_path, data):
    key = st.tuples(st.sampled_from(PREFIXES), st.sampled_from(MODULES), st.sampled_from(PARTS))
    keys = data.draw(st.lists(key, max_size=6, unique=True))
    dtype = st.sampled_from([torch.float32, torch.bfloat16, torch.int32, torch.float8_e4m3fn, torch.bool])
    state = {
        f"{prefix}{module}.{part}": torch.zeros(data.draw(st.sampled_from(SHAPES)), dtype=data.draw(dtype))
        for prefix, module, part in keys
    }
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "adapter_config.json").write_text(data.draw(st.sampled_from(
        ["{}", '{"lora_alpha": 3}', '{"lora_alpha": null, "alpha_pattern": []}', "[]", '{"lora_alpha": 1, "x']
    )))
    with contextlib.suppress(UserError):
        found = lora.read(tmp_path / "a.safetensors", model)
        assert found.ranks or found.differences
        stacked(model, [(found, 1.0)])
