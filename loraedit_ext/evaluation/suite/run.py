"""The benchmark, `evaluate.py --suite scenes`: methods x tasks x seeds, resumable, side by side, with its report."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import with_parent
from common.errors import UserError
from common.files import hash_file, hash_json, write_text_atomic
from dataset.images import write_png
from dataset.video import read_video
from dataset.video_writer import write_lossless
from loraedit_ext.config import RunConfig
from loraedit_ext.evaluation.suite import methods, page, report, tasks
from loraedit_ext.evaluation.suite.claims import Results, claims
from loraedit_ext.evaluation.suite.methods import METHODS, Method
from loraedit_ext.evaluation.suite.scores import scores
from loraedit_ext.evaluation.suite.settings import SuiteSettings, load_suite
from loraedit_ext.evaluation.suite.tasks import SuiteTask, TaskMedia

FORMAT = 1
"""Of a result: raised when scores or tasks change their meaning, so that old results are computed anew."""
RESULTS, TABLE, SHEET = "results.jsonl", "results.md", "contact_sheet.png"
DEFAULT_OUT = Path("runs/suite")
Record = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One result to have: a method on a task with a seed."""

    task: SuiteTask
    method: Method
    seed: int
    config: RunConfig
    key: str
    """Hash of all that the result depends on."""


@dataclass(frozen=True)
class Unit:
    """What one process does in one go: a task and a seed, whose methods share encoded latents and the motion stage."""

    cells: tuple[Cell, ...]
    out: Path
    keep_video: bool


def run_suite(overrides: Iterable[str], quick: bool = False, out: Path | None = None) -> Results:
    """Run what is missing in the results folder, then write and print the tables and the claims.

    Args:
        overrides: `suite.KEY=value`, or any key of the run's TOML for all methods.
        quick: a subset that takes a few minutes.
        out: results folder; what it holds already is not computed again.

    Raises:
        UserError: settings, checkpoint or results file are not what they should be.
    """
    settings, rest = load_suite(overrides, quick)
    out = (out or DEFAULT_OUT).resolve()
    cells = list(_cells(settings, rest, out))
    if settings.report_only:
        cells = _there(cells, out)
    else:
        run_missing(cells, settings, out)
    results = Results(tasks.chosen(settings.tasks), records_of(cells, read_records(out)))
    _report(results, cells, settings, rest, out)
    return results


def quick_scores(
    checkpoint: Path, out: Path, overrides: Sequence[str] = ()
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of two quick tasks through the whole pipeline, in this process: {task: {method: {score: value}}}.

    What a test that guards the pipeline compares with recorded bounds.
    """
    fixed = [f"suite.checkpoint={checkpoint}", "suite.tasks=guard", "suite.jobs=1"]
    if not any(override.startswith("suite.methods=") for override in overrides):
        fixed.append('suite.methods=["naive", "motion", "appearance"]')
    results = run_suite([*fixed, *overrides], quick=True, out=out)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for record in results.records:
        found.setdefault(record["task"], {})[record["method"]] = record["scores"]
    return found


def _cells(settings: SuiteSettings, overrides: Sequence[str], out: Path) -> Iterator[Cell]:
    """Everything that is asked for; writes the tasks as a user would bring them."""
    checkpoint = settings.checkpoint.resolve()
    if not checkpoint.is_dir():
        raise UserError(
            f"{checkpoint}: no checkpoint folder. Give suite.checkpoint=FOLDER; pretraining/README.md makes one."
        )
    # The model card may change without changing the model.
    identity = hash_json({str(file.relative_to(checkpoint)): hash_file(file) for file in sorted(checkpoint.rglob("*"))
                          if file.is_file() and file.suffix != ".md"})  # fmt: skip
    for task in tasks.chosen(settings.tasks):
        folder = out / "tasks" / task.name
        pixels = tasks.write(task, folder)
        path = methods.write_config(folder, checkpoint)
        for method in (method for key, method in METHODS.items() if key in settings.methods):
            # What draws no random number needs no second seed.
            for seed in settings.seeds if method.learned else settings.seeds[:1]:
                config = methods.config_of(path, method, seed, settings.budget, overrides)
                yield Cell(task, method, seed, config, _key(task, pixels, method, config, identity))


def _key(task: SuiteTask, pixels: str, method: Method, config: RunConfig, checkpoint: str) -> str:
    facts = {"format": FORMAT, "task": asdict(task), "pixels": pixels,
             "settings": methods.settings_of(method, config)}  # fmt: skip
    if method.key not in methods.PASTES:
        facts["checkpoint"] = checkpoint
    return hash_json(facts)


def _there(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The cells that the results file has.

    Raises:
        UserError: it has none of them.
    """
    keys = {record["key"] for record in read_records(out)}
    there = [cell for cell in cells if cell.key in keys]
    print(f"suite     {len(there)} of {len(cells)} results are in {out / RESULTS}; the others are left out", flush=True)
    if not there:
        raise UserError(f"{out / RESULTS}: none of the results that are asked for. Remove suite.report_only to compute them.")
    return there


def run_missing(cells: Sequence[Cell], settings: SuiteSettings, out: Path) -> None:
    """Compute every cell that the results file lacks."""
    there = {record["key"] for record in read_records(out)}
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if cell.key not in there:
            groups.setdefault((cell.task.name, cell.seed), []).append(cell)
    units = [Unit(tuple(group), out, seed == settings.seeds[0]) for (_, seed), group in groups.items()]
    missing = sum(len(unit.cells) for unit in units)
    print(f"suite     {len(cells)} results, {len(cells) - missing} of them in {out / RESULTS}", flush=True)
    say = _Progress(len(units))
    if settings.processes == 1 or len(units) <= 1:
        for unit in units:
            say(run_unit(unit))
    else:
        _in_processes(units, min(settings.processes, len(units)), say)


def _in_processes(units: Sequence[Unit], jobs: int, say: Callable[[str], None]) -> None:
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(jobs):
        numbers.put(number)
    gpus = torch.cuda.device_count()
    with ProcessPoolExecutor(jobs, context, _start_process, (numbers, gpus, os.getpid())) as pool:
        waiting = [pool.submit(run_unit, unit) for unit in units]
        try:
            for done in as_completed(waiting):
                say(done.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start_process(numbers: Any, gpus: int, parent: int) -> None:
    """Threads of a process would fight with the other processes over the cores; GPUs are dealt out in turn.

    If the benchmark is killed its processes end, too; they would wait for work for ever.
    """
    with_parent.end_with(parent)
    number = numbers.get()
    torch.set_num_threads(1)
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number % gpus]


def run_unit(unit: Unit) -> str:
    """Run the methods of a task and a seed, one line of the results file each; returns what was done.

    What they print goes to a log beside the task.
    """
    # Ours before anybody else's: a handler made later would write to the log file of this unit, and outlive it.
    logging.basicConfig(level=logging.ERROR)
    first = unit.cells[0]
    folder = first.config.dataset.parent
    methods.forget_runs(folder, first.seed)
    media = TaskMedia(first.task)
    started = time.perf_counter()
    with open(folder / f"log-{first.seed}.txt", "a", encoding="utf-8") as log, redirect_stdout(log), \
            redirect_stderr(log):  # fmt: skip
        for cell in unit.cells:
            result = methods.run(cell.method, media, cell.config)
            if unit.keep_video:
                write_lossless(video_path(unit.out, cell.key), result.video, Fraction(8))
            _append(unit.out, record_of(cell, result, media))
    methods.forget_runs(folder, first.seed)
    return f"{first.task.name} seed {first.seed}: {len(unit.cells)} methods, {time.perf_counter() - started:.0f} s"


def record_of(cell: Cell, result: methods.Result, media: TaskMedia) -> Record:
    """A line of the results file."""
    found = {name: _json_number(value) for name, value in scores(result.video, media).items()}
    return {
        "key": cell.key, "task": cell.task.name, "method": cell.method.key, "seed": cell.seed, "steps": result.steps,
        "seconds": result.seconds, "scores": found, "settings": methods.settings_of(cell.method, cell.config),
    }  # fmt: skip


def video_path(out: Path, key: str) -> Path:
    """Where the first seed's result is kept, before compositing and without loss."""
    return out / "videos" / f"{key[:24]}.mkv"


def _append(out: Path, record: Record) -> None:
    """One write for one line: processes append side by side."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / RESULTS, "ab", buffering=0) as file:
        file.write((json.dumps(record) + "\n").encode())


def read_records(out: Path) -> list[Record]:
    """All lines of the results file, infinite scores as numbers again.

    Raises:
        UserError: a line is not whole.
    """
    path = out / RESULTS
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}: line {number} is not whole ({error.msg}). Remove it; it is computed again.") from error
        record["scores"] = {name: _number(value) for name, value in record["scores"].items()}
        records.append(record)
    return records


def _json_number(value: float) -> float | str | None:
    """JSON has no nan, which is null here, and no infinity, which is a string."""
    if math.isnan(value):
        return None
    return str(value) if math.isinf(value) else value


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def records_of(cells: Iterable[Cell], records: Iterable[Record]) -> list[Record]:
    """The records of these cells, in their order; results of other settings stay out."""
    by_key = {record["key"]: record for record in records}
    return [by_key[cell.key] for cell in cells]


def _report(
    results: Results, cells: Sequence[Cell], settings: SuiteSettings, overrides: Sequence[str], out: Path
) -> None:
    found = claims(results)
    facts = {
        "tasks": f"{len(results.tasks)} ({settings.tasks if isinstance(settings.tasks, str) else 'chosen'})",
        "seeds": ", ".join(map(str, settings.seeds)), "checkpoint": settings.checkpoint.name,
        "steps": f"{settings.steps} (naive, motion), and {settings.appearance_steps} with appearance",
        "overrides": " ".join(overrides) or "none", "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }  # fmt: skip
    text = report.markdown(results, found, facts)
    write_text_atomic(out / TABLE, text)
    shown, videos = videos_of(results.tasks, cells, settings.seeds[0], out)
    write_png(out / SHEET, report.contact_sheet(results.tasks, shown, videos))
    html = page.write_page(out, results, found, facts, shown, videos)
    for line in ("", *report.main_table(results), "", *report.claims_table(found), ""):
        print(line)
    for path in (out / TABLE, out / SHEET, html):
        print(f"wrote     {path}", flush=True)


def videos_of(
    shown: Sequence[SuiteTask], cells: Iterable[Cell], seed: int, out: Path
) -> tuple[list[str], dict[tuple[str, str], np.ndarray]]:
    """What is there to be seen of a seed.

    Returns:
        The columns, source, truth and methods; and uint8 (F, H, W, 3) by task name and column.
    """
    videos: dict[tuple[str, str], np.ndarray] = {}
    for task in shown:
        media = TaskMedia(task)
        videos[task.name, "source"], videos[task.name, "truth"] = media.source, media.truth
    columns = dict.fromkeys(["source", "truth"])
    for cell in cells:
        path = video_path(out, cell.key)
        if cell.seed == seed and cell.method.key != "source" and path.is_file():
            videos[cell.task.name, cell.method.key] = read_video(path).frames
            columns[cell.method.key] = None
    return list(columns), videos


class _Progress:
    """A line for every unit that is done, with the time that the rest may take."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, time.perf_counter()

    def __call__(self, what: str) -> None:
        self.done += 1
        left = (time.perf_counter() - self.started) / self.done * (self.total - self.done)
        print(f"done      {self.done} of {self.total}: {what}; about {left / 60:.0f} min left", flush=True)
