"""The transformer of an edit, or Wan2.2's two by turns: on the device to sample, in host memory until the next piece."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loraedit_ext import flow, lora
from loraedit_ext.config import RunConfig
from loraedit_ext.doctor import ram
from loraedit_ext.editing.sampling import Forward
from loraedit_ext.pipeline import World, autocast
from models.base import TIMESTEPS, I2VModel, release_memory
from models.layers import PipelineLayer, speed_up
from models.parking import park, sizes, unpark

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expert:
    """A transformer with its LoRAs, each with its strength: the only one of a model, or one of Wan2.2's two."""

    model: I2VModel
    stack: Sequence[tuple[lora.LoraFile, float]]


class Transformers:
    """At most one of them is on the device; one that samples again waits in host memory if there is room, or is loaded again.

    Args:
        config: model and [edit] settings.
        experts: the only one, or that for high noise and that for low.
        world: where they run.
    """

    def __init__(self, config: RunConfig, experts: Sequence[Expert], world: World) -> None:
        self.config, self.experts, self.world = config, experts, world
        self._made: dict[int, list[PipelineLayer]] = {}
        """By number of the expert."""
        self._here: int | None = None
        """The one on the device."""
        self._again = False

    def begin(self, again: bool = False) -> Forward:
        """Put the transformer on the device that a sampling asks first.

        Args:
            again: there will be another sampling.
        """
        settings = self.config.edit
        self._layers_at(flow.inference_sigmas(settings.steps, settings.shift, settings.sampler)[0] * TIMESTEPS)
        self._again = again  # from here on: what may still be on the device from before has its turn in this sampling
        return self._forward

    def end(self) -> None:
        """Leave the device to the encoders; processes that have none at work keep what they sample with."""
        if self.world.is_main or not self._again:
            self._leave()

    def free(self) -> None:
        """Forget all of them."""
        self._made.clear()
        self._here = None
        release_memory()

    def _forward(self, inputs: tuple[Tensor, ...], _number: int) -> Tensor:
        stream: Any = inputs
        layers = self._layers_at(inputs[1][0])
        with autocast(self.world.device, getattr(torch, self.config.model.dtype)):
            for layer in layers:
                stream = layer(stream)
        return stream

    def _layers_at(self, timestep: Tensor) -> list[PipelineLayer]:
        """The whole transformer for a noise level, on the device once the other one has left it."""
        high = len(self.experts) == 1 or timestep.item() >= (self.config.edit.boundary or 0.0) * TIMESTEPS
        if (number := 0 if high else 1) != self._here:
            self._leave()
            if number in self._made:
                unpark(self._made[number], self.world.device)
            else:
                self._made[number] = self._load(self.experts[number])
            self._here = number
        return self._made[number]

    def _leave(self) -> None:
        if self._here is None:
            return
        if self._again and self._may_wait(self._made[self._here]):
            park(self._made[self._here])
        else:
            del self._made[self._here]
        self._here = None
        release_memory()

    def _may_wait(self, layers: list[PipelineLayer]) -> bool:
        """Whether host memory has room for it beside the encoders, and beside what another that must be loaded takes there."""
        moving, there = sizes(layers)
        needed = moving + there * (len(self._made) < len(self.experts)) + self.experts[0].model.encoding_room
        available = (ram()[0] or 0) / self.world.local_size
        if available < needed:
            _log.info("To keep the transformer for the next piece %.1f GB of host memory are needed, %.1f are available: it is "
                      "loaded again.", needed / 1e9, available / 1e9)  # fmt: skip
        return available >= needed

    def _load(self, expert: Expert) -> list[PipelineLayer]:
        config, device = self.config, self.world.device
        transformer = expert.model.build_transformer()
        layers = transformer.layers()
        dtype, linears = config.model.storage
        expert.model.load_weights(layers, dtype, device, linears, config.blocks_to_swap)
        if expert.stack:
            lora.attach(transformer, layers, lora.combine(expert.stack), device)
        speed_up(layers, device, config.model.int8_matmul, config.compile)
        transformer.eval()
        return layers
