"""DESIGN's list of what must never happen, where no other test says so; and that docs/never.md names real tests."""

from __future__ import annotations

import ast
import re
import socket
from pathlib import Path

import pytest
import torch

from dataset.images import read_image
from loraedit_ext import launch
from loraedit_ext.config import load_config
from loraedit_ext.training import state

ROOT = Path(__file__).parents[1]


def test_every_promise_names_a_test_that_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "never.md").read_text())
    assert len(named) >= 12
    for file, name in named:
        functions = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
        assert name in functions, f"{file}::{name}"


def test_every_pixel_and_mask_reaches_the_encoders_unchanged(edit_folder, monkeypatch):
    """From the PNGs on disk to what the VAE is given: exact, in value and in place."""
    from loraedit_ext.wan import MaskedWan

    given = []
    real = MaskedWan.encode_video
    monkeypatch.setattr(MaskedWan, "encode_video", lambda self, video: given.append(video) or real(self, video))
    launch.train(load_config(edit_folder.config, ["stage=[{name='motion', steps=1, mix={motion=1}}]"]))
    sources = [read_image(p) for p in sorted((edit_folder.path / "source").glob("*.png"))]
    grey = [read_image(p)[..., 0] for p in sorted((edit_folder.path / "mask").glob("*.png"))]
    target = next(v for v in given if not (v == 0).any(dim=0)[1:].any())
    condition = next(v for v in given if v is not target)
    for index, (source, mask) in enumerate(zip(sources, grey, strict=True)):
        exact = torch.from_numpy(source.copy()).permute(2, 0, 1).float() / 127.5 - 1
        keep = torch.from_numpy(mask.copy()) < 128 if index else torch.ones(64, 64, dtype=torch.bool)
        assert torch.equal(target[:, index], exact)
        assert torch.equal(condition[:, index], exact * keep)


def test_a_crash_while_saving_leaves_the_state_before(edit_folder, monkeypatch):
    """Killed between the layers' files: the new folder never gets its name, `latest` points to the old one."""
    stage = "stage=[{name='motion', steps=%d, mix={motion=1}}]"
    launch.train(load_config(edit_folder.config, [stage % 2]))
    (run,) = edit_folder.runs()
    real, calls = state._save_layer, []

    def dies(path, *rest):
        calls.append(path)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(path, *rest)

    monkeypatch.setattr(state, "_save_layer", dies)
    with pytest.raises(KeyboardInterrupt):
        launch.train(load_config(edit_folder.config, [stage % 4, "resume_from_checkpoint=true"]))
    assert not (run / "global_step4").exists()
    assert state.find(run).name == "global_step2"
    monkeypatch.undo()
    launch.train(load_config(edit_folder.config, [stage % 4, "resume_from_checkpoint=true"]))
    assert (run / "latest").read_text() == "global_step4\n"
    assert not list(run.glob(".*.partial"))


def test_a_run_opens_no_connection_beyond_this_machine(edit_folder, monkeypatch):
    real = socket.socket.connect

    def connect(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        assert host in ("", "127.0.0.1", "::1", "localhost"), f"connection to {address}"
        return real(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    launch.train(load_config(edit_folder.config))
    launch.edit(load_config(edit_folder.config), None, None)
