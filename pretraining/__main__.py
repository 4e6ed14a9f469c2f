"""Trains the tiny model from nothing: `python -m pretraining --out DIR [--minutes M]`.

Runs the commands of this package one after the other and prints each as it could be typed. Stop it when you like; run
again, it goes on from there.
"""

from __future__ import annotations

import argparse
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common import with_parent
from pretraining import clips

_LONG = ("vae", "latents", "transformer")
"""Commands that take --minutes and share their work between processes; the others take seconds."""
_LAUNCHER = ("torch.distributed.run", "--standalone", "--nproc-per-node")  # and "--": our --start is not its --start-method


def recipe(out: Path, scale: float, size: int, device: str, compiled: bool, recorded: bool) -> list[str]:
    """The commands without their `python -m pretraining.`

    Args:
        out: folder of everything made.
        scale: share of all steps and clips.
        size: side of the clips in pixels; the transformer sees larger ones of half as much again in half of its steps.
        device: where to compute.
        compiled: use torch.compile.
        recorded: replay the transformer's steps as CUDA graphs.
    """

    def count(full: int, least: int = 2) -> int:
        return max(least, round(full * scale))

    to, on = shlex.quote(str(out)), f"--device {device}"
    training = f"{on} --compile" if compiled else on
    large = 3 * size // 2
    return [
        f"vae --out {to}/vae --steps {count(3500)} {training}",
        f"freeze --vae {to}/vae/vae.pt --out {to}/frozen.pt --clips {count(256)}",
        *(f"latents --vae {to}/frozen.pt --out {to}/latents-{side} --size {side} --first {first} --shards {count(350)} {on}"
          for side, first in ((large, 0), (size, 50_000))),
        f"transformer --out {to}/transformer --steps {count(9000)} --batch 64 --windows 0.5 "
        f"--latents {to}/latents-{large} {to}/latents-{size} --vae {to}/frozen.pt {training}{' --graphs' if recorded else ''}",
        f"vae --out {to}/decoder --start {to}/frozen.pt --decoder-only --steps {count(3000)} {training}",
        f"export --vae {to}/decoder/vae.pt --transformer {to}/transformer/transformer.pt --out {to}/tiny-wan-i2v",
        f"evaluate {to}/tiny-wan-i2v --out {to}/evaluation --clips {count(64, 1)} --rows {count(10, 1)} --size {large} "
        f"--guidance 2 {on}",
    ]


def run_program(program: list[str]) -> None:
    """Run a program to its end.

    Raises:
        subprocess.CalledProcessError: it fails.
    """
    subprocess.run(with_parent.command(program), check=True)


def run(
    commands: list[str], minutes: float | None, processes: int, start: Callable[[list[str]], None] = run_program
) -> bool:
    """Run them in order, the long ones on so many processes each; False if the time was up before the last."""
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for words in map(shlex.split, commands):
        left = (end - time.monotonic()) / 60
        if left <= 0:
            return False
        launcher: list[str] = []
        if words[0] in _LONG:
            words += [] if minutes is None else ["--minutes", f"{left:.4f}"]
            launcher = [*_LAUNCHER, str(processes), "-m", "--"] if processes > 1 else []
        program = [sys.executable, "-m", *launcher, f"pretraining.{words[0]}", *words[1:]]
        print("\n$", shlex.join(["python", *program[1:]]), flush=True)
        start(program)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pretraining", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of everything made, about six gigabytes")
    parser.add_argument("--minutes", type=float, help="stop after this long; run again to go on")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="share of all steps and clips; 0.001 tries everything out"
    )
    parser.add_argument("--size", type=int, default=clips.SIZE, help="side of the clips in pixels, a multiple of 32")
    parser.add_argument("--processes", type=int, default=1, help="that share the work: as many as idle cores, or as GPUs")
    parser.add_argument("--compile", action="store_true", help="use torch.compile; on one GPU CUDA graphs too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    try:
        recorded = options.compile and options.device == "cuda" and options.processes == 1
        commands = recipe(options.out, options.scale, options.size, options.device, options.compile, recorded)
        finished = run(commands, options.minutes, options.processes)
    except subprocess.CalledProcessError as error:
        raise SystemExit(error.returncode) from None
    print(f"\n{options.out}/tiny-wan-i2v" if finished else "\nTime is up; run the same command again to go on.")


if __name__ == "__main__":
    main()
