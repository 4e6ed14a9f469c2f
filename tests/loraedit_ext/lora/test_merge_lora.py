"""A LoRA merged into a checkpoint equals the LoRA attached to it; dtype, names and shards are as promised."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from loraedit_ext import lora
from loraedit_ext.lora import convert, formats, merge
from loraedit_ext.wan import MaskedWan
from models.checkpoint import open_tensors
from models.shards import Planned, write_shards
from models.wan.checkpoint import WanCheckpoint, WanTransformerFiles
from models.wan.random_weights import write_random_checkpoint

CPU = torch.device("cpu")


def write_lora(path, seed=0, modules=("blocks.0.self_attn.q", "blocks.3.cross_attn.k_img", "text_embedding.2")):
    g = torch.Generator().manual_seed(seed)
    state = {}
    for module in modules:
        state |= {f"diffusion_model.{module}.lora_down.weight": torch.randn(3, 96, generator=g) * 0.1,
                  f"diffusion_model.{module}.lora_up.weight": torch.randn(96, 3, generator=g) * 0.1,
                  f"diffusion_model.{module}.alpha": torch.tensor(6.0)}
    state["diffusion_model.blocks.1.norm3.diff"] = torch.randn(96, generator=g)
    save_file(state, path)
    return path


def inputs():
    g = torch.Generator().manual_seed(0)
    noisy, y, text, image = (
        torch.randn(s, generator=g) for s in ((1, 16, 2, 4, 4), (1, 20, 2, 4, 4), (1, 8, 64), (1, 5, 80))
    )
    return noisy, torch.tensor([400.0]), y, text, image


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_merging_equals_attaching(tiny_wan, tmp_path, layout, capsys):
    write_random_checkpoint(tmp_path / "ckpt", layout=layout)
    first, second = write_lora(tmp_path / "a.safetensors"), write_lora(tmp_path / "b.safetensors", seed=1)
    out = tmp_path / "merged"
    assert merge.main(["--ckpt", str(tmp_path / "ckpt"), "--lora", str(first), "--lora", f"{second}=0.5",
                            "--out", str(out)]) == 0
    assert "3 linears changed by 2 LoRAs" in capsys.readouterr().out
    outputs = []
    for checkpoint, stack in ((WanCheckpoint.open(tiny_wan), [(first, 1.0), (second, 0.5)]),
                              (WanCheckpoint.open(tiny_wan, transformer_path=out), [])):
        model = MaskedWan(checkpoint, CPU)
        transformer = model.build_transformer()
        model.load_weights(transformer.layers(), torch.float32, CPU)
        if stack:
            lora.attach(transformer, transformer.layers(), lora.combine([(lora.read(p, model), s) for p, s in stack]), CPU)
        with torch.no_grad():
            outputs.append(transformer(*inputs()))
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=0)
    assert WanTransformerFiles(transformer=out).layout == "original"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_untouched_weights_are_kept(tmp_path, dtype):
    write_random_checkpoint(tmp_path / "ckpt", dtype=dtype)
    merge.merge(tmp_path / "ckpt", [(write_lora(tmp_path / "a.safetensors"), 1.0)], tmp_path / "out", 200_000)
    before, after = open_tensors(tmp_path / "ckpt"), open_tensors(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert before.shapes == after.shapes
    assert before.dtypes == after.dtypes
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"blocks.0.self_attn.q.weight", "blocks.3.cross_attn.k_img.weight", "text_embedding.2.weight",
                       "blocks.1.norm3.weight"}


def test_8_bit_weights_become_bfloat16(tiny_wan, tmp_path, capsys):
    state = {name: value for shard in tiny_wan.glob("diffusion*.safetensors") for name, value in load_file(shard).items()}
    state["blocks.0.self_attn.q.weight"] = (state["blocks.0.self_attn.q.weight"] * 16).to(torch.float8_e4m3fn)
    state["blocks.0.self_attn.q.scale_weight"] = torch.tensor(1 / 16)
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"].to(torch.float8_e4m3fn)
    (tmp_path / "ckpt").mkdir()
    save_file(state, tmp_path / "ckpt" / "model_fp8.safetensors")
    (tmp_path / "ckpt" / "config.json").write_text((tiny_wan / "config.json").read_text())
    lines = merge.merge(tmp_path / "ckpt" / "model_fp8.safetensors", [(write_lora(tmp_path / "a.safetensors"), 1.0)],
                             tmp_path / "out")
    assert "8-bit weights became bfloat16" in lines[1]
    merged = open_tensors(tmp_path / "out")
    assert merged.dtypes["blocks.0.self_attn.q.weight"] == merged.dtypes["blocks.0.ffn.0.weight"] == torch.bfloat16
    assert torch.equal(merged["blocks.0.ffn.0.weight"], state["blocks.0.ffn.0.weight"].bfloat16())
    pair = lora.read_of(tmp_path / "a.safetensors").weights
    expected = state["blocks.0.self_attn.q.weight"].float() / 16 + (
        pair["blocks.0.self_attn.q.lora_B.weight"] @ pair["blocks.0.self_attn.q.lora_A.weight"]
    )
    torch.testing.assert_close(merged["blocks.0.self_attn.q.weight"].float(), expected, atol=2e-3, rtol=1e-2)


def test_what_does_not_fit_is_refused_before_anything_is_written(tiny_wan, tmp_path):
    good = write_lora(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="the model lacks"):
        merge.merge(tiny_wan, [(write_lora(tmp_path / "b.safetensors", modules=["blocks.9.self_attn.q"]), 1.0)],
                         tmp_path / "out")
    with pytest.raises(UserError, match="no transformer of Wan or HunyuanVideo"):
        merge.merge(tiny_wan / "Wan2.1_VAE.pth", [(good, 1.0)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nothing is overwritten"):
        merge.merge(tiny_wan, [(good, 1.0)], tiny_wan)


def test_a_lora_of_the_other_expert_is_refused(tiny_wan22, tmp_path):
    """Both experts of Wan2.2 have the same shapes."""
    weights = lora.read_of(write_lora(tmp_path / "a.safetensors", modules=["blocks.0.self_attn.q"])).weights
    trained = lora.LoraFile(tmp_path / "low.safetensors", weights, {"model": {"expert": "low"}})
    lora.write(trained, trained.path, formats.names_of("wan"))
    with pytest.raises(UserError, match=r"low\.safetensors: was trained for the expert low, and .*high_noise_model is high"):
        merge.merge(tiny_wan22 / "high_noise_model", [(trained.path, 1.0)], tmp_path / "out")
    merge.merge(tiny_wan22 / "low_noise_model", [(trained.path, 1.0)], tmp_path / "out")


def test_a_lora_that_is_not_finite_is_neither_merged_nor_converted(tiny_wan, tmp_path):
    weights = {"blocks.0.self_attn.q.lora_A.weight": torch.full((3, 96), torch.nan)}
    weights["blocks.0.self_attn.q.lora_B.weight"] = torch.ones(96, 3)
    save_file({f"diffusion_model.{name}": value for name, value in weights.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"q\.lora_A\.weight holds numbers that are not finite"):
        merge.merge(tiny_wan, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "out")
    with pytest.raises(UserError, match=r"q\.lora_A\.weight holds numbers that are not finite"):
        convert.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(("variant", "module"), [
    ("wan2.1-i2v", "blocks.0.self_attn.q"), ("hunyuan-i2v-latent_concat", "double_blocks.0.img_attn_proj"),
])
def test_a_lora_of_another_variant_is_refused(tiny_wan, tiny_wan22, tiny_hunyuan, tmp_path, variant, module):
    """Its linears have the same names and shapes in both."""
    right, wrong = (tiny_wan, tiny_wan22 / "high_noise_model") if variant == "wan2.1-i2v" else (
        tiny_hunyuan["latent_concat"], tiny_hunyuan["token_replace"])  # fmt: skip
    weights = {f"{module}.lora_A.weight": torch.ones(3, 96), f"{module}.lora_B.weight": torch.ones(96, 3)}
    trained = lora.LoraFile(tmp_path / "a.safetensors", weights, {"model": {"variant": variant}})
    lora.write(trained, trained.path, formats.names_of("wan" if right == tiny_wan else "hunyuan-video"))
    with pytest.raises(UserError, match=rf"a\.safetensors: was trained for the variant {variant}, and .* is "):
        merge.merge(wrong, [(trained.path, 1.0)], tmp_path / "out")
    merge.merge(right, [(trained.path, 1.0)], tmp_path / "out")


def test_a_disk_that_was_full_leaves_a_folder_that_may_be_written_to_again(tiny_wan, tmp_path, monkeypatch):
    good = write_lora(tmp_path / "a.safetensors")
    rename = os.replace

    def full_for_weights(partial, path):
        if path.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(partial, path)

    with monkeypatch.context() as full:
        full.setattr(os, "replace", full_for_weights)
        with pytest.raises(UserError, match="could not be written"):
            merge.merge(tiny_wan, [(good, 1.0)], tmp_path / "out")
    merge.merge(tiny_wan, [(good, 1.0)], tmp_path / "out")


@pytest.mark.parametrize("strength", ["nan", "-inf"])
def test_a_strength_is_finite(tmp_path, capsys, strength):
    with pytest.raises(SystemExit):
        merge.main(["--ckpt", "x", "--lora", f"a={strength}", "--out", str(tmp_path / "out")])
    assert f"a strength of {strength}, expected a finite number, e.g. a=0.8" in capsys.readouterr().err


def test_shards_are_safetensors_to_the_byte(tmp_path):
    state = {"a": torch.randn(3, 5).bfloat16(), "b": torch.tensor(2.0), "c": torch.randn(7, 1).to(torch.float8_e4m3fn),
             "d": torch.zeros(0, 4), "e": torch.arange(6)}
    planned = [Planned(n, tuple(v.shape), v.dtype, lambda v=v: v) for n, v in state.items()]
    files = write_shards(tmp_path, "model", planned, shard_bytes=40)
    assert len(files) == 3
    found = open_tensors(tmp_path)
    assert found.dtypes == {name: value.dtype for name, value in state.items()}
    assert all(torch.equal(found[name].float(), value.float()) for name, value in state.items())
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"]["total_size"] > 0


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from loraedit_ext import lora
from loraedit_ext.lora import formats, merge
def memory(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
before = memory("VmRSS")
merge.merge(Path(sys.argv[1]), [(Path(sys.argv[2]), 1.0)], Path(sys.argv[3]))
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_merging_streams(tmp_path):
    """A 320 MB checkpoint is merged with far less in memory."""
    from dataclasses import replace

    from models.wan.random_weights import tiny_config

    config = replace(tiny_config(), dim=768, ffn_dim=2048, num_layers=8, num_heads=6)
    write_random_checkpoint(tmp_path / "ckpt", config)
    size = sum(file.stat().st_size for file in (tmp_path / "ckpt").glob("*.safetensors")) / 1e6
    assert size > 300
    key = "diffusion_model.blocks.0.self_attn.q.lora_"
    save_file({f"{key}A.weight": torch.ones(3, 768), f"{key}B.weight": torch.ones(768, 3)}, tmp_path / "a.safetensors")
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, (tmp_path / "ckpt", tmp_path / "a.safetensors", tmp_path / "out"))],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3], env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert float(child.stdout) < 100
