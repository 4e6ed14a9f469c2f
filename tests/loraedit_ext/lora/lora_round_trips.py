"""What every family's LoRA files must survive."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from loraedit_ext.lora import convert


def assert_exact(path: Path, folder: Path) -> None:
    """A file in ComfyUI's names comes back bit for bit after conversions to every other tool's names."""
    start = load_file(path)
    for number, to in enumerate(["diffusers", "kohya", "diffusers", "comfyui"]):
        path, previous = folder / f"{number}.safetensors", path
        assert convert.main([str(previous), str(path), "--to", to]) == 0
    end = load_file(path)
    assert start.keys() == end.keys()
    assert all(start[name].dtype == end[name].dtype and torch.equal(start[name], end[name]) for name in start)
