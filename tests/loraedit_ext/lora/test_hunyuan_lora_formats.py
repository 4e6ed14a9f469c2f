"""HunyuanVideo LoRAs of other tools: every spelling has the effect of the merged weights; exports, merges, inspection."""

from __future__ import annotations

import json

import lora_round_trips
import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from loraedit_ext import inspect, lora
from loraedit_ext.hunyuan import MaskedHunyuan
from loraedit_ext.lora import convert, merge
from models.checkpoint import open_tensors
from models.hunyuan.checkpoint import HunyuanCheckpoint, HunyuanTransformerFiles

CPU = torch.device("cpu")
DIM, MLP = 96, 192
# Written by hand from the tools' own files, not from the maps under test: original -> ComfyUI's own, diffusers' parts.
DOUBLE = {
    "img_attn_qkv": ("img_attn.qkv", ["attn.to_q", "attn.to_k", "attn.to_v"]),
    "img_attn_proj": ("img_attn.proj", ["attn.to_out.0"]), "img_mlp.fc1": ("img_mlp.0", ["ff.net.0.proj"]),
    "img_mlp.fc2": ("img_mlp.2", ["ff.net.2"]),
    "txt_attn_qkv": ("txt_attn.qkv", ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]),
    "txt_attn_proj": ("txt_attn.proj", ["attn.to_add_out"]), "txt_mlp.fc1": ("txt_mlp.0", ["ff_context.net.0.proj"]),
    "txt_mlp.fc2": ("txt_mlp.2", ["ff_context.net.2"]), "img_mod.linear": ("img_mod.lin", ["norm1.linear"]),
    "txt_mod.linear": ("txt_mod.lin", ["norm1_context.linear"]),
}
SINGLE = {
    "linear1": ("linear1", ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]), "linear2": ("linear2", ["proj_out"]),
    "modulation.linear": ("modulation.lin", ["norm.linear"]),
}
NAMES = {
    f"{ours}.{i}.{module}": (f"{ours}.{i}.{comfyui}", [f"{theirs}.{i}.{part}" for part in parts])
    for ours, theirs, table in (("double_blocks", "transformer_blocks", DOUBLE),
                                ("single_blocks", "single_transformer_blocks", SINGLE))
    for i in range(2) for module, (comfyui, parts) in table.items()
}
RANK, ALPHA = 4, 2.0
LAYOUTS = ["transformer", "diffusion_model with alpha", "comfyui's own", "diffusers", "diffusers with metadata", "kohya",
           "kohya of comfyui's own", "peft", "peft original", "bare"]


@pytest.fixture(scope="module", params=["token_replace", "latent_concat"])
def model(request, tiny_hunyuan):
    return MaskedHunyuan(HunyuanCheckpoint.open(tiny_hunyuan[request.param]), CPU)


@pytest.fixture(scope="module")
def one(tiny_hunyuan):
    return MaskedHunyuan(HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]), CPU)


def plain_of(model):
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), torch.float32, CPU)
    return {name: value.clone() for name, value in transformer.state_dict().items()}


def sizes(name):
    """Rows of a linear's parts in diffusers."""
    parts = len(NAMES[name][1])
    if parts == 1:
        rows = {"fc1": MLP, "linear": DIM * (6 if "double" in name else 3)}.get(name.rpartition(".")[2], DIM)
        return [rows]
    return [DIM, DIM, DIM, MLP][:parts]


def branches(plain, seed=0, shared=True):
    """A and B of each linear. Not shared: the parts of a fused one were trained apart, each with an A of its own."""
    g = torch.Generator().manual_seed(seed)
    pairs = {}
    for name in NAMES:
        width = plain[f"{name}.weight"].shape[1]
        rows = sizes(name)
        downs = [torch.randn(RANK, width, generator=g) * 0.1 for _ in rows]
        pairs[name] = [(downs[0] if shared else down, torch.randn(size, RANK, generator=g) * 0.1)
                       for down, size in zip(downs, rows, strict=True)]
    return pairs


def change(pairs, scale):
    """What the branches amount to, added to the weights."""
    return {f"{n}.weight": scale * torch.cat([up @ down for down, up in parts]) for n, parts in pairs.items()}


def write_layout(folder, layout, pairs):
    """A file as the tool would write it, alpha where the tool keeps it; returns the path and the true scale."""
    state, header = {}, {"format": "pt"}
    own_alpha = layout in ("diffusion_model with alpha", "comfyui's own", "kohya", "kohya of comfyui's own")
    parts_apart = layout in ("diffusers", "diffusers with metadata", "peft")
    for name, parts in pairs.items():
        comfyui, theirs = NAMES[name]
        if parts_apart:
            prefix = "base_model.model." if layout == "peft" else "transformer."
            for key, (down, up) in zip(theirs, parts, strict=True):
                state |= {f"{prefix}{key}.lora_A.weight": down.clone(), f"{prefix}{key}.lora_B.weight": up}
            continue
        down, up = parts[0][0], torch.cat([up for _, up in parts])
        key = {
            "transformer": f"transformer.{name}", "diffusion_model with alpha": f"diffusion_model.{name}",
            "comfyui's own": f"diffusion_model.{comfyui}", "kohya": "lora_unet_" + name.replace(".", "_"),
            "kohya of comfyui's own": "lora_unet_" + comfyui.replace(".", "_"),
            "peft original": f"base_model.model.{name}", "bare": name,
        }[layout]
        first, second = ("lora_down", "lora_up") if own_alpha else ("lora_A", "lora_B")
        state |= {f"{key}.{first}.weight": down, f"{key}.{second}.weight": up}
        if own_alpha:
            state[f"{key}.alpha"] = torch.tensor(ALPHA)
    if layout == "diffusers with metadata":
        header["lora_adapter_metadata"] = json.dumps({"transformer.r": RANK, "transformer.lora_alpha": ALPHA})
    if layout.startswith("peft"):
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    path = folder / "adapter_model.safetensors"
    save_file(state, path, metadata=header)
    return path, 1.0 if layout in ("transformer", "diffusers", "bare") else ALPHA / RANK


def inputs(config, text=7):
    g = torch.Generator().manual_seed(0)
    latents, states, pooled = (
        torch.randn(shape, generator=g)
        for shape in ((1, config.in_channels, 2, 4, 4), (1, text, config.text_dim), (1, config.pooled_dim))
    )
    preserved = torch.zeros(1, 1, 2, 4, 4)
    preserved[:, :, 0] = 1
    return latents, torch.tensor([400.0]), states, torch.tensor([text]), pooled, torch.tensor([6000.0]), preserved


def output(model, plain=None, changes=None, stack=()):
    """The model's output with `changes` added to its weights, or with LoRAs attached."""
    transformer = model.build_transformer()
    layers = transformer.layers()
    model.load_weights(layers, torch.float32, CPU)
    if changes is not None:
        transformer.load_state_dict({n: plain[n] + changes.get(n, 0.0) for n in plain}, assign=True)
    if stack:
        lora.attach(transformer, layers, lora.combine(list(stack)), CPU)
    with torch.no_grad():
        return transformer(*inputs(model.checkpoint.config))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_spelling_has_the_effect_of_the_merged_weights(model, tmp_path, layout):
    plain = plain_of(model)
    pairs = branches(plain, shared=layout not in ("diffusers", "diffusers with metadata", "peft"))
    path, scale = write_layout(tmp_path, layout, pairs)
    found = lora.read(path, model)
    assert found.ranks.keys() == NAMES.keys()
    expected = output(model, plain, change(pairs, scale))
    assert (expected - output(model)).abs().max() > 0.05
    torch.testing.assert_close(output(model, stack=[(found, 1.0)]), expected, atol=1e-4, rtol=0)


def test_two_loras_of_different_tools_add_up(one, tmp_path):
    plain = plain_of(one)
    first, second = branches(plain, seed=1), branches(plain, seed=2, shared=False)
    for name in "ab":
        (tmp_path / name).mkdir()
    one_path, scale = write_layout(tmp_path / "a", "comfyui's own", first)
    two_path, _ = write_layout(tmp_path / "b", "diffusers", second)
    changes = change(first, scale)
    changes = {name: changes[name] + 0.5 * value for name, value in change(second, 1.0).items()}
    found = output(one, stack=[(lora.read(one_path, one), 1.0), (lora.read(two_path, one), 0.5)])
    torch.testing.assert_close(found, output(one, plain, changes), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trips_are_exact(one, tmp_path, dtype):
    pairs = {name: [(down.to(dtype), up.to(dtype)) for down, up in parts] for name, parts in branches(plain_of(one)).items()}
    path, _ = write_layout(tmp_path, "transformer", pairs)
    lora_round_trips.assert_exact(path, tmp_path)


def test_separately_trained_parts_survive_a_round_trip_in_effect(one, tmp_path):
    pairs = branches(plain_of(one), shared=False)
    path, _ = write_layout(tmp_path, "diffusers", pairs)
    for number, to in enumerate(["comfyui", "diffusers", "kohya"]):
        path, previous = tmp_path / f"{number}.safetensors", path
        convert.convert(previous, path, to)
        weights = lora.read(path, one).weights
        for name, value in change(pairs, 1.0).items():
            module = name.removesuffix(".weight")
            found = weights[f"{module}.lora_B.weight"] @ weights[f"{module}.lora_A.weight"]
            torch.testing.assert_close(found, value, atol=1e-6, rtol=0)


def library_twin(model, folder):
    """diffusers' class with random weights, saved, and the same read by us."""
    from diffusers import HunyuanVideoTransformer3DModel

    config = model.checkpoint.config
    torch.manual_seed(0)
    twin = HunyuanVideoTransformer3DModel(
        in_channels=config.in_channels, num_attention_heads=config.num_heads, attention_head_dim=config.head_dim,
        num_layers=config.num_double, num_single_layers=config.num_single, num_refiner_layers=config.num_refiner,
        mlp_ratio=MLP / DIM, text_embed_dim=config.text_dim, pooled_projection_dim=config.pooled_dim,
        guidance_embeds=config.guidance_embed, rope_axes_dim=config.rope_axes, image_condition_type=config.variant,
    ).eval()
    twin.save_pretrained(folder)
    return twin


@pytest.mark.parametrize("shared", [True, False])
def test_diffusers_own_loader_gives_its_export_the_same_effect(model, tmp_path, shared):
    from diffusers.loaders import HunyuanVideoLoraLoaderMixin

    twin = library_twin(model, tmp_path / "transformer")
    ours = MaskedHunyuan(HunyuanTransformerFiles(tmp_path / "transformer"), CPU)
    pairs = branches(plain_of(ours), shared=shared)
    path, _ = write_layout(tmp_path, "diffusion_model with alpha" if shared else "diffusers", pairs)
    export = tmp_path / "export.safetensors"
    assert convert.main([str(path), str(export), "--to", "diffusers"]) == 0

    def theirs():
        latents, t, text, length, pooled, guidance, _ = inputs(ours.checkpoint.config)
        guidance = guidance if ours.checkpoint.config.guidance_embed else None
        with torch.no_grad():
            return twin(latents, t, text, torch.ones(1, int(length)), pooled, guidance).sample

    bare = theirs()
    torch.testing.assert_close(output(ours), bare, atol=1e-4, rtol=0)
    state, metadata = HunyuanVideoLoraLoaderMixin.lora_state_dict(str(export), return_lora_metadata=True)
    twin.load_lora_adapter(state, prefix="transformer", metadata=metadata)
    reference = theirs()
    assert (reference - bare).abs().max() > 0.02
    torch.testing.assert_close(output(ours, stack=[(lora.read(path, ours), 1.0)]), reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layout", ["original", "comfyui", "diffusers"])
def test_merging_equals_attaching(one, tmp_path, layout, capsys):
    if layout == "diffusers":
        library_twin(one, tmp_path / "ckpt")
        source, files = tmp_path / "ckpt", HunyuanTransformerFiles(tmp_path / "ckpt")
    elif layout == "comfyui":
        source = tmp_path / "comfyui.safetensors"
        save_file({f"model.model.{in_comfyuis(n)}": v for n, v in plain_of(one).items()}, source)
        files = HunyuanTransformerFiles(source)
    else:
        source, files = one.checkpoint.transformer.parents[2], one.checkpoint
    assert files.layout == layout
    model = MaskedHunyuan(files, CPU)
    path, _ = write_layout(tmp_path, "kohya", branches(plain_of(model)))
    assert merge.main(["--ckpt", str(source), "--lora", f"{path}=0.5", "--out", str(tmp_path / "merged")]) == 0
    assert f"{len(NAMES)} linears changed by 1 LoRA" in capsys.readouterr().out
    merged = HunyuanTransformerFiles(tmp_path / "merged")
    assert merged.layout == "original"
    assert merged.config == files.config
    expected = output(model, stack=[(lora.read(path, model), 0.5)])
    assert (expected - output(model)).abs().max() > 0.01
    torch.testing.assert_close(output(MaskedHunyuan(merged, CPU)), expected, atol=1e-4, rtol=0)


def in_comfyuis(name):
    module, _, leaf = name.rpartition(".")
    if module in NAMES:
        return f"{NAMES[module][0]}.{leaf}"
    for ours, theirs in (
        ("_in.mlp.0", "_in.in_layer"), ("_in.mlp.2", "_in.out_layer"), ("t_embedder.mlp.0", "t_embedder.in_layer"),
        ("t_embedder.mlp.2", "t_embedder.out_layer"), ("c_embedder.linear_1", "c_embedder.in_layer"),
        ("c_embedder.linear_2", "c_embedder.out_layer"), ("self_attn_qkv", "self_attn.qkv"),
        ("self_attn_proj", "self_attn.proj"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.2"),
        ("attn_q_norm.weight", "attn.norm.query_norm.scale"), ("attn_k_norm.weight", "attn.norm.key_norm.scale"),
        (".q_norm.weight", ".norm.query_norm.scale"), (".k_norm.weight", ".norm.key_norm.scale"),
    ):
        name = name.replace(ours, theirs)
    return name


def test_scaled_8_bit_weights_are_merged_with_their_scales(one, tmp_path):
    plain = plain_of(one)
    name = "double_blocks.0.img_mlp.fc1.weight"
    stored = plain | {
        name: (plain[name] * 16).to(torch.float8_e4m3fn), name.replace("weight", "scale_weight"): torch.tensor(1 / 16)
    }
    save_file(stored, tmp_path / "scaled.safetensors")
    pairs = branches(plain)
    path, scale = write_layout(tmp_path, "kohya", pairs)
    merge.merge(tmp_path / "scaled.safetensors", [(path, 1.0)], tmp_path / "out")
    found = open_tensors(tmp_path / "out")[name]
    assert found.dtype == torch.bfloat16
    expected = stored[name].float() / 16 + change(pairs, scale)[name]
    torch.testing.assert_close(found.float(), expected, atol=2e-3, rtol=1e-2)


def test_a_lora_of_another_size_or_family_is_refused(one, tmp_path):
    key = "transformer.double_blocks.7.img_attn_proj.lora_"
    save_file({f"{key}A.weight": torch.ones(4, DIM), f"{key}B.weight": torch.ones(DIM, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="of another model"):
        output(one, stack=[(lora.read(tmp_path / "a.safetensors", one), 1.0)])
    key = "diffusion_model.blocks.0.self_attn.q.lora_"
    save_file({f"{key}A.weight": torch.ones(4, DIM), f"{key}B.weight": torch.ones(DIM, 4)}, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"not a LoRA for hunyuan-video.*looks like a Wan LoRA"):
        lora.read(tmp_path / "b.safetensors", one)


@pytest.mark.parametrize(("layout", "words"), [
    ("transformer", ["hunyuan-video, comfyui names", "loaded by   ComfyUI, diffusers, diffusion-pipe, LoRA-Edit"]),
    ("comfyui's own", ["hunyuan-video, comfyui names", "loaded by   ComfyUI, LoRA-Edit; for diffusers convert it"]),
    ("diffusion_model with alpha", ["loaded by   ComfyUI, LoRA-Edit; for diffusers convert it"]),
    ("diffusers", ["hunyuan-video, diffusers names", "loaded by   diffusers, LoRA-Edit"]),
    ("kohya", ["hunyuan-video, kohya names", "loaded by   ComfyUI, musubi-tuner, LoRA-Edit; for diffusers convert it"]),
])
def test_inspection_of_a_lora(one, tmp_path, layout, words):
    path, _ = write_layout(tmp_path, layout, branches(plain_of(one)))
    text = "\n".join(inspect.describe(path))
    for word in [*words, f"rank        {RANK} ({len(NAMES)} linears)", "double_blocks.N.img_attn_qkv", "single_blocks.1"]:
        assert word in text, text
