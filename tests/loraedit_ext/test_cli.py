"""The command line: overrides stand anywhere among the flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import inference
import prepare
import train
from loraedit_ext import cli, launch
from loraedit_ext.evaluation import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def told(monkeypatch):
    """The configurations that verbs hand on; nothing is run."""
    found = []
    for module, name in ((launch, "train"), (launch, "edit_with_seeds"), (run, "evaluate_edit")):
        monkeypatch.setattr(module, name, lambda config, *_: found.append(config))
    return found


@pytest.mark.parametrize(("verb", "flags"), [
    (train, ["--dry_run"]), (train, ["--local_rank=1", "--cache_only"]), (inference, ["--lora", "x"]),
    (evaluate, ["--edit", "x"]),
])
def test_overrides_stand_on_both_sides_of_a_flag(edit_folder, told, verb, flags):
    config = ["--config", str(edit_folder.config)]
    for arguments in (["seed=7", *config, "model.stratified=true", *flags, "stage.0.steps=4"],
                      [*flags, "seed=7", "model.stratified=true", "stage.0.steps=4", *config]):  # fmt: skip
        assert verb.main(arguments) == 0
        settings = told.pop()
        assert (settings.seed, settings.model.stratified, settings.stage[0].steps) == (7, True, 4)
    assert verb.main([*flags, *config]) == 0


def test_an_override_behind_the_flag_to_resume_is_no_run(edit_folder, told, monkeypatch):
    monkeypatch.chdir(edit_folder.path)
    (edit_folder.path / "lr=2").mkdir()
    for words, resumed, steps in (
        ([], True, 3), (["stage.0.steps=4"], True, 4), (["20260101_00-00-00", "stage.0.steps=4"], "20260101_00-00-00", 4),
        (["lr=2"], "lr=2", 3),
    ):
        assert train.main(["--config", "edit.toml", "--resume_from_checkpoint", *words]) == 0
        settings = told.pop()
        assert (settings.resume_from_checkpoint, settings.stage[0].steps) == (resumed, steps)


def test_a_home_folder_is_found_where_the_shell_leaves_it_as_it_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.path("~/jobs/a") == tmp_path / "jobs" / "a"
    assert cli.path("jobs/~a") == Path("jobs/~a")
    for verb, arguments in ((inference, ["--config=~nobody-of-this-name/x"]),
                            (prepare, ["--source=x", "--out=~nobody-of-this-name/x"]),
                            (prepare, ["--source=x", "--out=x", "--edited=3:~nobody-of-this-name/x"])):  # fmt: skip
        with pytest.raises(SystemExit):
            verb.main(arguments)
        assert "~nobody-of-this-name/x: no such home folder" in capsys.readouterr().err


@pytest.mark.parametrize(("argument", "words"), [
    ("--ckpt=", "--ckpt: is empty, expected a path. Is a variable of the shell not set?"),
    ("--edited=3:", "--edited: is empty"),
    ("--source=Gl\udcfcck.mp4", r"--source: 'Gl\udcfcck.mp4': is not UTF-8"),
    ("--caption=Gl\udcfcck", r"--caption: 'Gl\udcfcck': is not UTF-8"),
])
def test_what_a_toml_could_not_hold_is_refused_before_anything_is_read(capsys, argument, words):
    with pytest.raises(SystemExit):
        prepare.main(["--source=x", "--out=y", argument])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "inference"])
def test_an_interrupt_while_imports_run_ends_quietly(tmp_path, verb):
    """They take seconds; Ctrl-C then once showed Python's traceback."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    program = [sys.executable, f"{verb}.py", "--config", "x.toml"]
    done = subprocess.run(program, env={"PYTHONPATH": str(tmp_path)}, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "interrupted; checkpoints and exports written so far are whole.\n"


def test_what_is_no_flag_is_still_refused(edit_folder, told, capsys):
    for arguments in (["--dry-run"], ["--dry"], ["seed=7", "--steps", "4"]):
        with pytest.raises(SystemExit):
            train.main(["--config", str(edit_folder.config), *arguments])
        assert "unrecognized arguments" in capsys.readouterr().err
