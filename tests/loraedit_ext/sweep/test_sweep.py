"""Sweeps: what is tried, that wandb's agent speaks our overrides, and real trials that fail, finish and go on."""

from __future__ import annotations

import base64
import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import yaml

from common.errors import UserError
from dataset.video import read_media
from dataset.video_writer import write_video
from loraedit_ext.config import load_config, parse_value
from loraedit_ext.evaluation import pages
from loraedit_ext.sweep import run as sweep
from loraedit_ext.sweep.local_engine import slots
from loraedit_ext.sweep.page import write_page
from loraedit_ext.sweep.results import assignments, table
from loraedit_ext.sweep.settings import combinations, load_sweep

ROOT = Path(__file__).parents[3]


def write_sweep(folder, text: str) -> Path:
    path = folder.path / "sweep.toml"
    path.write_text('configs = ["edit.toml"]\noutput_dir = "sweep"\n' + text)
    return path


def plan(folder, text: str):
    return sweep.plan_trials(load_sweep(write_sweep(folder, text)))


def test_a_grid_tries_every_combination_on_every_job(edit_folder):
    (edit_folder.path / "other.toml").write_text(edit_folder.config.read_text())
    path = write_sweep(edit_folder, '[parameters]\n"optimizer.lr" = [1e-4, 2e-4]\nadapter.rank = [2, 4]\n')
    path.write_text(path.read_text().replace('["edit.toml"]', '["edit.toml", "other.toml"]'))
    settings = load_sweep(path)
    tried = combinations(settings)
    assert [(t["optimizer.lr"], t["adapter.rank"]) for t in tried] == [(1e-4, 2), (1e-4, 4), (2e-4, 2), (2e-4, 4)]
    trials = sweep.plan_trials(settings)
    assert len(trials) == 8
    assert len({trial.folder for trial in trials}) == 8
    config = load_config(trials[1].config, trials[1].overrides())
    assert (config.optimizer.lr, config.adapter.rank) == (1e-4, 4)
    assert config.output_dir == trials[1].folder / "runs"


def test_a_random_search_draws_within_its_ranges_and_again_the_same(edit_folder):
    text = """
method = "random"
trials = 40
seed = 3
[parameters]
"optimizer.lr" = { min = 1e-5, max = 1e-3, log = true }
"adapter.rank" = { min = 2, max = 9, whole = true }
"model.stratified" = [true, false]
"""
    first = combinations(load_sweep(write_sweep(edit_folder, text)))
    assert first == combinations(load_sweep(write_sweep(edit_folder, text)))
    assert first != combinations(load_sweep(write_sweep(edit_folder, text.replace("seed = 3", ""))))
    rates = sorted(t["optimizer.lr"] for t in first)
    assert 1e-5 <= rates[0] < 1e-4 < rates[-1] <= 1e-3  # the logarithm is drawn evenly: half of them below 1e-4
    assert all(isinstance(t["adapter.rank"], int) and 2 <= t["adapter.rank"] <= 9 for t in first)
    assert {t["model.stratified"] for t in first} == {True, False}


def test_a_changed_run_is_a_new_trial_and_an_unchanged_one_is_not(edit_folder):
    text = '[parameters]\n"optimizer.lr" = [1e-4]\n'
    (before,), (again,) = plan(edit_folder, text), plan(edit_folder, text)
    assert before.folder == again.folder
    edit_folder.config.write_text(edit_folder.config.read_text().replace("rank = 4", "rank = 3"))
    (after,) = plan(edit_folder, text)
    assert after.folder != before.folder


@pytest.mark.parametrize("value", [True, None, 1e-06, 16, "adamw", "a b", [1, 2], {"motion": 1}, -0.5])
def test_values_reach_the_run_as_they_are(value):
    (text,) = assignments({"key": value})
    assert parse_value(text.removeprefix("key=")) == value


@pytest.mark.parametrize(("text", "words"), [
    ('[parameters]\n"optimizer.lr" = { min = 1e-5, max = 1e-3 }', "is a range; set method = 'random'"),
    ('method = "random"\n[parameters]\n"optimizer.lr" = [1e-4]', "needs `trials`"),
    ('method = "random"\ntrials = 2\n[parameters]\n"optimizer.lr" = { min = 2, max = 1 }', "needs min < max"),
    ('[parameters]\n"optimizer.lr" = []', "lists no value"),
    ('[parameters]\n"adapter.rnk" = [1]', "did you mean `rank`"),
    ('[parameters]\n"optimizer.lrr" = [1]', r"optimizer\.lrr"),
    ('overrides = ["pipeline_stages=2"]\n[parameters]\n"adapter.rank" = [1]', "a trial is one process"),
    ('edit = false\n[parameters]\n"adapter.rank" = [1]', "evaluate = true needs edit = true"),
    ('[parameters]\noutput_dir = ["a", "b"]', "`output_dir` cannot vary"),
    ('overrides = ["output_dir=a"]\n[parameters]\n"adapter.rank" = [1]', "`output_dir` cannot vary"),
])
def test_a_sweep_that_cannot_be_is_refused_before_it_starts(edit_folder, text, words):
    with pytest.raises(UserError, match=words):
        plan(edit_folder, text)
    assert not (edit_folder.path / "sweep").exists()


def test_each_gpu_gets_one_trial_at_a_time(monkeypatch):
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert slots(None) == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert slots(None) == ["5", "3"]
    assert slots(1) == ["5"]
    with pytest.raises(UserError, match="jobs = 3, but there are 2 GPUs"):
        slots(3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert slots(3) == [None] * 3


def test_the_example_sweeps_set_keys_that_runs_have():
    settings = load_sweep(ROOT / "examples" / "sweep.toml")
    assert len(sweep.plan_trials(settings)) == 4
    assert "model" not in tomllib.loads((ROOT / "examples" / "sweep.toml").read_text())


@pytest.mark.parametrize("pick", [0, -1])
def test_every_argument_that_wandbs_agent_makes_is_an_override(pick):
    """examples/sweep.yaml through wandb's own code for the command line, offline."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    spec = yaml.safe_load((ROOT / "examples" / "sweep.yaml").read_text())
    chosen = {
        key: {"value": rule["values"][pick] if "values" in rule else (rule["min"], rule["max"])[pick]}
        for key, rule in spec["parameters"].items()
    }
    chosen |= {"optimizer.lr": {"value": 1e-06}, "model.shift": {"value": None}}
    arguments = create_sweep_command_args({"args": chosen})["args_no_hyphens"]
    assert "optimizer.lr=1e-06" in arguments
    assert f"model.stratified={chosen['model.stratified']['value']}" in arguments
    command = [part for part in create_sweep_command(spec["command"]) if part != "env"]
    assert command[-1] == "${args_no_hyphens}" or "args_no_hyphens" in command[-1]
    fixed = command[command.index("--config") + 2 : -1]
    config = load_config(ROOT / command[command.index("--config") + 1], [*fixed, *arguments])
    assert config.monitoring.enable_wandb
    assert config.optimizer.lr == 1e-06
    assert config.model.shift is None
    for key, choice in chosen.items():
        table_name, _, name = key.rpartition(".")
        assert getattr(getattr(config, table_name) if table_name else config, name) == choice["value"], key


def test_the_table_has_a_cell_for_everything_and_escapes_bars():
    entry = {"name": "a|b", "status": "done", "values": {"lr": 0.000123456}, "metrics": {"psnr": 31.23456}}
    other = {"name": "c", "status": "failed", "values": {"rank": 4}, "metrics": {}}
    assert table([entry, other]).splitlines() == [
        "| trial | status | lr | rank | psnr |", "|---|---|---|---|---|",
        "| a\\|b | done | 0.0001235 |  | 31.23 |", "| c | failed |  | 4 |  |",
    ]


def page_entries(folder: Path) -> list[dict]:
    """Two trials with an edit of 160x160, and one that failed."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_video(folder / name / "edited.mp4", rng.integers(0, 255, (5, 160, 160, 3), dtype=np.uint8), 8)
    entry = {"status": "done", "log": None, "config": "edit.toml", "overrides": []}
    return [
        entry | {"name": "a", "values": {"lr": 0.01}, "edit": str(folder / "a"), "metrics": {"preserved_psnr": 31.5}},
        entry | {"name": "b", "values": {"lr": 0.002}, "edit": str(folder / "b"), "metrics": {"preserved_psnr": "inf"}},
        entry | {"name": "c<script>", "status": "failed", "values": {}, "edit": None, "metrics": {}},
    ]


def test_the_page_has_every_trial_with_its_numbers_and_a_small_video(tmp_path):
    page = write_page(tmp_path, page_entries(tmp_path)).read_text()
    films = re.findall(r'src="data:video/mp4;base64,([^"]+)"', page)
    assert len(films) == 2
    (tmp_path / "film.mp4").write_bytes(base64.b64decode(films[0]))
    film = read_media(tmp_path / "film.mp4")
    assert (film.total, film.fps) == (5, 8)
    assert film.size[0] * film.size[1] <= 208 * 120
    assert "<td>c&lt;script&gt;</td>" in page
    assert 'data-value="0.002">0.002</td>' in page
    assert 'data-value="inf">inf</td>' in page
    assert "PSNR" in re.search(r'title="([^"]*)"><button>preserved_psnr', page).group(1)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing from elsewhere


def test_videos_that_are_too_large_together_lie_beside_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "EMBED_BYTES", 1000)
    page = write_page(tmp_path, page_entries(tmp_path)).read_text()
    sources = re.findall(r'<video src="([^"]+)"', page)
    assert len(sources) == 2
    assert all((tmp_path / source).is_file() for source in sources)


@pytest.mark.slow
def test_a_sweep_isolates_a_failure_finishes_the_rest_and_repeats_nothing(edit_folder, capfd):
    path = write_sweep(edit_folder, 'jobs = 2\n[parameters]\n"optimizer.lr" = [1e-3, 1e30]\n')
    assert sweep.main([str(path)]) == 1
    good, bad = json.loads((edit_folder.path / "sweep" / "results.json").read_text())["trials"]
    assert (good["status"], bad["status"]) == ("done", "failed")
    assert good["metrics"]["steps"] == 6
    assert {"train/loss", "preserved_psnr", "warping_inside"} <= good["metrics"].keys()
    evaluation = json.loads((Path(good["edit"]) / "evaluation.json").read_text())
    assert good["metrics"]["preserved_psnr"] == evaluation["metrics"]["preserved_psnr"]["value"]
    assert "Lower optimizer.lr" in Path(bad["log"]).read_text()
    assert "Lower optimizer.lr" in capfd.readouterr().out  # the end of the log, where a person looks
    assert (edit_folder.path / "sweep" / "results.html").read_text().count("<video") == 1
    edited = (Path(good["edit"]) / "edited.json").stat().st_mtime_ns
    assert sweep.main([str(path)]) == 1
    assert "2 trials, 1 done before" in capfd.readouterr().out
    assert (Path(good["edit"]) / "edited.json").stat().st_mtime_ns == edited
    assert "| done | 0.001 |" in (edit_folder.path / "sweep" / "results.md").read_text()


@pytest.mark.slow
def test_a_trial_that_was_cut_off_goes_on_from_its_checkpoint(edit_folder):
    """As after a kill in the second stage: a state of step 3, and no word of a finished training."""
    path = write_sweep(edit_folder, 'edit = false\nevaluate = false\n[parameters]\n"adapter.rank" = [2]\n')
    assert sweep.main([str(path)]) == 0
    (trial,) = plan(edit_folder, path.read_text().split("\n", 2)[2])
    (run,) = trial.runs.iterdir()
    (run / "latest").write_text("global_step3\n")
    record = trial.record()
    (trial.folder / "trial.json").write_text(json.dumps(record | {"done": [], "status": "running"}))
    assert sweep.main([str(path)]) == 0
    assert list(trial.runs.iterdir()) == [run]
    assert (run / "latest").read_text() == "global_step6\n"
    assert trial.record()["status"] == "done"


@pytest.mark.slow
def test_a_terminated_sweep_ends_its_trials_and_marks_them(edit_folder):
    path = write_sweep(edit_folder, 'overrides = ["stage.0.steps=5000"]\n[parameters]\n"adapter.rank" = [1, 2]\n')
    process = subprocess.Popen([sys.executable, "-m", "loraedit_ext.sweep", str(path)], cwd=ROOT)
    runs = edit_folder.path / "sweep" / "trials"
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    (record,) = runs.glob("*/trial.json")  # the second was not started
    assert json.loads(record.read_text())["status"] == "interrupted"  # written when its process had ended
