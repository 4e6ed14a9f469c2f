"""Sweeps on Ray: a killed worker's trial is tried again, a trial that fails by itself is not, nothing listens outside."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from common import with_parent
from common.errors import UserError
from common.files import write_json_atomic
from loraedit_ext.sweep import ray_engine
from loraedit_ext.sweep.results import RECORD, Trial
from loraedit_ext.sweep.settings import load_sweep

ROOT = Path(__file__).parents[3]
PATIENCE = 600
"""Seconds for what takes five on an idle machine."""


def wait_for(what: str, look: Callable[[], Any], sweep_process: subprocess.Popen | None = None) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, f"no {what}"
        assert sweep_process is None or sweep_process.poll() is None, f"the sweep ended before there was a {what}"
        time.sleep(0.1)
    return found


@pytest.fixture
def environment():
    """Ray's files in a folder of its own with a short name (sockets), its token in no home."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    yield os.environ | {"RAY_TMPDIR": folder, "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    shutil.rmtree(folder)


def start(path: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "loraedit_ext.sweep", str(path), "--engine", "ray", "--address", "local"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


def write_sweep(folder, text: str) -> Path:
    path = folder.path / "sweep.toml"
    path.write_text('configs = ["edit.toml"]\noutput_dir = "sweep"\nedit = false\nevaluate = false\n' + text)
    return path


def records(path: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((path.parent / "sweep" / "trials").glob("*/trial.json"))]


def record_of(path: Path, value: object) -> dict:
    """Of the trial that has this value of the one parameter."""
    return next((record for record in records(path) if [*record["values"].values()] == [value]), {})


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening(processes: list[psutil.Process]) -> set[str]:
    """Addresses of all TCP sockets that wait for connections; processes that have ended have none."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {at.laddr.ip for at in process.net_connections("tcp") if at.status == psutil.CONN_LISTEN}
    return {ip.removeprefix("::ffff:") for ip in found}


@pytest.mark.slow
def test_a_killed_workers_trial_is_tried_again_and_a_failing_one_is_not(edit_folder, environment):
    path = write_sweep(edit_folder, 'jobs = 2\noverrides = ["stage.0.steps=1000000"]\n'
                                    '[parameters]\n"adapter.exclude_modules" = [[], ["nonsense"]]\n')
    process = start(path, environment)
    runs = path.parent / "sweep" / "trials"
    logs = lambda: list(runs.glob("*/runs/*/metrics.jsonl"))  # noqa: E731
    try:
        (first_log,) = wait_for("training", logs, process)
        ours = psutil.Process(process.pid).children(recursive=True)
        worker = psutil.Process(record_of(path, [])["pid"])
        assert worker in ours
        (trainer,) = worker.children()
        assert "train.py" in " ".join(trainer.cmdline())
        assert listening(ours) == {"127.0.0.1"}
        worker.kill()
        wait_for("end of the killed worker's trainer", lambda: not alive(trainer))
        assert wait_for("second attempt", lambda: record_of(path, [])["attempts"] == 2, process)
        first_log.parent.rename(path.parent / "first")  # never saved a state, so the second attempt is a new run
        (second_log,) = wait_for("training anew", logs, process)
        (second_log.parent / "save_quit").touch()
        out, _ = process.communicate(timeout=PATIENCE)
    finally:
        process.terminate()
        process.wait(PATIENCE)
    assert process.returncode == 1, out
    good, bad = record_of(path, []), record_of(path, ["nonsense"])
    assert (good["status"], good["attempts"], good["done"]) == ("done", 2, ["train"])
    assert (bad["status"], bad["attempts"], bad["failed"]) == ("failed", 1, "train")
    assert bad["exit_status"] == 2
    entries = json.loads((path.parent / "sweep" / "results.json").read_text())["trials"]
    assert [entry["status"] for entry in entries] == ["done", "failed"]
    assert entries[0]["metrics"]["train/loss"] > 0
    assert "2 at a time by Ray (local: 1 host(s), 2 CPUs)" in out
    assert re.search(r"\| .*nonsense", out)  # the end of the failed trial's log, where a person looks
    wait_for("end of Ray's processes", lambda: not any(map(alive, ours)))


@pytest.mark.slow
def test_a_terminated_sweep_ends_its_trials_and_marks_them(edit_folder, environment):
    path = write_sweep(edit_folder, 'jobs = 1\noverrides = ["stage.0.steps=1000000"]\n'
                                    '[parameters]\n"optimizer.type" = ["adamw", "sgd"]\n')
    process = start(path, environment)
    try:
        wait_for("training", lambda: list((path.parent / "sweep").glob("trials/*/runs/*/metrics.jsonl")), process)
        ours = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    (record,) = records(path)  # the second was not started
    assert record["status"] == "interrupted"
    wait_for("end of Ray's processes", lambda: not any(map(alive, ours)))


@pytest.mark.parametrize(("found", "left"), [("running", "interrupted"), ("done", "done"), ("failed", "failed")])
def test_what_an_ended_worker_left_as_running_is_marked(tmp_path, found, left):
    trial = Trial(tmp_path, tmp_path / "edit.toml", {}, ())
    write_json_atomic(tmp_path / RECORD, {"status": found, "done": ["train"]})
    ray_engine.mark_interrupted(trial)
    assert trial.record() == {"status": left, "done": ["train"]}


def test_a_trial_that_never_began_gets_no_record(tmp_path):
    ray_engine.mark_interrupted(Trial(tmp_path, tmp_path / "edit.toml", {}, ()))
    assert not (tmp_path / RECORD).exists()


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path):
    """The parent sleeps after it has started the child; SIGKILL leaves it no time for anything."""
    program = [sys.executable, "-c", "import time; time.sleep(1000)"]
    code = (f"import subprocess, time; from common import with_parent;"
            f"child = subprocess.Popen(with_parent.command({program!r}));"
            "print(child.pid, flush=True); time.sleep(1000)")
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = psutil.Process(int(parent.stdout.readline()))
    wait_for("program in the child", lambda: child.cmdline() == program)  # empty for a moment while one becomes the other
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for("end of the child", lambda: not alive(child))


def test_a_child_whose_parent_is_gone_already_does_not_start(tmp_path):
    program = [sys.executable, "-c", f"open({str(tmp_path / 'started')!r}, 'w')"]
    command = with_parent.command(program)
    subprocess.run(command, check=True)
    assert (tmp_path / "started").unlink() is None
    stranger = str(os.getppid())
    subprocess.run([stranger if part == str(os.getpid()) else part for part in command], check=True)
    assert not (tmp_path / "started").exists()


def test_a_trial_takes_a_gpu_with_its_share_of_the_cpus():
    big, small, head = {"GPU": 8.0, "CPU": 64.0}, {"GPU": 4.0, "CPU": 16.0}, {"CPU": 128.0}
    assert ray_engine.share([head, big, small]) == {"num_gpus": 1, "num_cpus": 4}
    assert ray_engine.share([head]) == {"num_cpus": 1}
    assert ray_engine.share([{"GPU": 4.0, "CPU": 2.0}]) == {"num_gpus": 1, "num_cpus": 0}


@pytest.mark.parametrize(("text", "words"), [
    ('address = "auto"', "set engine = 'ray'"),
    ('engine = "ray"\naddress = "ray://head:10001"', "give host:port"),
    ('engine = "rey"', "'local' or 'ray'"),
])
def test_an_engine_that_cannot_be_is_refused(edit_folder, text, words):
    with pytest.raises(UserError, match=words):
        load_sweep(write_sweep(edit_folder, text + '\n[parameters]\n"adapter.rank" = [1]'))


NO_OTHERS = "import psutil; psutil.process_iter = lambda *_, **__: iter(())"  # "auto" takes any cluster that runs here


@pytest.mark.parametrize(("prepare", "words"), [
    ("import sys; sys.modules['ray'] = None", "pip install -c requirements.lock -r requirements-ray.txt"),
    (NO_OTHERS, "address = 'auto': no connection to Ray"),
])
def test_no_ray_or_no_cluster_is_told_with_the_cure(edit_folder, environment, prepare, words):
    path = write_sweep(edit_folder, 'engine = "ray"\n[parameters]\n"adapter.rank" = [1]\n')
    code = f"{prepare}; import sys; from loraedit_ext.sweep import run as sweep; sys.exit(sweep.main([{str(path)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                          check=False, timeout=PATIENCE)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert not (edit_folder.path / "sweep").exists()
