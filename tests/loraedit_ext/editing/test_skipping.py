"""Sampling steps that follow from others: which are computed, and how near the result stays to that of all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.step_skipping import Repeating
from loraedit_ext import flow
from loraedit_ext.editing import skipping

SAMPLERS = ("euler", "unipc", "dpm++")


def sigmas_of(steps: int, sampler: flow.SamplerName = "euler") -> Tensor:
    return flow.inference_sigmas(steps, 5.0, sampler)


def plan_of(steps: int, every: int, boundary: float | None = None) -> tuple[bool, ...]:
    return skipping.computed(sigmas_of(steps)[:-1].tolist(), every, boundary)


@pytest.mark.parametrize(("steps", "every", "expected"), [
    (12, 1, "XXXXXXXXXXXX"), (12, 2, "XXX.X.X.X.XX"), (12, 3, "XXX..X..X.XX"), (12, 99, "XXX.......XX"),
    (50, 3, "XXXXX" + "..X" * 14 + ".XX"), (4, 3, "XXXX"), (1, 2, "X"),
])  # fmt: skip
def test_the_first_and_last_steps_are_computed_and_one_in_so_many_between(steps: int, every: int, expected: str) -> None:
    assert "".join(".X"[each] for each in plan_of(steps, every)) == expected


def test_the_second_expert_begins_with_velocities_of_its_own() -> None:
    sigmas = sigmas_of(40)[:-1].tolist()
    plan = plan_of(40, 4, boundary=0.9)
    begin = next(n for n, sigma in enumerate(sigmas) if sigma < 0.9)
    assert plan[begin : begin + 3] == (True, True, False)
    assert plan[begin - 1] is False, "the case is one in which the next would have been skipped"
    assert plan_of(40, 4, boundary=0.0) == plan_of(40, 4, boundary=1.1) == plan_of(40, 4), "never and always the other one"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_velocity_that_is_linear_in_t_loses_nothing(sampler: flow.SamplerName, every: int) -> None:
    """And the steps that are not computed do not ask the model."""
    torch.manual_seed(0)
    noise, constant, slope = torch.randn(3, 1, 4, 2, 4, 4)
    asked: list[float] = []

    def predict(_x: Tensor, t: Tensor) -> Tensor:
        asked.append(t.item())
        return constant + slope * t

    sigmas = sigmas_of(20, sampler)
    whole = flow.sample(predict, noise, sigmas, sampler)
    asked.clear()
    plan = skipping.computed(sigmas[:-1].tolist(), every)
    quick = flow.sample(skipping.Skipping(predict, plan), noise, sigmas, sampler)
    torch.testing.assert_close(quick, whole, rtol=0, atol=1e-5)
    assert asked == [sigma for sigma, wanted in zip(sigmas[:-1].tolist(), plan, strict=True) if wanted]


def test_a_line_is_nearer_than_repeating_and_than_fewer_steps() -> None:
    """On a flow whose exact velocity is known: data of one Gaussian for each value."""
    torch.manual_seed(0)
    noise, mean, spread = torch.randn(1, 512), torch.randn(1, 512), torch.rand(1, 512) + 0.1

    def predict(x: Tensor, t: Tensor) -> Tensor:
        variance = (1 - t) ** 2 * spread**2 + t**2
        return (t - (1 - t) * spread**2) / variance * (x - (1 - t) * mean) - mean

    def result(steps: int, every: int, repeat: bool = False) -> Tensor:
        plan = plan_of(steps, every)
        skipped = Repeating(predict, plan) if repeat else skipping.Skipping(predict, plan)
        return flow.sample(skipped, noise, sigmas_of(steps), "euler")

    whole = result(30, 1)
    line, repeated, fewer = ((each - whole).abs().mean() for each in (result(30, 3), result(30, 3, True), result(13, 1)))
    assert sum(plan_of(30, 3)) == 13
    assert line < 0.5 * repeated
    assert line < 0.2 * fewer


def test_nothing_is_drawn_through_the_change_of_experts() -> None:
    def predict(_x: Tensor, t: Tensor) -> Tensor:
        return 7 * t if t >= 0.9 else 100 - t

    plan = plan_of(40, 4, boundary=0.9)
    quick = skipping.Skipping(predict, plan)
    for sigma in sigmas_of(40)[:-1]:
        assert quick(torch.zeros(()), sigma).item() == pytest.approx(predict(torch.zeros(()), sigma).item(), rel=1e-4)
