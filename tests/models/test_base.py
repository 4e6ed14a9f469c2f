"""What all models share: where the frozen encoders run, and what the VAE computes in."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from loraedit_ext import launch
from loraedit_ext.config import load_config
from models.base import I2VModel
from models.wan.checkpoint import WanCheckpoint
from models.wan.wrapper import WanI2V

GPU = torch.device("meta")
"""Stands for a GPU: nothing that is tested here computes on it."""


@dataclass
class Room:
    """A GPU on which a load or pass runs out of memory beside more encoders than `beside`, and what was tried."""

    model: I2VModel
    beside: int
    tried: list[str] = field(default_factory=list)

    def take(self, what: str, device: torch.device) -> None:
        self.tried.append(f"{what} {device.type}")
        there = self.model._encoders.keys() - {what.split()[0]}
        if device.type != "cpu" and len(there) > self.beside:
            raise torch.OutOfMemoryError("11 GB wanted, 8 GB free")


class Encoder:
    """Stands for an encoder on the device it was loaded to."""

    def __init__(self, name: str, device: torch.device, room: Room) -> None:
        self.name, self.device, self.room = name, device, room

    def run(self) -> str:
        self.room.take(f"{self.name} pass", self.device)
        return f"{self.name} on {self.device.type}"


def on_a_gpu(folder, beside, loading=False):
    """A model whose encoders' passes, or loads, need the room."""

    class Model(WanI2V):
        @property
        def loaders(self):
            return {name: partial(load, name) for name in ("vae", "text", "image")}

    def load(name, device):
        if loading:
            room.take(f"{name} load", device)
        return Encoder(name, device, room)

    model = Model(WanCheckpoint.open(folder), GPU)
    room = Room(model, beside)
    return model, room


NOTHING_FITS = -1


@pytest.mark.parametrize("step", ["load", "pass"])
def test_an_encoder_that_does_not_fit_beside_the_others_gets_the_gpu_alone(tiny_wan, caplog, step):
    model, room = on_a_gpu(tiny_wan, beside=0, loading=step == "load")
    assert model.run_encoder("text", Encoder.run) == "text on meta"
    assert model.run_encoder("vae", Encoder.run) == "vae on meta"
    assert room.tried.count(f"vae {step} meta") == 2
    assert not any("cpu" in attempt for attempt in room.tried)
    assert list(model._encoders) == ["vae"]
    assert not caplog.records


@pytest.mark.parametrize("step", ["load", "pass"])
def test_an_encoder_that_does_not_fit_the_gpu_goes_to_the_cpu_and_stays(tiny_wan, caplog, step):
    model, room = on_a_gpu(tiny_wan, beside=NOTHING_FITS, loading=step == "load")
    assert [model.run_encoder("vae", Encoder.run) for _ in range(2)] == ["vae on cpu"] * 2
    model.free_encoders()
    assert model.run_encoder("vae", Encoder.run) == "vae on cpu"
    homes = [attempt.split()[-1] for attempt in room.tried if step in attempt]
    assert homes[:3] == ["meta", "meta", "cpu"]
    assert homes.count("meta") == 2
    (told,) = caplog.messages
    assert "no room for the vae encoder" in told
    assert 'model.vae_dtype = "bfloat16"' in told


def test_encoders_on_the_cpu_are_not_in_the_way(tiny_wan):
    model, room = on_a_gpu(tiny_wan, beside=NOTHING_FITS)
    model.run_encoder("text", Encoder.run)
    there = model.encoder("text")
    room.beside = 0
    model.run_encoder("image", Encoder.run)
    assert list(model._encoders) == ["text", "image"]
    assert model.encoder("text") is there


def test_freed_encoders_give_their_memory_back(tiny_wan, monkeypatch):
    model, _ = on_a_gpu(tiny_wan, beside=0)
    model.run_encoder("vae", Encoder.run)
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(list(model._encoders)))
    model.free_encoders()
    assert emptied == [[]]


def test_the_dtype_of_the_vae_is_no_advice_for_other_encoders_or_where_it_is_set(tiny_wan, caplog):
    model, _ = on_a_gpu(tiny_wan, beside=NOTHING_FITS)
    model.vae_dtype = torch.bfloat16
    model.run_encoder("vae", Encoder.run), model.run_encoder("text", Encoder.run)
    assert len(caplog.messages) == 2
    assert "vae_dtype" not in caplog.text


def test_what_a_failed_pass_had_allocated_is_gone_when_it_is_tried_again(tiny_wan):
    model, _ = on_a_gpu(tiny_wan, beside=0)
    left = []

    def work(encoder):
        assert [reference for reference in left if reference() is not None] == []
        allocated = torch.empty(8)
        left.append(weakref.ref(allocated))
        if encoder.device.type != "cpu":
            raise torch.OutOfMemoryError("no room")
        return encoder.device.type

    assert model.run_encoder("vae", work) == "cpu"
    assert len(left) == 3


def test_a_cpu_without_room_is_an_error(tiny_wan):
    model = WanI2V(WanCheckpoint.open(tiny_wan), torch.device("cpu"))

    def full(encoder):
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        model.run_encoder("vae", full)


class FullVAE:
    """A VAE on a GPU that has room for its weights only."""

    def encode(self, *_):
        raise torch.OutOfMemoryError("no room")

    decode = encode


@pytest.mark.parametrize("family", ["wan", "token_replace", "latent_concat"])
def test_a_vae_without_room_on_the_gpu_encodes_and_decodes_on_the_cpu(open_model, family):
    exact = open_model(family)

    class OnAGpu(type(exact)):
        @property
        def loaders(self):
            real = super().loaders["vae"]
            return {"vae": lambda device: FullVAE() if device == GPU else real(device)}

    video = torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = exact.encode_video(video)
    assert torch.equal(OnAGpu(exact.checkpoint, GPU).encode_video(video), latents)
    assert torch.equal(OnAGpu(exact.checkpoint, GPU).decode_video(latents), exact.decode_video(latents))


@pytest.mark.parametrize("family", ["wan", "token_replace", "latent_concat"])
def test_a_vae_in_bf16_gives_nearly_the_same_latents_under_another_identity(open_model, family):
    exact = open_model(family)
    rounded = type(exact)(exact.checkpoint, exact.device, vae_dtype=torch.bfloat16)
    video = torch.rand(3, 5, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents, near = exact.encode_video(video), rounded.encode_video(video)
    assert rounded.vae.dtype == torch.bfloat16
    assert near.dtype == latents.dtype == torch.float32
    assert 0 < (near - latents).norm() / latents.norm() < 0.05
    picture, close = exact.decode_video(latents), rounded.decode_video(latents)
    assert close.dtype == torch.float32
    assert 0 < (close - picture).norm() / picture.norm() < 0.05
    assert rounded.encoder_identity() != exact.encoder_identity()


def test_the_configuration_names_the_dtype_of_the_vae(edit_folder):
    for overrides, dtype in (([], torch.float32), (["model.vae_dtype=bfloat16"], torch.bfloat16)):
        model = launch.build_model(load_config(edit_folder.config, overrides), torch.device("cpu"))
        assert model.vae.dtype == dtype
