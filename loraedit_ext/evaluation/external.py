"""Scores from a program in an environment of its own: frames out as PNG, one number a frame back as JSON.

DeQA-Score (You et al. 2025), the paper's image quality score, needs 16 GB of weights, code from its model repository
and an old transformers; it runs outside of this project's environment, by a command that the user names.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.errors import UserError
from dataset.video_writer import write_images

FRAMES, OUT = "{frames}", "{out}"
SHOWN_LINES = 5
RECIPE = "See docs/evaluation.md."


def score_frames(command: Sequence[str], frames: np.ndarray, timeout: float) -> list[float]:
    """Run a scoring program on frames.

    Args:
        command: program and arguments; `{frames}` stands for a folder of 00000.png, 00001.png ..., `{out}` for the
            JSON file that the program must write: a list of one number per frame.
        frames: uint8 (F, H, W, 3).
        timeout: seconds; after them the program and its children are killed.

    Raises:
        UserError: the program is missing, fails, takes too long, or writes something else.
    """
    for placeholder in (FRAMES, OUT):
        if not any(placeholder in argument for argument in command):
            raise UserError(f"scoring command {list(command)}: has no {placeholder} in its arguments. {RECIPE}")
    with tempfile.TemporaryDirectory(prefix="loraedit-frames-") as folder:
        pictures, out = Path(folder) / "frames", Path(folder) / "scores.json"
        write_images(pictures, frames)
        filled = [argument.replace(FRAMES, str(pictures)).replace(OUT, str(out)) for argument in command]
        _run(filled, timeout)
        return _read(out, filled[0], len(frames))


def _run(command: list[str], timeout: float) -> None:
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"scoring program `{command[0]}` could not be started: {error.strerror}. {RECIPE}") from error
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"scoring program `{command[0]}` took longer than {timeout:g} s and was stopped. "
            "Raise evaluation.deqa_timeout."
        ) from error
    finally:
        _end(process)
    if process.returncode:
        tail = "\n".join(output.strip().splitlines()[-SHOWN_LINES:])
        raise UserError(
            f"scoring program `{command[0]}` failed with status {process.returncode}; its last lines:\n{tail}"
        )


def _end(process: subprocess.Popen[str]) -> None:
    """End the program and what it started, also when we are interrupted."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _read(path: Path, program: str, count: int) -> list[float]:
    if not path.is_file():
        raise UserError(f"scoring program `{program}` ended well but wrote no {OUT} file. {RECIPE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"scoring program `{program}` wrote no valid JSON: {error}. {RECIPE}") from error
    numbers = isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )
    if not numbers or len(values) != count:
        found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise UserError(f"scoring program `{program}` wrote {found}, expected a list of {count} finite numbers.")
    return [float(value) for value in values]
