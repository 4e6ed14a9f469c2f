"""Restart sampling: the way of the noise level, and samples that keep their distribution."""

from __future__ import annotations

import pytest
import torch

from loraedit_ext import flow
from pretraining import restart


def test_the_way_goes_down_but_for_its_restarts() -> None:
    way = restart.levels([1.0, 0.75, 0.5, 0.25, 0.0], [(0.6, 0.9, 2), (0.1, 0.3, 1)])
    again = [0.9, 0.75, 0.6]
    assert way == [1.0, 0.75, 0.6, *again, *again, 0.5, 0.25, 0.1, 0.3, 0.25, 0.1, 0.0]


def test_without_restarts_it_is_eulers_method() -> None:
    sigmas = flow.inference_sigmas(7, 3.0, "euler")
    noise = torch.randn(2, 3)

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x.sin() + t

    found = restart.sample(predict, noise, restart.levels(sigmas.tolist(), []), torch.Generator())
    torch.testing.assert_close(found, flow.sample(predict, noise, sigmas, "euler"))


@pytest.mark.parametrize("deviation", [0.3, 2.0])
def test_samples_of_a_known_distribution_keep_it(deviation: float) -> None:
    """Normal data has an exact velocity; a wrong amount of noise or of the old state would change the spread."""
    way = restart.levels(flow.inference_sigmas(200, 1.0, "euler").tolist(), [(0.85, 0.97, 4), (0.2, 0.8, 5)])

    def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        data, noise = ((1 - t) * deviation) ** 2, t**2
        return x * (noise / t - data / (1 - t).clamp(min=1e-6)) / (data + noise)

    random = torch.Generator().manual_seed(0)
    found = restart.sample(predict, torch.randn(40_000, generator=random), way, random)
    assert found.mean().item() == pytest.approx(0, abs=0.03 * deviation)
    assert found.std().item() == pytest.approx(deviation, rel=0.03)
