"""The training objective: from encoded triples to the pipeline's inputs and labels, and the loss between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dataset.loader import Batch
from dataset.triple import EncodedTriple
from loraedit_ext import flow
from models.base import I2VModel


class Objective:
    """Flow matching on triples (paper section 3.3, equation 2).

    Noise and t of a sample depend on (seed, stage name, sample number) alone.
    """

    def __init__(
        self, model: I2VModel, sampler: flow.TimestepSampler, seed: int, stratified: bool, guidance: float = 1.0
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.seed = seed
        self.stratified = stratified
        self.guidance = guidance

    def batch(self, stage: str, samples: Sequence[EncodedTriple], numbers: Sequence[int]) -> Batch:
        """One training micro-batch with noise levels from the sampler."""
        u = torch.stack([flow.uniform_number(self.seed, stage, n, self.stratified) for n in numbers])
        return self._build(samples, self.sampler.quantile(u), [(self.seed, stage, "noise", n) for n in numbers])

    def at_quantile(self, samples: Sequence[EncodedTriple], quantile: float) -> Batch:
        """One evaluation micro-batch at a fixed quantile of the noise levels, with fixed noise."""
        u = torch.full((len(samples),), quantile)
        return self._build(samples, self.sampler.quantile(u), [("eval", s.name) for s in samples])

    def _build(self, samples: Sequence[EncodedTriple], t: Tensor, keys: Sequence[tuple[int | str, ...]]) -> Batch:
        x = torch.stack([sample.target for sample in samples])
        noise = torch.stack([torch.randn(x.shape[1:], generator=flow.generator_for(*key)) for key in keys])
        condition = {
            name: torch.stack([sample.condition[name] for sample in samples]) for name in samples[0].condition
        }
        inputs = self.model.model_inputs(flow.add_noise(x, noise, t), t, condition, self.guidance)
        weight = self.model.loss_weight(condition)
        labels = (flow.velocity(x, noise),) if weight is None else (flow.velocity(x, noise), weight)
        return inputs, labels

    @staticmethod
    def loss(prediction: Tensor, labels: tuple[Tensor, ...]) -> Tensor:
        """Loss of the last pipeline layer's output."""
        return flow.loss(prediction, *labels)
