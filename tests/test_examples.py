"""Every example TOML is run, from training to the edited video; only checkpoint, sizes and steps are made small."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

import train
from dataset.images import write_png
from loraedit_ext import launch
from loraedit_ext.config import load_config
from tests.conftest import square_clip

ROOT = Path(__file__).parents[1]
RUNS = sorted(
    path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.toml") if "model" in tomllib.loads(path.read_text())
)
SMALL = ["edit.steps=2", "gradient_accumulation_steps=1", "pipeline_stages=1", "model.dtype=float32"]


def test_every_job_is_used_by_an_example_run():
    jobs = set((ROOT / "examples").rglob("job*.toml"))
    used = {((ROOT / run).parent / tomllib.loads((ROOT / run).read_text())["dataset"]).resolve() for run in RUNS}
    assert jobs == used


@pytest.fixture
def examples(tmp_path) -> Path:
    """A copy of examples/, with media where the user's would be."""
    folder = tmp_path / "examples"
    shutil.copytree(ROOT / "examples", folder)
    video, mask = square_clip()
    for example in folder.iterdir():
        if (example / "media").exists() or not example.is_dir() or (example / "source").exists():
            continue
        for index, (frame, grey) in enumerate(zip(video, mask, strict=True)):
            write_png(example / "media" / "source" / f"{index:05d}.png", frame)
            write_png(example / "media" / "mask" / f"{index:05d}.png", grey)
        for index in (0, 4):
            write_png(example / "media" / f"edited_{index:05d}.png", video[index])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", RUNS, ids=str)
def test_the_example_runs(examples, tiny_wan, tiny_wan22, tiny_hunyuan, path):
    config_path = examples.parent / path
    values = tomllib.loads(config_path.read_text())
    stages = values.get("stage", [])
    wan = tiny_wan22 if "expert" in values["model"] else tiny_wan
    checkpoint = {"wan": wan, "hunyuan-video": tiny_hunyuan["token_replace"]}[values["model"]["type"]]
    swap = ["blocks_to_swap=2"] * ("blocks_to_swap" in values)  # the tiny model has four blocks
    overrides = [*SMALL, *swap, f"model.ckpt_path={checkpoint}", *(f"stage.{index}.steps=1" for index in range(len(stages)))]
    config = load_config(config_path, overrides)
    launch.train(config)
    out = launch.edit(config, None, None)
    assert (out / "edited.mp4").stat().st_size > 0
    assert (out / "comparison.mp4").stat().st_size > 0


def test_the_plan_of_an_example_on_several_gpus_is_shown_without_a_launcher(examples, tiny_wan, capsys):
    config = examples / "wan" / "edit-two-gpus.toml"
    assert train.main(["--config", str(config), "--dry_run", f"model.ckpt_path={tiny_wan}"]) == 0
    assert "processes 2 pipeline stage(s) x 1 replica(s)" in capsys.readouterr().out


def test_the_reference_of_keys_is_that_of_the_settings():
    from loraedit_ext.reference import markdown

    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == markdown(), "run: python -m loraedit_ext.reference > docs/configuration.md"


def test_every_readme_command_starts_a_file_that_exists():
    import re

    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"(?:python|deepspeed(?: --num_gpus \d+)?) ((?:-m )?[\w/.]+)", text)
    assert {"train.py", "inference.py"} <= set(commands)
    for command in commands:
        if command.startswith("-m "):
            module = Path(command.removeprefix("-m ").replace(".", "/"))
            assert (ROOT / module.with_suffix(".py")).is_file() or (ROOT / module / "__main__.py").is_file() or (
                command.split()[1] in ("torch.distributed.run", "venv")), command
        else:
            assert (ROOT / command).is_file(), command
