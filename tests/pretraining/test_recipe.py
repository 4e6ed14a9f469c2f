"""The whole recipe from nothing, at a size that trains nothing: every command runs and takes up what the one before made."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch

from models.wan.checkpoint import WanCheckpoint
from pretraining import __main__ as pretraining
from pretraining import export, transformer
from tests.processes import SERVER

ROOT = Path(__file__).parents[2]
SCALE, SIZE = 0.0001, 32


def begin(out: Path, *options: str) -> str:
    """The command itself; what it says."""
    size = ["--scale", str(SCALE), "--size", str(SIZE)]
    program = [sys.executable, "-m", "pretraining", "--out", str(out), *size, "--device", "cpu", *options]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def finish(out: Path) -> None:
    """The same commands, forked from a process that has most of what they import."""
    assert pretraining.run(pretraining.recipe(out, SCALE, SIZE, "cpu", False, False), None, 1, start=forked)


def forked(program: list[str]) -> None:
    process = SERVER.Process(target=as_module, args=(program[2:],), daemon=True)
    process.start()
    process.join(900)
    assert process.exitcode == 0, program


def as_module(words: list[str]) -> None:
    """As `python -m` runs it."""
    os.chdir(ROOT)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def test_the_recipe_stops_in_time_goes_on_and_makes_a_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "a folder"
    stopped = begin(out, "--minutes", "0.0001", "--processes", "2")
    assert "torch.distributed.run --standalone --nproc-per-node 2 -m -- pretraining.vae" in stopped
    assert "again to go on" in stopped
    assert not (out / "frozen.pt").exists()
    state = out / "vae" / "state.pt"
    assert torch.load(state, weights_only=True)["step"] == 1
    finish(out)
    assert torch.load(state, weights_only=True)["step"] == 2
    checkpoint = WanCheckpoint.open(out / "tiny-wan-i2v")
    assert checkpoint.config == transformer.tiny_config()
    trained = torch.load(out / "transformer" / "transformer.pt", weights_only=True)
    for name, value in export.unpack(out / "tiny-wan-i2v")["transformer.pt"].items():
        assert torch.equal(value, trained[name].bfloat16().float()), name
    assert (out / "evaluation" / "metrics.json").exists()
    assert (out / "evaluation" / "samples.png").exists()
