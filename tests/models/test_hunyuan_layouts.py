"""HunyuanVideo-I2V in every layout that users have gives the numbers of the official layout, exactly."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from hunyuan_parts import comfyui_name, comfyui_vae, language_model, make_parts, save, vision_tower, write_comfyui
from safetensors.torch import load_file

from common.errors import UserError
from models.checkpoint import open_tensors
from models.hunyuan.checkpoint import TRANSFORMER_FILE, HunyuanCheckpoint, HunyuanTransformerFiles
from models.hunyuan.encoders import HunyuanVAE
from models.hunyuan.wrapper import HunyuanI2V

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
VARIANTS = ("token_replace", "latent_concat")


@pytest.fixture(scope="module", params=VARIANTS)
def parts(request, tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def token_replace(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("one"), "token_replace")


def write_kijai(root, parts):
    """Kijai's repacks have the original names; LLaVA is the folder of xtuner."""
    return {
        "transformer_path": save(root / "hunyuan_video_I2V_720_bf16.safetensors", parts.transformer),
        "vae_path": save(root / "hunyuan_video_vae_bf16.safetensors", parts.vae),
        "llm_path": parts.folder / "text_encoder_i2v", "clip_path": parts.folder / "text_encoder_2",
    }


def velocity(files):
    """The transformer's output for fixed inputs."""
    model = HunyuanI2V(files, CPU)
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), torch.float32, CPU)
    config = files.config
    g = torch.Generator().manual_seed(1)
    latents, text, pooled = (
        torch.randn(shape, generator=g)
        for shape in ((2, config.in_channels, 2, 4, 6), (2, 9, config.text_dim), (2, config.pooled_dim))
    )
    preserved = torch.zeros(2, 1, 2, 4, 6)
    preserved[:, :, 0] = 1
    with torch.no_grad():
        return transformer(latents, torch.tensor([700.0, 20.0]), text, torch.tensor([9, 5]), pooled,
                           torch.tensor([6000.0, 1000.0]), preserved)


def test_the_written_names_are_comfyuis(token_replace):
    """Some whole names as ComfyUI's files have them, so that the table above is no private invention."""
    names = {comfyui_name(name) for name in token_replace.transformer}
    assert len(names) == len(token_replace.transformer)
    assert names > {
        "img_in.proj.weight", "time_in.in_layer.weight", "guidance_in.out_layer.bias", "vector_in.in_layer.weight",
        "txt_in.individual_token_refiner.blocks.0.self_attn.qkv.weight", "txt_in.c_embedder.in_layer.weight",
        "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1.weight", "txt_in.t_embedder.out_layer.weight",
        "double_blocks.0.img_attn.norm.key_norm.scale", "double_blocks.1.txt_mlp.2.bias",
        "single_blocks.0.modulation.lin.weight", "single_blocks.1.norm.query_norm.scale", "single_blocks.0.linear1.weight",
        "final_layer.adaLN_modulation.1.weight",
    }


@pytest.mark.parametrize("layout", ["comfyui", "kijai"])
def test_single_files_of_all_parts_equal_the_official_folder(parts, tmp_path, layout):
    official = HunyuanCheckpoint.open(parts.folder)
    writer = {"comfyui": write_comfyui, "kijai": write_kijai}[layout]
    checkpoint = HunyuanCheckpoint.open(None, **writer(tmp_path, parts))
    assert checkpoint.layout == {"comfyui": "comfyui", "kijai": "original"}[layout]
    assert checkpoint.config == official.config
    assert torch.equal(velocity(checkpoint), velocity(official))
    ours, theirs = checkpoint.load_vae(), official.load_vae()
    video = torch.rand(1, 3, 5, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = theirs.encode(video)
    assert torch.equal(ours.encode(video), latents)
    assert torch.equal(ours.decode(latents), theirs.decode(latents))
    image = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3)) * 2 - 1
    one, two = (each.load_text_encoder(dtype=torch.float32).encode("a red square jumps", image)
                for each in (checkpoint, official))
    assert all(torch.equal(one[name], two[name]) for name in ("text", "text_length", "pooled"))


@pytest.mark.parametrize("prefix", ["", "model.", "model.diffusion_model.", "diffusion_model."])
def test_every_prefix(token_replace, tmp_path, prefix):
    state = {prefix + comfyui_name(name): value for name, value in token_replace.transformer.items()}
    files = HunyuanTransformerFiles(save(tmp_path / "a.safetensors", state))
    found = files.transformer_tensors()
    assert found.keys() == token_replace.transformer.keys()
    assert all(torch.equal(found[name], value) for name, value in token_replace.transformer.items())


def test_norms_of_newer_comfyui_files_are_called_weight(token_replace, tmp_path):
    state = {comfyui_name(n).replace("_norm.scale", "_norm.weight"): v for n, v in token_replace.transformer.items()}
    found = HunyuanTransformerFiles(save(tmp_path / "a.safetensors", state)).transformer_tensors()
    assert found.keys() == token_replace.transformer.keys()


def test_comfyuis_vae_gives_the_original_codes_latents(golden, tmp_path):
    part = golden("hunyuan_vae")
    path = save(tmp_path / "vae.safetensors", comfyui_vae(part.weights))
    vae = HunyuanVAE.load(open_tensors(path), {"norm_num_groups": 4})
    assert (vae.encode(part.inputs["video"]) - part.outputs["latents"]).abs().max() < 2e-5
    assert (vae.decode(part.outputs["latents"]) - part.outputs["decoded"].clamp(-1, 1)).abs().max() < 4e-5


def scaled(state, keep):
    """Matrices in e4m3 with a scale, the rest as it is, and the marker: and the numbers this stands for."""
    stored, meant = {"scaled_fp8": torch.zeros(2).to(E4M3)}, {}
    for name, value in state.items():
        if value.ndim != 2 or any(part in name for part in keep):
            stored[name] = meant[name] = value
            continue
        scale = value.abs().max() / 448
        stored |= {name: (value / scale).to(E4M3), name.removesuffix("weight") + "scale_weight": scale}
        meant[name] = stored[name].float() * scale
    return stored, meant


@pytest.mark.parametrize("names", ["comfyui", "kijai"])
def test_scaled_8_bit_transformers_are_weight_times_scale(parts, tmp_path, names):
    state = {comfyui_name(n) if names == "comfyui" else n: v for n, v in parts.transformer.items()}
    stored, meant = scaled(state, keep=("_in.", "final_layer", "mod"))
    one = HunyuanTransformerFiles(save(tmp_path / "fp8_scaled.safetensors", stored))
    two = HunyuanTransformerFiles(save(tmp_path / "meant.safetensors", meant))
    exact = velocity(HunyuanTransformerFiles(parts.folder / TRANSFORMER_FILE))
    assert torch.equal(velocity(one), velocity(two))
    assert 0 < (velocity(one) - exact).norm() < 0.2 * exact.norm()


def test_plain_8_bit_transformers(token_replace, tmp_path):
    state = {n: v.to(E4M3) if v.ndim == 2 else v for n, v in token_replace.transformer.items()}
    one = HunyuanTransformerFiles(save(tmp_path / "fp8_e4m3fn.safetensors", state))
    two = HunyuanTransformerFiles(save(tmp_path / "meant.safetensors", {n: v.float() for n, v in state.items()}))
    assert torch.equal(velocity(one), velocity(two))


def test_a_scaled_8_bit_llava_is_weight_times_scale(token_replace, tmp_path):
    paths = write_comfyui(tmp_path, token_replace)
    stored, meant = scaled(language_model(token_replace.llava), keep=("embed_tokens",))
    image = torch.zeros(3, 32, 32)
    texts = {}
    for name, state in (("stored", stored), ("meant", meant)):
        save(paths["llm_path"], state)
        checkpoint = HunyuanCheckpoint.open(None, **paths)
        assert ("llava in two files (scaled float8_e4m3fn)" in checkpoint.describe_layout()) == (name == "stored")
        texts[name] = checkpoint.load_text_encoder(dtype=torch.float32).encode("a red square", image)["text"]
    assert torch.equal(texts["stored"], texts["meant"])
    plain = HunyuanCheckpoint.open(token_replace.folder).load_text_encoder(dtype=torch.float32)
    exact = plain.encode("a red square", image)["text"]
    assert 0 < (texts["stored"] - exact).norm() < 0.2 * exact.norm()


def test_the_layout_is_said_in_one_line(token_replace, tmp_path):
    paths = write_comfyui(tmp_path, token_replace)
    assert HunyuanCheckpoint.open(None, **paths).describe_layout() == (
        "transformer comfyui (float32), vae comfyui (float32), llava in two files (float32), clip single file (float32)"
    )
    assert HunyuanCheckpoint.open(token_replace.folder).describe_layout() == (
        "transformer original (float32), vae original (float32), llava transformers (float32), clip transformers (float32)"
    )


def test_each_part_has_its_own_key_over_the_folders(token_replace, tmp_path):
    for key, path in write_comfyui(tmp_path, token_replace).items():
        checkpoint = HunyuanCheckpoint.open(token_replace.folder, **{key: path})
        part = {"transformer_path": "transformer", "vae_path": "vae", "llm_path": "llava", "clip_path": "clip"}
        assert getattr(checkpoint, part[key]) == path
        assert [each for each in part.values() if token_replace.folder in getattr(checkpoint, each).parents] == [
            each for other, each in part.items() if other != key
        ]


def test_a_whole_llava_in_one_file_and_the_released_preprocessing(token_replace, tmp_path):
    path = save(tmp_path / "llava.safetensors", token_replace.llava)
    folder = tmp_path / "folder"
    shutil.copytree(token_replace.folder, folder)
    (folder / "text_encoder_i2v/preprocessor_config.json").unlink()
    checkpoint = HunyuanCheckpoint.open(folder, llm_path=path)
    assert checkpoint.image_processor is None
    image = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3)) * 2 - 1
    one, two = (each.load_text_encoder(dtype=torch.float32).encode("a red square", image)
                for each in (checkpoint, HunyuanCheckpoint.open(token_replace.folder)))
    assert torch.equal(one["text"], two["text"])


def test_a_language_model_without_its_vision_tower_is_refused_with_the_file_that_has_it(token_replace, tmp_path):
    paths = write_comfyui(tmp_path, token_replace)
    (tmp_path / "clip_vision/llava_llama3_vision.safetensors").unlink()
    with pytest.raises(UserError, match=r"language model alone.*clip_vision.*llava_llama3_vision\.safetensors"):
        HunyuanCheckpoint.open(None, **paths)
    folder = tmp_path / "llm"
    bare = {name.removeprefix("model."): value for name, value in language_model(token_replace.llava).items()}
    save(folder / "model.safetensors", bare)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UserError, match="language model alone"):  # as Kijai's text-only folder
        HunyuanCheckpoint.open(token_replace.folder, llm_path=folder)
    save(folder / "llava_llama3_vision.safetensors", vision_tower(token_replace.llava))
    checkpoint = HunyuanCheckpoint.open(token_replace.folder, llm_path=folder)
    checkpoint.load_text_encoder(dtype=torch.float32)
    assert checkpoint.identity() != HunyuanCheckpoint.open(token_replace.folder).identity()


def test_missing_tokenizers_are_told_together_with_where_to_get_them(token_replace, tmp_path):
    paths = write_comfyui(tmp_path, token_replace)
    shutil.rmtree(tmp_path / "tokenizer_2")
    (tmp_path / "text_encoders/tokenizer.json").unlink()
    with pytest.raises(UserError) as error:
        HunyuanCheckpoint.open(None, **paths)
    for words in ("llava_tokenizer: looked for tokenizer.json", "Copy it from xtuner/llava-llama-3-8b-v1_1-transformers",
                  "clip_tokenizer: looked for vocab.json", "Copy it from openai/clip-vit-large-patch14"):
        assert words in str(error.value)


def test_llavas_tokenizer_is_not_taken_for_clips(token_replace, tmp_path):
    paths = write_comfyui(tmp_path, token_replace)
    shutil.move(tmp_path / "tokenizer_2/vocab.json", tmp_path / "text_encoders/vocab.json")
    shutil.move(tmp_path / "tokenizer_2/merges.txt", tmp_path / "text_encoders/merges.txt")
    with pytest.raises(UserError, match=r"a tokenizer of \d+ tokens for a CLIP of \d+"):
        HunyuanCheckpoint.open(None, **paths).load_text_encoder()


@pytest.mark.parametrize(("key", "drop", "message"), [
    ("transformer_path", "double_blocks.1.txt_attn.proj.weight", r"1 missing: model\.model\.double_blocks\.1\.txt_attn\.proj"),
    ("transformer_path", "vector_in.in_layer.weight", r"model\.model\.vector_in\.in_layer\.weight"),
    ("vae_path", "decoder.up.3.block.0.conv1.conv.weight", r"1 missing: decoder\.up\.3\.block\.0\.conv1\.conv\.weight"),
    ("vae_path", "encoder.down.2.block.0.conv1.conv.weight", r"encoder\.down\.2\.block\.0\.conv1\.conv\.weight is missing"),
    ("llm_path", "model.layers.1.mlp.up_proj.weight", r"1 missing: model\.layers\.1\.mlp\.up_proj\.weight"),
    ("llm_path", "model.layers.0.self_attn.q_proj.weight", r"model\.layers\.0\.self_attn\.q_proj\.weight is missing"),
    ("llm_path", "model.embed_tokens.weight", r"not LLaMA-3's language model"),
    ("clip_path", "text_model.encoder.layers.1.mlp.fc2.bias", r"1 missing: text_model\.encoder\.layers\.1\.mlp\.fc2\.bias"),
    ("clip_path", "text_model.embeddings.token_embedding.weight", r"not CLIP-L's text model"),
])
def test_a_missing_tensor_is_named_as_the_file_spells_it(token_replace, tmp_path, key, drop, message):
    paths = write_comfyui(tmp_path, token_replace)
    state = load_file(paths[key])
    save(paths[key], {name: value for name, value in state.items() if name.removeprefix("model.model.") != drop})
    with pytest.raises(UserError, match=message) as error:
        load_part(paths, key)
    assert paths[key].name in str(error.value)


def load_part(paths, key):
    checkpoint = HunyuanCheckpoint.open(None, **paths)
    load = {"transformer_path": checkpoint.transformer_tensors, "vae_path": checkpoint.load_vae}
    return load.get(key, checkpoint.load_text_encoder)()
