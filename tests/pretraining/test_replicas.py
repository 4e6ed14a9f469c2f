"""Pretraining on two processes of torchrun (gloo): the same weights as on one, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from common import with_parent
from pretraining import latents, replicas, transformer, vae
from pretraining.conditioning import Conditioner
from tests.processes import free_port

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose output is not zero, so that all of them get a gradient at once."""
    model = transformer.build(transformer.tiny_config())
    torch.nn.init.normal_(model.head.head.weight, std=0.05)
    path = tmp_path_factory.mktemp("start") / "transformer.pt"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, conditioner, coder = tmp_path_factory.mktemp("latents"), Conditioner(), vae.build().requires_grad_(False)
    latents.fill(folder, lambda scenes: latents.encode_scenes(coder, conditioner, scenes[:4], size=32), range(2), None)
    return folder


def command(pool: Path, start: Path, out: Path, *options: str, processes: int) -> list[str]:
    launcher = TORCHRUN if processes == 2 else ("-m",)
    return [
        sys.executable, *launcher, "pretraining.transformer", "--latents", str(pool), "--start", str(start),
        "--out", str(out), "--batch", "4", "--windows", "0.5", "--device", "cpu", *options,
    ]


def train(*arguments: Path, options: tuple[str, ...] = (), processes: int) -> dict:
    """State of the run."""
    program = command(*arguments, "--steps", "4", *options, processes=processes)
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(arguments[-1] / "state.pt", weights_only=True)


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def assert_same_training(found: dict, expected: dict, start: Path) -> None:
    """Gradients agree to bf16's rounding; weights less, as Muon makes all directions of a gradient equally long.

    Seen: gradients differ by .0014 of their norm, weights by .10 of the way they went. Without the gradients' average .17 and
    .6 of it, without the other process's part of Muon's updates weights by .6.
    """
    momenta = [state["optimizers"][0]["state"] for state in (expected, found)]
    pairs = [(momenta[0][name]["momentum"], momenta[1][name]["momentum"]) for name in momenta[0]]
    assert norm(one - other for one, other in pairs) < 0.01 * norm(one for one, _ in pairs)
    began = torch.load(start, weights_only=True)
    way = norm(value - began[name] for name, value in expected["model"].items())
    assert norm(value - found["model"][name] for name, value in expected["model"].items()) < 0.2 * way


@pytest.fixture(scope="module")
def alone(pool: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(pool, start, tmp_path_factory.mktemp("alone"), processes=1)


def test_two_processes_train_what_one_does(pool: Path, start: Path, alone: dict, tmp_path: Path) -> None:
    assert_same_training(train(pool, start, tmp_path, processes=2), alone, start)


def test_two_processes_stop_in_time_and_one_goes_on(pool: Path, start: Path, alone: dict, tmp_path: Path) -> None:
    stopped = train(pool, start, tmp_path, options=("--minutes", "0.0001"), processes=2)
    assert stopped["step"] == 1
    assert_same_training(train(pool, start, tmp_path, processes=1), alone, start)


def test_a_killed_launcher_takes_its_processes_along(pool: Path, start: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    program = command(pool, start, out, "--steps", "100000", processes=2)
    launcher = subprocess.Popen(program, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not out.exists() and time.monotonic() < deadline:  # made when the processes have found each other
        time.sleep(0.2)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.parametrize("fails", [False, True])
def test_a_process_leaves_the_group(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Else one that ends first was aborted in one of ten runs ("terminate called without an active exception")."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in ({"TORCHELASTIC_RUN_ID": "test"} | place).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(with_parent, "end_with", lambda parent: None)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), replicas.joined("cpu"):
        assert dist.is_initialized()
        assert 1 / (not fails)
    assert not dist.is_initialized()
