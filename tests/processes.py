"""Runs of a verb on one or several processes, as a launcher would start them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

from tests.conftest import EditFolder

ROOT = Path(__file__).parents[1]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([
    "train", "inference", "loraedit_ext.training.trainer", "loraedit_ext.editing.editor", "peft", "torch._dynamo",
    "diffusers.models.autoencoders.autoencoder_kl_wan", "transformers.models.clip.modeling_clip",
    "transformers.models.umt5.modeling_umt5", "torch.utils.tensorboard",
])  # fmt: skip


def launch(
    folder: EditFolder, *overrides: str, processes: int = 1, launcher: Literal["", "torchrun", "deepspeed"] = "",
    check: bool = True, verb: Literal["train", "inference"] = "train",
) -> subprocess.CompletedProcess[str]:
    """Run a verb to its end; a real launcher where one is named.

    Without one, the processes fork from a server that has everything imported, which is most of what a short run takes,
    and find the same environment variables as from torchrun.
    """
    arguments = ["--config", str(folder.config), *overrides]
    if launcher:
        done = _launched(launcher, processes, [str(ROOT / f"{verb}.py"), *arguments])
    else:
        done = _forked(folder.path, verb, arguments, processes)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def _launched(launcher: str, processes: int, command: list[str]) -> subprocess.CompletedProcess[str]:
    port = f"--master_port={free_port()}"
    start = {
        "torchrun": [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", port],
        "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), f"--num_gpus={processes}", port],
    }[launcher]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run([*start, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


def _forked(folder: Path, verb: str, arguments: list[str], processes: int) -> subprocess.CompletedProcess[str]:
    shared = dict(os.environ)
    if processes > 1:
        size = str(processes)
        shared |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    workers: list[BaseProcess] = []
    said = [[folder / f"{name}{rank}.txt" for name in ("stdout", "stderr")] for rank in range(processes)]
    for rank, files in enumerate(said):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        workers.append(SERVER.Process(target=_work, args=(verb, arguments, shared | own, files), daemon=True))
        workers[-1].start()
    for worker in workers:
        worker.join(600)
    codes = [-1 if worker.exitcode is None else worker.exitcode for worker in workers]
    out, error = ("".join(path.read_text() for path in paths) for paths in zip(*said, strict=True))
    return subprocess.CompletedProcess(arguments, next(filter(None, codes), 0), out, error)


def _work(verb: str, arguments: list[str], environment: dict[str, str], files: list[Path]) -> None:
    for descriptor, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.exit(import_module(verb).main(arguments))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
