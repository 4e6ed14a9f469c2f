"""Shared fixtures: golden vectors, one thread, no network."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import hypothesis
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

# The same examples in every run: a find is a change of the code, not of luck.
hypothesis.settings.register_profile("project", derandomize=True, deadline=None)
hypothesis.settings.load_profile("project")

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """One golden file: what the original code computed, see tests/golden/README.md."""

    info: dict
    tensors: dict[str, torch.Tensor]

    def part(self, name: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in self.tensors.items() if k.startswith(f"{name}.")}

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.part("weights")

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        return self.part("input")

    @property
    def outputs(self) -> dict[str, torch.Tensor]:
        return self.part("output")


@pytest.fixture(scope="session")
def golden():
    def load(name: str) -> Golden:
        info = json.loads((GOLDEN / f"{name}.json").read_text())
        return Golden(info, load_file(GOLDEN / f"{name}.safetensors"))

    return load


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)


@dataclass(frozen=True)
class EditFolder:
    """A folder with media, job.toml and edit.toml of a small synthetic edit."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "edit.toml"

    @property
    def job(self) -> Path:
        return self.path / "job.toml"

    def runs(self) -> list[Path]:
        return sorted((self.path / "runs").glob("*"))

    def metrics(self, run: int = -1) -> list[dict]:
        lines = (self.runs()[run] / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def losses(self, run: int = -1) -> list[float]:
        return [row["train/loss"] for row in self.metrics(run) if "train/loss" in row]


def square_clip(frames: int = 9, size: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A red square moving right over a gradient, and its white mask with 4 pixels of margin."""
    ramp = np.linspace(40, 200, size, dtype=np.uint8)
    video = np.stack([np.stack([np.tile(ramp, (size, 1)), np.tile(ramp[:, None], (1, size)),
                                np.full((size, size), 90, np.uint8)], -1)] * frames)
    mask = np.zeros((frames, size, size), np.uint8)
    for index in range(frames):
        left = 8 + 3 * index
        video[index, 24:40, left:left + 16] = (220, 30, 30)
        mask[index, 20:44, left - 4:left + 20] = 255
    return video, mask


def strips(run: Path) -> dict[int, np.ndarray]:
    """Each preview's frames as tensorboard has them, before video coding: uint8 (H, 8W, 3) by step."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"images": 0})
    events.Reload()
    return {
        image.step: np.asarray(Image.open(io.BytesIO(image.encoded_image_string))) for image in events.Images("preview")
    }


JOB = """
name = "square"
source = "source"
mask = "mask"
caption = "a red square"
edited_caption = "a blue square"
[[edited_frame]]
image = "edited_0.png"
frame = 0
[[edited_frame]]
image = "edited_6.png"
frame = 6
"""

CONFIG = """
output_dir = "runs"
dataset = "job.toml"
[model]
type = "{family}"
ckpt_path = "{checkpoint}"
dtype = "float32"
[adapter]
rank = 4
[optimizer]
type = "adamw"
lr = 1e-3
[[stage]]
name = "motion"
steps = 3
mix = {{ motion = 1 }}
[[stage]]
name = "appearance"
steps = 3
mix = {{ motion = 1, appearance = 2 }}
[edit]
steps = 2
"""


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory) -> Path:
    """A random checkpoint in the original Wan2.1-I2V layout."""
    from models.wan.random_weights import write_random_checkpoint

    folder = tmp_path_factory.mktemp("wan") / "checkpoint"
    write_random_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_wan22(tmp_path_factory) -> Path:
    """A random checkpoint with two experts in the original Wan2.2-I2V layout."""
    from models.wan.random_weights import tiny_config, write_random_checkpoint

    folder = tmp_path_factory.mktemp("wan22") / "checkpoint"
    write_random_checkpoint(folder, tiny_config("wan2.2"))
    return folder


def write_hunyuan(folder: Path, variant: str) -> Path:
    from models.hunyuan.random_weights import tiny_config, write_random_checkpoint

    write_random_checkpoint(folder, tiny_config(variant))
    return folder


@pytest.fixture(scope="session")
def seven_blocks(tmp_path_factory) -> Path:
    """A random Wan checkpoint of seven blocks."""
    from models.wan.random_weights import tiny_config, write_random_checkpoint

    folder = tmp_path_factory.mktemp("wan") / "seven"
    write_random_checkpoint(folder, replace(tiny_config(), num_layers=7))
    return folder


@pytest.fixture(scope="session")
def tiny_hunyuan(tmp_path_factory) -> dict[str, Path]:
    """Random checkpoints of both variants in the original HunyuanVideo-I2V layout."""
    folder = tmp_path_factory.mktemp("hunyuan")
    return {variant: write_hunyuan(folder / variant, variant) for variant in ("token_replace", "latent_concat")}


@pytest.fixture
def open_model(tiny_wan, tiny_hunyuan):
    """Opens the tiny checkpoint of `wan` or of a variant of HunyuanVideo."""
    from models.hunyuan.checkpoint import HunyuanCheckpoint
    from models.hunyuan.wrapper import HunyuanI2V
    from models.wan.checkpoint import WanCheckpoint
    from models.wan.wrapper import WanI2V

    def open_(family):
        if family == "wan":
            return WanI2V(WanCheckpoint.open(tiny_wan), torch.device("cpu"))
        return HunyuanI2V(HunyuanCheckpoint.open(tiny_hunyuan[family]), torch.device("cpu"))

    return open_


class NoRoomToDecode:
    """A VAE on a GPU that runs out of memory when it decodes."""

    def __init__(self, vae) -> None:
        self.encode = vae.encode

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no room")


@pytest.fixture
def no_room_to_decode(monkeypatch):
    """Models have their VAE on a GPU that runs out of memory when it decodes; all else of them is on the CPU."""
    from models.base import I2VModel

    real = I2VModel.encoder

    def home(self, name):
        return torch.device("cpu" if name in self._on_cpu or name != "vae" else "cuda")

    def encoder(self, name):
        with monkeypatch.context() as patch:
            patch.setattr(I2VModel, "_home", lambda self, name: torch.device("cpu"))
            found = real(self, name)
        return NoRoomToDecode(found) if home(self, name).type == "cuda" else found

    monkeypatch.setattr(I2VModel, "_home", home)
    monkeypatch.setattr(I2VModel, "encoder", encoder)


def write_edit_folder(folder: Path, family: str, checkpoint: Path) -> EditFolder:
    """A complete edit of the moving square: red becomes blue."""
    from dataset.images import write_png

    video, mask = square_clip()
    for index, (frame, grey) in enumerate(zip(video, mask, strict=True)):
        write_png(folder / "source" / f"{index:03d}.png", frame)
        write_png(folder / "mask" / f"{index:03d}.png", grey)
    for index in (0, 6):
        edited = video[index].copy()
        edited[(edited == (220, 30, 30)).all(-1)] = (30, 30, 220)
        write_png(folder / f"edited_{index}.png", edited)
    (folder / "job.toml").write_text(JOB)
    (folder / "edit.toml").write_text(CONFIG.format(family=family, checkpoint=checkpoint))
    return EditFolder(folder)


@pytest.fixture
def edit_folder(tmp_path, tiny_wan) -> EditFolder:
    """A complete edit with Wan."""
    return write_edit_folder(tmp_path, "wan", tiny_wan)


@pytest.fixture(params=["token_replace", "latent_concat"])
def hunyuan_folder(request, tmp_path, tiny_hunyuan) -> EditFolder:
    """The same edit with each variant of HunyuanVideo."""
    return write_edit_folder(tmp_path, "hunyuan-video", tiny_hunyuan[request.param])
