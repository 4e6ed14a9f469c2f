"""What all models share: where the frozen encoders run."""

from __future__ import annotations

import logging

import pytest
import torch

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
