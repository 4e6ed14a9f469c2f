"""Bars for people: seen on a terminal, counting what the work counts; lines in a log."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import train
from common import progress
from dataset.video import read_images, read_video
from dataset.video_writer import write_images, write_lossless, write_video
from loraedit_ext.config import EditSettings
from loraedit_ext.editing.compositing import composite
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.layers import calls_shown
from models.shards import Planned, write_shards
from models.wan import encoders
from models.wan.checkpoint import WanCheckpoint
from models.wan.wrapper import WanI2V

FRAMES = np.zeros((5, 16, 16, 3), np.uint8)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch: pytest.MonkeyPatch, patience: float = 0.0) -> Terminal:
    """What a person sees from now on, every state of every bar. No fixture: pytest sets stderr anew after those."""
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    return shown


def last(terminal: Terminal, description: str) -> str:
    """The last state of the bar of that description."""
    states = [state for state in terminal.getvalue().split("\r") if state.startswith(description)]
    assert states, f"no bar `{description}`"
    return states[-1]


def test_a_log_file_gets_nothing_of_quick_work(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress(3, "working") as bar:
        bar.update(3)
    assert list(progress.stepping([1, 2], "stepping")) == [1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_log_file_gets_lines_of_slow_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.2)
    with progress.progress(4, "working", unit="step") as bar:
        for _ in range(4):
            time.sleep(0.15)
            bar.set_postfix_str("loss 0.1", refresh=False)
            bar.update()
    out, lines = capsys.readouterr()
    assert out == ""
    assert "\r" not in lines
    assert [line[:12] for line in lines.splitlines()] == ["working: 2/4", "working: 4/4"]
    assert re.search(r"working: 2/4 \[00:00<00:00, +[\d.]+step/s, loss 0.1\]", lines)


def test_the_training_tells_a_log_file_how_far_it_is(
    edit_folder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_INTERVAL", 0.0)
    assert train.main(["--config", str(edit_folder.config), "stage=[{name='motion', steps=2, mix={motion=1}}]"]) == 0
    assert re.search(r"training: 1/2 \[.*, loss [\d.]+ \| .* s/step \| .* GB\]", capsys.readouterr().err)


def test_quick_work_shows_no_brief_bar_and_slow_work_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch, patience=60)
    list(progress.stepping(range(3), "quick"))
    assert "quick" not in terminal.getvalue()
    terminal = open_terminal(monkeypatch, patience=0.2)
    for _ in progress.stepping(range(3), "slow"):
        time.sleep(0.3)
    assert "slow:  67%" in terminal.getvalue()


def test_media_are_read_written_and_composited_behind_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = open_terminal(monkeypatch)
    write_video(tmp_path / "a.mp4", FRAMES, 8)
    write_lossless(tmp_path / "b.mkv", FRAMES, 8)
    write_images(tmp_path / "c", FRAMES)
    read_video(tmp_path / "a.mp4")
    read_images(tmp_path / "c")
    composite(FRAMES, FRAMES, np.ones(FRAMES.shape[:3], bool), EditSettings())
    for description in ("writing a.mp4", "writing b.mkv", "writing c", "reading a.mp4", "reading c", "compositing"):
        assert "/5" in last(terminal, description), description


def test_weights_are_written_behind_one_bar_of_all_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terminal = open_terminal(monkeypatch)
    tensor = torch.zeros(100, 10)
    planned = [Planned(name, (100, 10), torch.float32, lambda: tensor) for name in "ab"]
    write_shards(tmp_path, "model", planned, shard_bytes=4000)
    assert last(terminal, "writing weights").count("8.00k/8.00k") == 1


def test_calls_of_a_module_are_counted_and_its_output_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    module = nn.Linear(2, 2)
    with calls_shown(module, 3, "calling"):
        outputs = [module(torch.ones(1, 2)) for _ in range(3)]
    assert torch.equal(outputs[0], module(torch.ones(1, 2)))
    assert "3/3" in last(terminal, "calling")
    assert not module._forward_hooks


def test_weights_are_loaded_behind_bars(monkeypatch: pytest.MonkeyPatch, tiny_wan: Path) -> None:
    terminal = open_terminal(monkeypatch)
    checkpoint = WanCheckpoint.open(tiny_wan)
    checkpoint.load_vae("cpu")
    assert re.search(r"[1-9]\d?%.*k/\d+k", last(terminal, "loading Wan2.1_VAE.pth"))  # the last small ones may share a state
    model = WanI2V(checkpoint, torch.device("cpu"))
    layers = model.build_transformer().layers()
    model.load_weights(layers, torch.float32, torch.device("cpu"))
    assert f"{len(layers)}/{len(layers)}" in last(terminal, "loading transformer")


def test_wans_vae_counts_what_the_library_does(monkeypatch: pytest.MonkeyPatch, tiny_wan: Path) -> None:
    terminal = open_terminal(monkeypatch)
    monkeypatch.setattr(encoders, "WHOLE_CLIP", 0)  # as if the clip were long
    vae = WanCheckpoint.open(tiny_wan).load_vae("cpu")
    latents = vae.encode(torch.zeros(1, 3, 9, 32, 32))
    assert "3/3" in last(terminal, "encoding video")
    vae.decode(latents)
    assert "3/3" in last(terminal, "decoding video")


@pytest.mark.parametrize(("size", "count"), [((32, 32), "1/1"), ((264, 200), "4/4")])
def test_hunyuans_vae_counts_what_the_library_does(
    monkeypatch: pytest.MonkeyPatch, tiny_hunyuan: dict[str, Path], size: tuple[int, int], count: str
) -> None:
    terminal = open_terminal(monkeypatch)
    vae = HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]).load_vae("cpu")
    latents = vae.encode(torch.zeros(1, 3, 1, *size))
    assert count in last(terminal, "encoding video")
    vae.decode(latents)
    assert count in last(terminal, "decoding video")
