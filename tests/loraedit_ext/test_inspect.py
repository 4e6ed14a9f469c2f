"""What inspect says of checkpoints, LoRAs and runs; what doctor says of the machine."""

from __future__ import annotations

import importlib.metadata
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraedit_ext import doctor, inspect, launch, lora
from loraedit_ext.config import load_config
from models.wan.random_weights import write_random_checkpoint


def said(path):
    return "\n".join(inspect.describe(path))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_checkpoint(tmp_path, layout):
    write_random_checkpoint(tmp_path, layout=layout, dtype=torch.bfloat16)
    text = said(tmp_path)
    for words in (f"wan transformer, wan2.1-i2v, {layout} names", "dim 96", "num_layers 4", "bfloat16 100.0%",
                  "complete    yes", "scales      none", "text encoder"):
        assert words in text


def test_a_scaled_file_an_incomplete_one_and_a_text_encoder(tiny_wan, tmp_path):
    state = {name: value for shard in tiny_wan.glob("diffusion*.safetensors") for name, value in load_file(shard).items()}
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    state["blocks.0.ffn.0.scale_weight"] = torch.tensor(0.5)
    (tmp_path / "config.json").write_text((tiny_wan / "config.json").read_text())
    del state["blocks.1.ffn.0.bias"]
    save_file(state, tmp_path / "fp8.safetensors")
    text = said(tmp_path / "fp8.safetensors")
    assert "float8_e4m3fn" in text
    assert "scales      1 (blocks.0.ffn.0.scale_weight" in text
    assert "complete    no: " in text
    assert "1 missing: blocks.1.ffn.0.bias" in text
    assert "what        This is Wan's UMT5 text encoder" in said(tiny_wan / "models_t5_umt5-xxl-enc-bf16.pth")


def test_a_checkpoint_without_one_part_tells_which(tmp_path):
    write_random_checkpoint(tmp_path)
    (tmp_path / "Wan2.1_VAE.pth").unlink()
    assert "incomplete" in said(tmp_path)
    assert "Wan2.1_VAE.pth" in said(tmp_path)


def test_a_trained_lora_and_its_run(edit_folder):
    launch.train(load_config(edit_folder.config, ["adapter.alpha=2"]))
    (run,) = edit_folder.runs()
    text = said(run / "step6")
    for words in ("LoRA for wan, comfyui names", "rank        4 (40 linears)", "alpha       2.0 in training",
                  "trigger     p3rs0n,", "base model  checkpoint", "6 steps", "ComfyUI, diffusers", "blocks.N.ffn.0",
                  "blocks.3"):
        assert words in text, text
    text = said(run)
    for words in ("a run of train.py", "job         square", "progress    step 6", "exported    step3, step6",
                  "resume      global_step6, step 6, rank 4", "states      global_step3, global_step6"):
        assert words in text, text
    assert "1 runs; the newest" in said(edit_folder.path / "runs")
    (run / "latest").unlink()
    (run / "metrics.jsonl").write_bytes(b'{"step": 2, "train/loss": 0.5}\n{"step": 3, "tra')
    assert "resume      not possible" in said(run)
    assert "progress    step 2, loss 0.5000" in said(run)


def test_the_norms_are_those_of_the_whole_change(tmp_path):
    g = torch.Generator().manual_seed(0)
    state = {}
    for module in ("blocks.0.self_attn.q", "blocks.0.self_attn.k", "blocks.10.ffn.2", "head.head"):
        state |= {f"diffusion_model.{module}.lora_A.weight": torch.randn(3, 8, generator=g),
                  f"diffusion_model.{module}.lora_B.weight": torch.randn(9, 3, generator=g)}
    save_file(state, tmp_path / "a.safetensors")
    weights = lora.read_of(tmp_path / "a.safetensors").weights
    products = [weights[f"blocks.0.self_attn.{x}.lora_B.weight"] @ weights[f"blocks.0.self_attn.{x}.lora_A.weight"]
                for x in "qk"]
    expected = math.sqrt(sum(p.square().sum().item() for p in products))
    (line,) = [line for line in inspect.describe(tmp_path / "a.safetensors") if "blocks.0 " in line]
    assert float(line.split()[1]) == pytest.approx(expected, abs=1e-3)
    assert "outside blocks" in said(tmp_path / "a.safetensors")


def test_a_broken_lora_is_called_broken(tmp_path):
    key = "diffusion_model.blocks.0.ffn.0.lora_"
    save_file({f"{key}A.weight": torch.full((2, 4), math.nan), f"{key}B.weight": torch.ones(4, 2)}, tmp_path / "a.safetensors")
    assert "not finite" in said(tmp_path / "a.safetensors")


def test_nothing_known_is_a_user_error(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    for path in (tmp_path / "absent", tmp_path / "notes.txt", tmp_path / "a.safetensors", tmp_path):
        assert inspect.main([str(path)]) == 2
        assert str(tmp_path) in capsys.readouterr().err


def test_the_doctor_finds_this_machine_fit(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for what in ("python", "torch", "deepspeed", "attention", "ram", "disk", "pinned", "video"):
        assert what in out


def test_a_containers_limit_counts_and_files_at_hand_do_not(monkeypatch, tmp_path):
    """As after a checkpoint was read, of which the system keeps what it has no better use for."""
    available, total = doctor.ram()
    monkeypatch.setattr(doctor, "CGROUP", tmp_path)
    assert doctor.ram()[1] == total
    for name, text in (("max", "4000000"), ("current", "3500000"), ("stat", "anon 900000\ninactive_file 2500000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert doctor.ram() == (3000000, 4000000)
    (tmp_path / "memory.max").write_text("max")
    assert doctor.ram()[0] == pytest.approx(available, rel=0.2)


def test_every_complaint_has_a_cure(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "version", missing)
    monkeypatch.setattr(doctor, "PYTHON", (4, 0))
    bad = [finding for finding in doctor.examine() if finding.status == "bad"]
    assert {"python", "deepspeed", "video", "peft"} <= {finding.what for finding in bad}
    assert all(finding.cure for finding in bad)


@pytest.mark.parametrize(("found", "status"), [("0.19.8", "ok"), ("0.19.10", "ok"), ("0.19.3", "bad"), ("0.20.0", "bad")])
def test_deepspeeds_versions(monkeypatch, found, status):
    monkeypatch.setattr(doctor, "version", lambda name: found)
    assert [finding.status for finding in doctor.deepspeed()] == [status]


@pytest.mark.parametrize("variant", ["token_replace", "latent_concat"])
def test_a_hunyuan_checkpoint_and_each_of_its_parts(tiny_hunyuan, tmp_path, variant):
    root = tiny_hunyuan[variant]
    text = said(root)
    for words in (f"hunyuan-video transformer, {variant}, original names", "num_double 2", "complete    yes",
                  "scales      none", "vae original (float32), llava transformers (float32), clip transformers (float32)"):
        assert words in text, text
    for part, words in (
        ("hunyuan-video-i2v-720p/vae", "HunyuanVideo's VAE"), ("text_encoder_i2v", "LLaVA whole"),
        ("text_encoder_2", "CLIP's text encoder"), ("hunyuan-video-i2v-720p/transformers", "original names"),
        ("hunyuan-video-i2v-720p/vae/pytorch_model.pt", "HunyuanVideo's VAE"),
    ):
        assert words in said(root / part)
    llava = load_file(root / "text_encoder_i2v/model.safetensors")
    language = {n.removeprefix("language_model."): v for n, v in llava.items() if n.startswith("language_model.")}
    save_file(language, tmp_path / "llava_llama3_fp16.safetensors")
    save_file({n: v for n, v in llava.items() if "language_model." not in n}, tmp_path / "llava_llama3_vision.safetensors")
    assert "language model, a text encoder without the vision tower" in said(tmp_path / "llava_llama3_fp16.safetensors")
    assert "vision encoder with its projector" in said(tmp_path / "llava_llama3_vision.safetensors")


def test_a_hunyuan_file_in_comfyuis_names_with_a_scale(tiny_hunyuan, tmp_path):
    path = tiny_hunyuan["token_replace"] / "hunyuan-video-i2v-720p/transformers/mp_rank_00_model_states.pt"
    state = {}
    for name, value in torch.load(path, weights_only=True)["module"].items():
        name = name.replace("_attn_qkv", "_attn.qkv").replace("_attn_q_norm.weight", "_attn.norm.query_norm.scale")
        state[f"model.model.{name}"] = value
    key = "model.model.double_blocks.0.img_attn.qkv.weight"
    state |= {key: state[key].to(torch.float8_e4m3fn), key.replace("weight", "scale_weight"): torch.tensor(0.5)}
    save_file(state, tmp_path / "a.safetensors")
    text = said(tmp_path / "a.safetensors")
    assert "hunyuan-video transformer, token_replace, comfyui names" in text
    assert "scales      1 (model.model.double_blocks.0.img_attn.qkv.scale_weight" in text  # norms are called scale, too


def test_a_hunyuan_folder_without_one_part_tells_which(tiny_hunyuan, tmp_path):
    shutil.copytree(tiny_hunyuan["token_replace"], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/text_encoder_2")
    text = said(tmp_path / "copy")
    assert "incomplete  HunyuanVideo checkpoint incomplete" in text
    assert "text_encoder_2" in text
