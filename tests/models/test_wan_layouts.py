"""Every layout that users have, through the ordinary loader, gives the original code's numbers."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from wan_parts import CLIP_HEADS, GOLDEN_CONFIG, assert_close, golden_weights, velocity

from models.wan.checkpoint import VAE_FILE, WanCheckpoint, WanTransformerFiles
from models.wan.config import WanConfig, transformer_shapes
from models.wan.keys import TEXT_ENCODER
from models.wan.save import _clip_for_transformers, write_checkpoint
from models.wan.wrapper import WanI2V

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def parts(golden):
    return golden_weights(golden)


def scaled(state, keep):
    """As ComfyUI's and Kijai's scaled files: matrices in e4m3 with a scale, the rest as it is, and the marker."""
    result = {"scaled_fp8": torch.zeros(2).to(E4M3)}
    for name, value in state.items():
        if value.ndim != 2 or keep(name):
            result[name] = value
            continue
        scale = value.float().abs().max() / 448
        result |= {name: (value.float() / scale).to(E4M3), name.removesuffix("weight") + "scale_weight": scale}
    return result


def sentencepiece_model():
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red ball", "a blue square moves", "the sea at night", "the quick brown fox"] * 5),
        model_writer=model, vocab_size=28, model_type="char", pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    return model.getvalue()


def save(path, state, dtype=None):
    cast = {name: value if dtype is None or not value.is_floating_point() else value.to(dtype)
            for name, value in state.items()}
    save_file({name: value.contiguous() for name, value in cast.items()}, path)
    return path


def write_comfyui(folder, parts):
    """Single files in ComfyUI's names; UMT5 carries its tokenizer."""
    text = {TEXT_ENCODER.to_right(name): value for name, value in parts.text_encoder.items()}
    text["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    clip = _clip_for_transformers(parts.image_encoder) | {"visual_projection.weight": torch.zeros(8, 80)}
    prefixed = {f"model.diffusion_model.{name}": value for name, value in parts.transformer.items()}
    (folder / "config.json").write_text(json.dumps(parts.config.original_json()))
    return {
        "transformer_path": save(folder / "wan2.1_i2v_480p_14B.safetensors", prefixed),
        "vae_path": save(folder / "wan_2.1_vae.safetensors", parts.vae),
        "llm_path": save(folder / "umt5_xxl_fp16.safetensors", text),
        "clip_path": save(folder / "clip_vision_h.safetensors", clip),
    }


def write_kijai(folder, parts):
    """Single files in the original names, visual half of CLIP alone; the tokenizer lies beside."""
    from models.wan.save import write_tokenizer

    write_tokenizer(folder / "google/umt5-xxl", parts.tokenizer)
    (folder / "config.json").write_text(json.dumps(parts.config.original_json()))
    return {
        "transformer_path": save(folder / "Wan2_1-I2V-14B-480P.safetensors", parts.transformer),
        "vae_path": save(folder / "Wan2_1_VAE.safetensors", {f"model.{n}": v for n, v in parts.vae.items()}),
        "llm_path": save(folder / "umt5-xxl-enc.safetensors", parts.text_encoder),
        "clip_path": save(folder / "open-clip_visual.safetensors",
                          {f"visual.{n}": v for n, v in parts.image_encoder.items()}),
    }


def opened(folder, layout, parts):
    if layout in ("comfyui", "kijai"):
        writer = write_comfyui if layout == "comfyui" else write_kijai
        return WanCheckpoint.open(None, **writer(folder, parts))
    write_checkpoint(folder, parts, layout, shards=3)
    return WanCheckpoint.open(folder)


def transformer_of(checkpoint):
    model = WanI2V(checkpoint, CPU)
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), torch.float32, CPU)
    return transformer


@pytest.mark.parametrize("layout", ["original", "diffusers", "comfyui", "kijai"])
def test_every_part_of_every_layout_gives_the_originals_numbers(golden, parts, tmp_path, layout):
    from models.checkpoint import open_tensors
    from models.wan.encoders import WanImageEncoder

    checkpoint = opened(tmp_path, layout, parts)
    assert checkpoint.config == GOLDEN_CONFIG
    vectors = golden("wan_i2v_dit")
    assert_close(velocity(transformer_of(checkpoint), golden), vectors.outputs["velocity"], vectors.info["tolerance"])
    vectors = golden("wan_vae")
    assert_close(checkpoint.load_vae().encode(vectors.inputs["video"]), vectors.outputs["latents"],
                 vectors.info["tolerance"])
    text = checkpoint.load_text_encoder(dtype=torch.float32)
    vectors = golden("umt5_encoder")
    ids, count = vectors.inputs["ids"][0], int(vectors.inputs["mask"][0].sum())
    assert_close(text.embed(ids[:count].tolist()), vectors.outputs["embeddings"][0, :count], vectors.info["tolerance"])
    image = WanImageEncoder.load(open_tensors(checkpoint.image_encoder, ("model",)), num_heads=CLIP_HEADS)
    vectors = golden("clip_visual")
    assert_close(image.encode(vectors.inputs["image"])[None], vectors.outputs["features"], vectors.info["tolerance"])


@pytest.mark.parametrize(("layout", "line"), [
    ("original", "transformer original (float32), vae original (float32), text encoder original (float32), "
                 "image encoder original (float32)"),
    ("diffusers", "transformer diffusers (float32), vae diffusers (float32), text encoder transformers (float32), "
                  "image encoder transformers (float32)"),
    ("comfyui", "transformer original (float32), vae original (float32), text encoder transformers (float32), "
                "image encoder transformers (float32)"),
    ("kijai", "transformer original (float32), vae original (float32), text encoder original (float32), "
              "image encoder original (float32)"),
])  # fmt: skip
def test_the_layout_is_said_in_one_line(parts, tmp_path, layout, line):
    assert opened(tmp_path, layout, parts).describe_layout() == line


STORED = {
    "bfloat16": lambda w: w.bfloat16(), "float16": lambda w: w.half(),
    "float8": lambda w: w.to(E4M3) if w.ndim == 2 else w.bfloat16(),
}  # fmt: skip


@pytest.mark.parametrize("names", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", STORED)
def test_reduced_files_equal_the_same_weights_reduced_by_hand(golden, parts, tmp_path, names, dtype):
    from models.wan.checkpoint import to_diffusers

    reduced = {name: STORED[dtype](value) for name, value in parts.transformer.items()}
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save(path, {to_diffusers(n) if names == "diffusers" else n: v for n, v in reduced.items()})
    config = GOLDEN_CONFIG.original_json() if names == "original" else GOLDEN_CONFIG.diffusers_json()
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = WanTransformerFiles(transformer=tmp_path)
    by_hand = transformer_of(files)
    by_hand.load_state_dict({name: value.float() for name, value in reduced.items()}, assign=True)
    assert torch.equal(velocity(transformer_of(files), golden), velocity(by_hand, golden))
    exact = golden("wan_i2v_dit").outputs["velocity"]
    assert (velocity(by_hand, golden) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_scaled_8_bit_files_of_transformer_text_and_image_encoder(golden, parts, tmp_path, prefix):
    """Everywhere the scale is applied: near the golden numbers, and far from them if it were not."""
    state = {prefix + n: v for n, v in scaled(parts.transformer, lambda n: "norm" in n or "modulation" in n).items()}
    (tmp_path / "config.json").write_text(json.dumps(GOLDEN_CONFIG.original_json()))
    text = scaled({TEXT_ENCODER.to_right(n): v for n, v in parts.text_encoder.items()}, lambda n: "bias" in n)
    text["spiece_model"] = torch.frombuffer(bytearray(sentencepiece_model()), dtype=torch.uint8)
    paths = write_comfyui(tmp_path, parts) | {
        "transformer_path": save(tmp_path / "fp8_scaled.safetensors", state),
        "llm_path": save(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", text),
    }
    checkpoint = WanCheckpoint.open(None, **paths)
    assert "transformer original (scaled float8_e4m3fn)" in checkpoint.describe_layout()
    assert "text encoder transformers (scaled float8_e4m3fn)" in checkpoint.describe_layout()
    exact = golden("wan_i2v_dit").outputs["velocity"]
    assert (velocity(transformer_of(checkpoint), golden) - exact).norm() < 0.1 * exact.norm()
    vectors = golden("umt5_encoder")
    count = int(vectors.inputs["mask"][0].sum())
    hidden = checkpoint.load_text_encoder(dtype=torch.float32).embed(vectors.inputs["ids"][0, :count].tolist())
    expected = vectors.outputs["embeddings"][0, :count]
    assert (hidden - expected).norm() < 0.1 * expected.norm()


def test_the_tokenizer_in_comfyuis_file_is_the_same_as_beside_it(parts, tmp_path):
    from models.wan.tokenizer import WanTokenizer

    checkpoint = WanCheckpoint.open(None, **write_comfyui(tmp_path, parts))
    assert checkpoint.tokenizer == checkpoint.text_encoder
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "spiece.model").write_bytes(sentencepiece_model())
    text = "a blue ball at  the sea"
    assert checkpoint.load_tokenizer()(text) == WanTokenizer(tmp_path / "beside")(text)
    assert checkpoint.identity()["tokenizer"]


def test_each_part_has_its_own_key_over_the_folders(parts, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "single").mkdir()
    write_checkpoint(tmp_path / "folder", parts)
    single = write_kijai(tmp_path / "single", parts)
    for key, path in single.items():
        checkpoint = WanCheckpoint.open(tmp_path / "folder", **{key: path})
        part = {"transformer_path": "transformer", "vae_path": "vae", "llm_path": "text_encoder",
                "clip_path": "image_encoder"}[key]
        assert getattr(checkpoint, part) == path
        if key != "vae_path":
            assert checkpoint.vae == tmp_path / "folder" / VAE_FILE


def test_the_small_model_of_the_same_architecture():
    """Wan2.1-Fun-InP 1.3B: dimensions from the weights alone, and with its config.json."""
    small = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
    shapes = transformer_shapes(small)
    assert WanConfig.from_tensors(shapes) == small
    fun = small.original_json() | {"model_type": "i2v", "cross_attn_type": "cross_attn", "add_control_adapter": False}
    assert WanConfig.from_tensors(shapes, fun) == small
    assert replace(small, num_layers=40) != small
