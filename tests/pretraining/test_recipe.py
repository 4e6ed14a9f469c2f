"""The whole recipe from nothing, at a size that trains nothing: every command runs and takes up what the one before made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from models.wan.checkpoint import WanCheckpoint
from pretraining import export, transformer

ROOT = Path(__file__).parents[2]


def pretrain(out: Path, *options: str) -> str:
    size = ["--scale", "0.0001", "--size", "32"]
    program = [sys.executable, "-m", "pretraining", "--out", str(out), *size, "--device", "cpu", *options]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_recipe_stops_in_time_goes_on_and_makes_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    stopped = pretrain(out, "--minutes", "0.0001", "--processes", "2")
    assert "torch.distributed.run --standalone --nproc-per-node 2 -m -- pretraining.vae" in stopped
    assert "again to go on" in stopped
    assert not (out / "frozen.pt").exists()
    state = out / "vae" / "state.pt"
    assert torch.load(state, weights_only=True)["step"] == 1
    pretrain(out)
    assert torch.load(state, weights_only=True)["step"] == 2
    checkpoint = WanCheckpoint.open(out / "tiny-wan-i2v")
    assert checkpoint.config == transformer.tiny_config()
    trained = torch.load(out / "transformer" / "transformer.pt", weights_only=True)
    for name, value in export.unpack(out / "tiny-wan-i2v")["transformer.pt"].items():
        assert torch.equal(value, trained[name].bfloat16().float()), name
    assert (out / "evaluation" / "metrics.json").exists()
    assert (out / "evaluation" / "samples.png").exists()
