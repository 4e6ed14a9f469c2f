"""What all models share: where the frozen encoders run, and what the VAE computes in."""

from __future__ import annotations

import logging

import pytest
import torch

from loraedit_ext import launch
from loraedit_ext.config import load_config
from models.wan.checkpoint import WanCheckpoint
from models.wan.wrapper import WanI2V

SMALL_GPU = torch.device("meta")
"""Stands for a device whose memory is too small: nothing that follows computes on it."""


class FullOf11GB:
    """A loader for which no device but the CPU has room."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, device: torch.device) -> str:
        self.asked.append(device.type)
        if device.type != "cpu":
            raise torch.OutOfMemoryError("11 GB wanted, 8 GB free")
        return "encoder"


def test_an_encoder_that_does_not_fit_the_gpu_goes_to_the_cpu(tiny_wan, caplog):
    load = FullOf11GB()
    model = WanI2V(WanCheckpoint.open(tiny_wan), SMALL_GPU)
    with caplog.at_level(logging.WARNING):
        assert model.encoder("text", load) == model.encoder("text", load) == "encoder"
    assert load.asked == ["meta", "cpu"]  # once: the second call found it loaded
    assert "text encoder does not fit" in caplog.text


def test_a_cpu_without_room_is_an_error(tiny_wan):
    model = WanI2V(WanCheckpoint.open(tiny_wan), torch.device("cpu"))

    def load(device: torch.device) -> None:
        raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError):
        model.encoder("text", load)


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
