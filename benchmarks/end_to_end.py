"""The demo through `train.py` and `inference.py`, in every way to save memory: `python -m benchmarks.end_to_end`.

Each row is a user's own commands in fresh processes, on the device that this machine has: training of so many steps a stage,
then the edit. Columns: seconds of both, start-up and encoding included; median seconds of a step and peak memory, as the run
itself recorded them; loss of the motion regime on held-out noise at the end; PSNR of the edited region against the truth. Rows
of one dtype differ by no more than a device's kernels vary, the stopped and resumed one among them. A row that fails says where
its output is. Run again to go on; what is there is kept. On a busy CPU set OMP_NUM_THREADS=1, as `make demo` does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

import torch

from benchmarks.wan_step import device_name
from common import with_parent
from common.errors import UserError
from common.files import write_json_atomic, write_text_atomic
from loraedit_ext.editing.results import EDITED
from loraedit_ext.evaluation import metrics
from loraedit_ext.evaluation.subject import Files, from_files
from loraedit_ext.training.tracking import history

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo"
CONFIG = ("--config", str(DEMO / "edit.toml"))
SCORES = "scores.json"


@dataclass(frozen=True)
class Row:
    """One way to train and edit."""

    name: str
    overrides: tuple[str, ...]
    launcher: bool = False
    """Start the training with DeepSpeed's launcher."""
    stopped: bool = False
    """Stop the training half-way through the last stage and go on in another process."""


BF16 = ("model.dtype=bfloat16",)
FLOAT8 = (*BF16, "model.transformer_dtype=float8")
OFFLOAD, RECOMPUTE, SWAP = "activation_checkpointing=offload", "activation_checkpointing=true", "blocks_to_swap=2"
ATTENTION = "activation_checkpointing=attention"
ROWS = (
    Row("fp32", ("model.dtype=float32",)), Row("bf16", BF16), Row("bf16, recompute", (*BF16, RECOMPUTE)),
    Row("bf16, attention", (*BF16, ATTENTION)),
    Row("bf16, offload", (*BF16, OFFLOAD)), Row("bf16, offload, blocks_to_swap", (*BF16, OFFLOAD, SWAP)),
    Row("float8 weights", FLOAT8), Row("float8 weights, offload, blocks_to_swap", (*FLOAT8, OFFLOAD, SWAP)),
    Row("bf16, stopped and resumed", BF16, stopped=True), Row("bf16, DeepSpeed's launcher", BF16, launcher=True),
)  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """Numbers of one row."""

    train_seconds: float
    edit_seconds: float
    step_seconds: float
    peak_gb: float
    loss: float
    psnr: float


def measure(row: Row, steps: int, out: Path) -> Measured:
    """Train and edit in a folder of its own.

    Raises:
        UserError: a command failed; its output is in the folder.
    """
    common = [*row.overrides, f"output_dir={(out / 'runs').resolve()}", f"cache_dir={(out.parent / 'cache').resolve()}",
              f"stage.0.steps={steps}", f"eval_every_n_steps={steps}"]  # fmt: skip
    program = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"] if row.launcher else [sys.executable]
    started = time.perf_counter()
    halves = [steps // 2, steps] if row.stopped else [steps]
    for number, half in enumerate(halves):
        resumed = ["--resume_from_checkpoint"] if number else []
        call([*program, "train.py", *CONFIG, *common, f"stage.1.steps={half}", *resumed], out / f"train_{number}.log")
    trained = time.perf_counter()
    result = out / "result"
    edit = ["inference.py", *CONFIG, "--out", str(result.resolve()), *common, f"stage.1.steps={steps}", "edit.output=png"]
    call([sys.executable, *edit], out / "edit.log")
    (run,) = (out / "runs").iterdir()
    told = history(run)
    return Measured(
        trained - started, time.perf_counter() - trained,
        statistics.median(each["train/step_seconds"] for each in told if "train/step_seconds" in each),
        max(each["train/memory_gb"] for each in told if "train/memory_gb" in each),
        [each["motion/loss"] for each in told if "motion/loss" in each][-1], region_psnr(result / EDITED["png"]),
    )


def call(command: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as output:
        done = subprocess.run(with_parent.command(command), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise UserError(f"{log}: the command ended with {done.returncode}, expected 0; it says why.")


def region_psnr(edited: Path) -> float:
    """PSNR in dB of an edit of the demo in its masks, frame 0 left out, against the truth."""
    subject = from_files(Files(
        source=DEMO / "source", edited=edited, mask=DEMO / "mask", reference=DEMO / "edited_00000.png", truth=DEMO / "truth"
    ))
    assert subject.truth is not None, "it was given"
    return metrics.edited_quality(subject.edited[1:], subject.truth[1:], subject.preserve[1:]).psnr


def as_row(name: str, found: Measured) -> str:
    """A row of the table."""
    return (f"| {name} | {found.train_seconds:.1f} | {found.edit_seconds:.1f} | {found.step_seconds:.3f} | {found.peak_gb:.2f} "
            f"| {found.loss:.5f} | {found.psnr:.1f} |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/end_to_end"), help="results folder; run again to go on")
    parser.add_argument("--steps", type=int, default=20, help="of each of the two stages")
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=[row.name for row in ROWS], help="some rows only, by name")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"{device_name(device)}, torch {torch.__version__}; {options.steps} steps a stage.", "",
             "| row | training, s | edit, s | s/step | peak GB | loss | edited region, dB |", "|---" * 7 + "|"]  # fmt: skip
    print("\n".join(lines))
    for number, row in enumerate(ROWS):
        if options.rows and row.name not in options.rows:
            continue
        folder = options.out / f"{number}_{options.steps}"
        try:
            if not (folder / SCORES).is_file():
                rmtree(folder, ignore_errors=True)
                write_json_atomic(folder / SCORES, vars(measure(row, options.steps, folder)))
            lines.append(as_row(row.name, Measured(**json.loads((folder / SCORES).read_text(encoding="utf-8")))))
        except UserError as error:
            lines.append(f"| {row.name} | {error} |" + " |" * 5)
        print(lines[-1], flush=True)
        write_text_atomic(options.out / "end_to_end.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
