"""Tracking: jsonl and tensorboard always, wandb offline under one id; no key in anything written."""

from __future__ import annotations

import json
import time

import pytest

from common.errors import UserError
from loraedit_ext import launch
from loraedit_ext.config import MonitoringSettings, load_config
from loraedit_ext.training.tracking import JsonlTracker, history, summarise

WANDB = ["monitoring.enable_wandb=true", "monitoring.wandb_mode=offline", "monitoring.wandb_tags=['helmet']"]
SECRET = "0123456789abcdef0123456789abcdef01234567"


def train(folder, *overrides):
    launch.train(load_config(folder.config, overrides))


def test_a_resumed_jsonl_drops_what_came_after_the_checkpoint(tmp_path):
    first = JsonlTracker(tmp_path, 0)
    for step in (1, 2, 3):
        first.log(step, {"train/loss": step / 10})
    JsonlTracker(tmp_path, 2).log(3, {"train/loss": 9.0})
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["train/loss"]) for row in rows] == [(1, 0.1), (2, 0.2), (3, 9.0)]


def test_a_last_line_that_a_killed_run_left_half_written_is_dropped_and_told(tmp_path, caplog):
    JsonlTracker(tmp_path, 0).log(1, {"train/loss": 0.1})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 2, "train/lo')
    assert history(tmp_path) == [{"step": 1, "train/loss": 0.1}]
    assert f'{path}: the last line is cut off and left out: {{"step": 2, "train/lo' in caplog.text
    JsonlTracker(tmp_path, 1).log(2, {"train/loss": 0.3})
    assert [row["train/loss"] for row in history(tmp_path)] == [0.1, 0.3]


def test_a_damaged_line_before_the_last_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        history(tmp_path)


def test_tensorboard_holds_what_the_jsonl_holds(edit_folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(edit_folder, "eval_every_n_steps=3")
    (run,) = edit_folder.runs()
    events = EventAccumulator(str(run))
    events.Reload()
    rows = edit_folder.metrics()
    names = {name for row in rows for name in row} - {"step"}
    assert set(events.Tags()["scalars"]) == names
    assert names >= {"train/loss", "train/grad_norm", "train/lr", "train/step_seconds", "train/memory_gb", "motion/loss"}
    for name in ("train/loss", "train/lr", "motion/loss_quantile_0.50"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        expected = [(row["step"], row[name]) for row in rows if name in row]
        assert found == [(step, pytest.approx(value)) for step, value in expected]


def wandb_records(run_folder):
    """All records of an offline run's log; waits for its end, because wandb's own process writes behind a busy trainer.

    What wandb finds out about the machine may come later still.
    """
    deadline = time.monotonic() + 60
    while all(record.WhichOneof("record_type") != "exit" for record in written_records(run_folder)):
        assert time.monotonic() < deadline, f"{run_folder}: {len(written_records(run_folder))} records and no end"
        time.sleep(0.2)
    return written_records(run_folder)


def written_records(run_folder):
    """Records on disk, read with wandb's own protobuf (LevelDB log: 7 byte header, 32 KiB blocks)."""
    from wandb.proto import wandb_internal_pb2

    found, records = [], b""
    (file,) = run_folder.glob("*.wandb")
    data, position = file.read_bytes(), 7
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        if position + 7 + length > len(data):  # half a record is on disk
            break
        records += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found.append(wandb_internal_pb2.Record.FromString(records))
            records = b""
    return found


def values(items):
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}


def wandb_summary(run_folder):
    """What the run's summary holds in the end."""
    found = {}
    for record in wandb_records(run_folder):
        if record.WhichOneof("record_type") == "summary":
            found |= values(record.summary.update)
    return found


def wandb_history(run_folder):
    """What was logged, row by row."""
    records = wandb_records(run_folder)
    return [values(record.history.item) for record in records if record.WhichOneof("record_type") == "history"]


@pytest.fixture
def offline(monkeypatch):
    """wandb without a server and without a word."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_is_told_what_the_run_is(edit_folder, offline):
    """Project, entity, group, name, tags; the whole configuration; and that every metric is over `train/step`."""
    named = ["monitoring.wandb_tracker_name=helmets", "monitoring.wandb_entity=us", "monitoring.wandb_group=lr",
             "monitoring.wandb_run_name=first"]
    train(edit_folder, *WANDB, *named, "stage=[{name='motion', steps=1, mix={motion=1}}]")
    (run,) = edit_folder.runs()
    records = wandb_records(next((run / "wandb").glob("offline-run-*")))
    told = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (told.project, told.entity, told.run_group, told.display_name) == ("helmets", "us", "lr", "first")
    assert list(told.tags) == ["helmet"]
    logged = values(told.config.update)
    resolved = json.loads((run / "config.json").read_text())["config"]
    assert {key: logged[key] for key in resolved} == resolved
    axes = {record.metric.glob_name or record.metric.name: record.metric.step_metric for record in records
            if record.WhichOneof("record_type") == "metric"}
    assert axes["*"] == "train/step"


def test_wandb_gets_previews_the_final_lora_and_the_evaluation(edit_folder, offline):
    import evaluate

    on = [*WANDB, "monitoring.wandb_log_model=true"]
    train(edit_folder, *on, "sample_every_n_steps=3", "preview.steps=1", "preview.guidance=1")
    (run,) = edit_folder.runs()
    (folder,) = (run / "wandb").glob("offline-run-*")
    videos = [row for row in wandb_history(folder) if "preview/path" in row or "preview" in row]
    assert [row["train/step"] for row in videos] == [3, 6]
    media = sorted((folder / "files" / "media" / "videos").rglob("*.mp4"))
    assert {path.read_bytes() for path in media} == {
        (run / "previews" / f"step{step}.mp4").read_bytes() for step in (3, 6)
    }
    artifacts = [r.request.log_artifact.artifact for r in wandb_records(folder)
                 if r.WhichOneof("record_type") == "request" and r.request.HasField("log_artifact")]
    artifacts += [r.artifact for r in wandb_records(folder) if r.WhichOneof("record_type") == "artifact"]
    (artifact,) = artifacts
    identity = (run / "wandb_run_id").read_text().strip()
    assert (artifact.name, artifact.type) == (f"lora-{identity}", "model")
    assert {"final", "step6"} <= set(artifact.aliases)  # wandb adds `latest`
    assert [entry.path for entry in artifact.manifest.contents] == ["adapter_model.safetensors"]
    launch.edit(load_config(edit_folder.config), None, None)
    assert evaluate.main(["--config", str(edit_folder.config), *WANDB]) == 0
    later = next(f for f in (run / "wandb").glob("offline-run-*") if f != folder)
    assert (later / f"run-{identity}.wandb").is_file()
    judged = json.loads((run / "step6" / "edit" / "evaluation.json").read_text())["metrics"]
    expected = {f"evaluation/{key}": value["value"] for key, value in judged.items() if value["value"] is not None}
    assert len(expected) > 8
    found = wandb_summary(later)
    assert {key: found[key] for key in expected} == expected


def test_evaluation_leaves_wandb_alone_where_the_training_had_none(tmp_path):
    settings = MonitoringSettings(enable_wandb=True, wandb_mode="offline")
    assert summarise(None, settings, {"evaluation/x": 1.0}) is None
    assert summarise(tmp_path, settings, {"evaluation/x": 1.0}) is None
    assert not list(tmp_path.iterdir())


@pytest.fixture
def fresh_wandb():
    """wandb reads the environment once a process; before and behind a test that changes it, forget what was read."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


def test_the_run_that_a_sweeps_agent_watches_is_the_one_that_is_logged_to(
    edit_folder, offline, fresh_wandb, monkeypatch
):
    monkeypatch.setenv("WANDB_RUN_ID", "agent123")
    train(edit_folder, *WANDB, "stage=[{name='motion', steps=1, mix={motion=1}}]")
    (run,) = edit_folder.runs()
    assert (run / "wandb_run_id").read_text() == "agent123\n"
    assert next((run / "wandb").glob("offline-run-*")).name.endswith("-agent123")


def test_wandb_offline_gets_every_number_and_one_id_over_a_resume(edit_folder, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(edit_folder, *WANDB, "checkpoint_every_n_steps=4")
    (run,) = edit_folder.runs()
    (run / "latest").write_text("global_step4\n")
    train(edit_folder, *WANDB, "resume_from_checkpoint=true")
    folders = sorted((run / "wandb").glob("offline-run-*"))
    identity = (run / "wandb_run_id").read_text().strip()
    assert len(folders) == 2
    # The folder's own name gets a suffix where two runs begin in one second.
    assert all((folder / f"run-{identity}.wandb").is_file() for folder in folders)
    first, second = (wandb_history(folder) for folder in folders)
    assert [row["train/step"] for row in first] == [1, 2, 3, 4, 5, 6]
    assert [row["train/step"] for row in second] == [5, 6]
    for row, expected in zip([*first[:4], *second], edit_folder.metrics(), strict=True):
        for name, value in expected.items():
            assert row["train/step" if name == "step" else name] == pytest.approx(value), name


def test_no_key_is_written_anywhere(edit_folder, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(edit_folder, *WANDB)
    launch.edit(load_config(edit_folder.config), None, None)
    files = [path for path in edit_folder.path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


def test_wandb_is_not_even_imported_unless_enabled(edit_folder):
    import subprocess
    import sys
    from pathlib import Path

    code = (
        "import sys, train; code = train.main(sys.argv[1:]); assert code == 0, code; "
        "print('wandb imported' if 'wandb' in sys.modules else 'no wandb')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", str(edit_folder.config)], capture_output=True, text=True,
        check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.stdout.strip().endswith("no wandb")
