"""Both layouts of a Wan checkpoint are found, opened in one naming scheme, and identified."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from wan_parts import GOLDEN_CONFIG, assert_close, golden_weights

from common.errors import UserError
from models.hunyuan import random_weights as hunyuan_random_weights
from models.wan.checkpoint import (
    IMAGE_ENCODER_FILE,
    TEXT_ENCODER_FILE,
    TOKENIZER_FOLDER,
    VAE_FILE,
    WanCheckpoint,
    to_diffusers,
    to_original,
)
from models.wan.config import WanConfig, transformer_shapes
from models.wan.keys import IMAGE_ENCODER, TEXT_ENCODER, vae_keys, vae_structure
from models.wan.random_weights import main, tiny_config, write_random_checkpoint
from models.wan.save import write_checkpoint

INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def golden_folders(golden, tmp_path_factory):
    folders = {}
    for layout in ("original", "diffusers"):
        folders[layout] = tmp_path_factory.mktemp(layout)
        write_checkpoint(folders[layout], golden_weights(golden), layout, shards=3)
    return folders


@pytest.fixture
def folder(golden_folders, tmp_path):
    """A copy of the original layout that a test may damage."""
    return shutil.copytree(golden_folders["original"], tmp_path / "wan")


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_transformer_weights_come_in_original_names(golden, golden_folders, layout):
    checkpoint = WanCheckpoint.open(golden_folders[layout])
    assert checkpoint.layout == layout
    assert checkpoint.config == GOLDEN_CONFIG
    tensors = checkpoint.transformer_tensors()
    weights = golden("wan_i2v_dit").weights
    assert set(tensors) == set(weights)
    assert all(torch.equal(tensors[name], value) for name, value in weights.items())


def test_the_originals_file_names(golden_folders):
    names = {path.relative_to(golden_folders["original"]).as_posix()
             for path in golden_folders["original"].rglob("*") if path.is_file()}
    assert names == {
        "config.json", INDEX, VAE_FILE, TEXT_ENCODER_FILE, IMAGE_ENCODER_FILE,
        *(f"diffusion_pytorch_model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        *(f"{TOKENIZER_FOLDER}/{name}.json" for name in ("tokenizer", "tokenizer_config", "special_tokens_map")),
    }


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "model."])
def test_a_single_file_with_a_prefix(golden, golden_folders, tmp_path, prefix):
    path = tmp_path / "repack.safetensors"
    save_file({prefix + name: value for name, value in golden("wan_i2v_dit").weights.items()}, path)
    checkpoint = WanCheckpoint.open(golden_folders["original"], transformer_path=path)
    assert checkpoint.config == GOLDEN_CONFIG  # heads from the folder's config.json, which is of the same width
    assert set(checkpoint.transformer_tensors()) == set(golden("wan_i2v_dit").weights)


def test_parts_named_one_by_one(golden, golden_folders):
    original, diffusers = golden_folders["original"], golden_folders["diffusers"]
    checkpoint = WanCheckpoint.open(
        None, diffusers / "transformer", original / VAE_FILE, diffusers / "text_encoder",
        original / IMAGE_ENCODER_FILE,
    )
    assert checkpoint.tokenizer == diffusers / "tokenizer"
    assert checkpoint.config == GOLDEN_CONFIG
    assert checkpoint.load_text_encoder().embed([5, 6, 1]).shape == (3, 64)
    vectors = golden("wan_vae")
    latents = checkpoint.load_vae().encode(vectors.inputs["video"])
    assert_close(latents, vectors.outputs["latents"], vectors.info["tolerance"])


def test_all_missing_parts_are_told_at_once(folder):
    for name in (VAE_FILE, IMAGE_ENCODER_FILE, f"{TOKENIZER_FOLDER}/tokenizer.json"):
        (folder / name).unlink()
    with pytest.raises(UserError) as error:
        WanCheckpoint.open(folder)
    message = str(error.value)
    for name in (VAE_FILE, IMAGE_ENCODER_FILE, TOKENIZER_FOLDER, "vae_path", "clip_path"):
        assert name in message
    assert TEXT_ENCODER_FILE in message.splitlines()[-1]  # what is there
    assert "llm_path" not in message


def test_paths_that_do_not_exist(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        WanCheckpoint.open(tmp_path / "absent")
    with pytest.raises(UserError, match=r"vae_path = .*absent\.pth: no such file"):
        WanCheckpoint.open(folder, vae_path=tmp_path / "absent.pth")
    with pytest.raises(UserError, match="transformer_path: not set"):
        WanCheckpoint.open(None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds: nothing"):
        WanCheckpoint.open(tmp_path / "empty")


def test_a_missing_shard_is_named(folder):
    (folder / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"1 of 3 shards are missing: diffusion_pytorch_model-00002-of-00003"):
        _ = WanCheckpoint.open(folder).config


def test_a_truncated_shard_is_named(folder):
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"00002-of-00003\.safetensors: not a complete safetensors file"):
        _ = WanCheckpoint.open(folder).config


def test_a_shard_that_may_not_be_read_is_not_told_as_a_damaged_one(folder, monkeypatch):
    """Not by a real mode: tests may run as a user who may read everything."""
    read = Path.open

    def closed(path, *arguments, **options):
        if path.suffix == ".safetensors":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", closed)
    with pytest.raises(PermissionError):
        _ = WanCheckpoint.open(folder).config


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_missing_and_unexpected_keys_in_the_files_names(golden, tmp_path, layout):
    weights = golden_weights(golden)
    gone, extra = "blocks.1.cross_attn.k_img.bias", "blocks.1.surprise"
    weights.transformer[extra] = weights.transformer.pop(gone)
    write_checkpoint(tmp_path, weights, layout)
    with pytest.raises(UserError) as error:
        WanCheckpoint.open(tmp_path).transformer_tensors()
    named = gone if layout == "original" else "blocks.1.attn2.add_k_proj.bias"
    assert f"1 missing: {named}; 1 unexpected: {extra}" in str(error.value)


def test_a_t2v_checkpoint_is_refused(golden, tmp_path):
    weights = golden_weights(golden)
    state = {name: value for name, value in weights.transformer.items() if "img" not in name}
    state["patch_embedding.weight"] = state["patch_embedding.weight"][:, :16].contiguous()
    write_checkpoint(tmp_path, weights)
    path = tmp_path / "t2v.safetensors"
    save_file(state, path)
    with pytest.raises(UserError) as error:
        _ = WanCheckpoint.open(tmp_path, transformer_path=path).config
    assert str(error.value) == (
        f"{path}: this is Wan2.1-T2V: 16 input channels; LoRA-Edit needs an I2V checkpoint with 36."
    )


def test_scaled_fp8_transformer_is_dequantised(golden, tmp_path, golden_folders):
    state = golden("wan_i2v_dit").weights
    name = "blocks.0.ffn.0.weight"
    exact = state[name]
    state[name] = (exact * 16).to(torch.float8_e4m3fn)
    state["blocks.0.ffn.0.scale_weight"] = torch.tensor(1 / 16)
    save_file(state | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    tensors = WanCheckpoint.open(
        golden_folders["original"], transformer_path=tmp_path / "fp8.safetensors"
    ).transformer_tensors()
    assert (tensors[name] - exact).abs().max() < 0.07 * exact.abs().max()


def test_identity_is_json_and_follows_the_files(folder, golden_folders):
    reference = WanCheckpoint.open(folder).identity()
    assert json.loads(json.dumps(reference)) == reference
    assert reference == WanCheckpoint.open(golden_folders["original"]).identity()  # the folder does not matter
    for part, name in (("vae", VAE_FILE), ("text_encoder", TEXT_ENCODER_FILE),
                       ("image_encoder", IMAGE_ENCODER_FILE), ("tokenizer", f"{TOKENIZER_FOLDER}/tokenizer.json")):
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))
        changed = WanCheckpoint.open(folder).identity()
        assert changed[part] != reference[part]
        assert {key for key in changed if changed[key] != reference[key]} == {part}
        reference = changed


@pytest.mark.parametrize("position", ["header", "first MB", "last MB"])
def test_identity_of_a_large_file_covers_its_edges(golden_folders, tmp_path, position):
    path = tmp_path / "vae.safetensors"
    save_file({f"{i}.weight": torch.zeros(1 << 20) for i in range(3)}, path)
    content = bytearray(path.read_bytes())
    before = WanCheckpoint.open(golden_folders["original"], vae_path=path).identity()["vae"]
    content[{"header": 30, "first MB": 1 << 19, "last MB": len(content) - 1000}[position]] ^= 1
    path.write_bytes(bytes(content))
    after = WanCheckpoint.open(golden_folders["original"], vae_path=path).identity()["vae"]
    assert before[0]["size"] == after[0]["size"]
    assert before != after


def test_statistics_of_a_diffusers_vae_are_part_of_its_identity(golden_folders, tmp_path):
    folder = shutil.copytree(golden_folders["diffusers"], tmp_path / "wan")
    before = WanCheckpoint.open(folder).identity()
    config = json.loads((folder / "vae/config.json").read_text()) | {"latents_mean": [0.0] * 16}
    (folder / "vae/config.json").write_text(json.dumps(config))
    assert WanCheckpoint.open(folder).identity()["vae"] != before["vae"]


def test_transformer_names_map_both_ways(golden):
    names = list(transformer_shapes(tiny_config()))
    theirs = [to_diffusers(name) for name in names]
    assert len(set(theirs)) == len(names)
    assert [to_original(name) for name in theirs] == names
    assert to_diffusers("blocks.12.cross_attn.k_img.weight") == "blocks.12.attn2.add_k_proj.weight"
    assert to_diffusers("blocks.1.norm3.bias") == "blocks.1.norm2.bias"
    assert to_original("scale_shift_table") == "head.modulation"
    assert to_original("unknown.weight") == "unknown.weight"


def test_encoder_names_map_both_ways(golden):
    vae = golden("wan_vae").weights
    resamplers, blocks = vae_structure(vae)
    assert (resamplers, blocks) == ([2, 5, 8], 2)
    visual = {name.removeprefix("visual.") for name in golden("clip_visual").weights}
    for keys, names in ((vae_keys(4, blocks), set(vae)), (TEXT_ENCODER, set(golden("umt5_encoder").weights)),
                        (IMAGE_ENCODER, visual)):
        theirs = {keys.to_right(name) for name in names}
        assert len(theirs) == len(names)
        assert {keys.to_left(name) for name in theirs} == names


def test_the_libraries_own_loaders_accept_the_diffusers_folder(golden, golden_folders):
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import CLIPVisionModel, UMT5EncoderModel

    folder = golden_folders["diffusers"]
    for kind, part in ((AutoencoderKLWan, "vae"), (UMT5EncoderModel, "text_encoder"),
                       (CLIPVisionModel, "image_encoder"), (WanTransformer3DModel, "transformer")):
        model, info = kind.from_pretrained(folder / part, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), part
    vectors = golden("wan_i2v_dit")
    inputs = vectors.inputs
    text = torch.stack([
        torch.nn.functional.pad(context, (0, 0, 0, 512 - len(context)))
        for context in (inputs["context_0"], inputs["context_1"])
    ])
    with torch.no_grad():
        velocity = model(
            torch.cat([inputs["x"], inputs["y"]], 1), inputs["t"], text, inputs["clip_fea"], return_dict=False
        )[0]
    assert_close(velocity, vectors.outputs["velocity"], vectors.info["tolerance"])


def test_random_checkpoint_is_complete_and_repeatable(tmp_path):
    for name, layout in (("a", "original"), ("b", "original"), ("c", "diffusers")):
        write_random_checkpoint(tmp_path / name, layout=layout, seed=5)
    a, b, c = (WanCheckpoint.open(tmp_path / name) for name in "abc")
    assert a.identity() == b.identity()
    assert a.config == c.config == tiny_config()
    first, other = a.transformer_tensors(), c.transformer_tensors()
    assert all(torch.equal(first[name], other[name]) for name in first)
    video = torch.rand(1, 3, 5, 32, 32) * 2 - 1
    vae = a.load_vae()
    assert torch.equal(vae.encode(video), c.load_vae().encode(video))
    prompt = "p3rs0n, a red ball ünïcode 漢"
    assert torch.equal(a.load_text_encoder().encode(prompt), c.load_text_encoder().encode(prompt))
    image = video[0, :, 0]
    assert torch.equal(a.load_image_encoder().encode(image), c.load_image_encoder().encode(image))


def test_random_weights_have_outputs_of_order_one(tmp_path):
    write_random_checkpoint(tmp_path)
    checkpoint = WanCheckpoint.open(tmp_path)
    video = torch.nn.functional.interpolate(torch.rand(1, 3, 5, 8, 8) * 2 - 1, (5, 64, 64))
    vae = checkpoint.load_vae()
    latents = vae.encode(video)
    decoded = vae.decode(latents)
    text = checkpoint.load_text_encoder().encode("a red ball")
    image = checkpoint.load_image_encoder().encode(video[0, :, 0])
    for output in (latents, decoded, text, image):
        assert 0.1 < output.std() < 5
    assert (decoded.abs() == 1).float().mean() < 0.2
    assert not torch.equal(checkpoint.load_text_encoder().encode("a blue cat"), text)


def test_random_checkpoint_from_the_command_line(tmp_path):
    main([str(tmp_path / "out"), "--seed", "3", "--shards", "4", "--dtype", "bfloat16", "--num-layers", "2",
          "--image-dim", "160", "--text-dim", "128"])
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 4
    shard = load_file(tmp_path / "out" / "diffusion_pytorch_model-00001-of-00004.safetensors")
    assert {value.dtype for value in shard.values()} == {torch.bfloat16}
    checkpoint = WanCheckpoint.open(tmp_path / "out")
    assert checkpoint.config == WanConfig(
        dim=96, ffn_dim=192, num_heads=3, num_layers=2, text_dim=128, image_dim=160
    )
    checkpoint.transformer_tensors()
    image = checkpoint.load_image_encoder()
    assert image.model.config.num_attention_heads == 2
    assert image.encode(torch.zeros(3, 16, 16)).shape == (257, 160)


@pytest.mark.parametrize("script", [main, hunyuan_random_weights.main])
def test_a_random_checkpoint_replaces_no_other(tmp_path, capsys, script):
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"released")
    with pytest.raises(SystemExit):
        script([str(tmp_path)])
    assert "is there already; nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["Wan2.1_VAE.pth"]
