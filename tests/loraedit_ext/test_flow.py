"""Objective, timestep distributions and samplers, against the original schedulers' trajectories."""

from __future__ import annotations

import pytest
import torch

from loraedit_ext import flow

RUNS = [("unipc", "wan_unipc", steps, shift) for steps in (30, 50) for shift in (3, 5)]
RUNS += [("dpm++", "wan_dpmpp", steps, shift) for steps in (30, 50) for shift in (3, 5)]
RUNS += [("euler", "hunyuan_euler", steps, shift) for steps, shift in ((50, 7), (30, 7), (50, 17))]


@pytest.mark.parametrize(("sampler", "name", "steps", "shift"), RUNS)
def test_samplers_follow_the_original_trajectories(golden, sampler, name, steps, shift):
    g = golden("flow_matching")
    a, b, c = (g.inputs[f"field_{k}"] for k in "Abc")
    run = f"{name}_steps{steps}_shift{shift}"
    sigmas = flow.inference_sigmas(steps, shift, sampler)
    states = [g.inputs["x_init"]]
    flow.sample(
        lambda x, t: x @ a.T + b + t * c, states[0], sigmas, sampler, on_step=lambda _, x: states.append(x)
    )
    torch.testing.assert_close(sigmas, g.outputs[f"{run}.sigmas"], atol=1e-6, rtol=0)
    expected = g.outputs[f"{run}.trajectory"]
    assert (torch.stack(states) - expected).abs().max() <= 1e-5 + 1e-5 * expected.abs().max()


@pytest.mark.parametrize("sampler", ["euler", "unipc", "dpm++"])
def test_the_exact_velocity_leads_to_the_data(sampler):
    """The sampler inverts the objective: with v = eps - x the flow ends on x."""
    x, noise = torch.randn(2, 1, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    sigmas = flow.inference_sigmas(12, 3.0, sampler)
    start = flow.add_noise(x, noise, sigmas[:1])
    end = flow.sample(lambda _x, _t: flow.velocity(x, noise), start, sigmas, sampler)
    torch.testing.assert_close(end, x, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_min_and_max_t_cut_the_shifted_distribution(method, shift):
    sampler = flow.TimestepSampler(method, 1.3, shift, min_t=0.2, max_t=0.7)
    t = sampler.quantile(torch.linspace(1e-6, 1 - 1e-6, 1001))
    assert t.min() == pytest.approx(0.2, abs=1e-3)
    assert t.max() == pytest.approx(0.7, abs=1e-3)
    whole = flow.TimestepSampler(method, 1.3, shift).quantile(torch.rand(200_000, dtype=torch.float64))
    inside = whole[(whole > 0.2) & (whole < 0.7)]
    assert t.median() == pytest.approx(inside.median().item(), abs=5e-3)


def test_logit_normal_equals_a_sigmoid_of_normals():
    u = torch.rand(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    t = flow.TimestepSampler("logit_normal", sigmoid_scale=0.7, shift=3.0).quantile(u)
    z = torch.sigmoid(0.7 * torch.randn(400_000, generator=torch.Generator().manual_seed(2)))
    reference = 3 * z / (1 + 2 * z)
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    torch.testing.assert_close(t.quantile(levels), reference.quantile(levels), atol=5e-3, rtol=0)


def test_stratified_sampling_visits_every_band_once_per_cycle():
    u = torch.stack([flow.uniform_number(7, "motion", k, True) for k in range(3 * flow.STRATA)])
    bands = (u * flow.STRATA).long().view(3, flow.STRATA)
    assert (bands.sort(dim=1).values == torch.arange(flow.STRATA)).all()
    assert not (bands[0] == bands[1]).all()


def test_draws_depend_on_their_key_alone():
    first = torch.rand(3, generator=flow.generator_for(1, "motion", 5))
    torch.rand(100)
    assert torch.equal(first, torch.rand(3, generator=flow.generator_for(1, "motion", 5)))
    assert not torch.equal(first, torch.rand(3, generator=flow.generator_for(1, "motion", 6)))
    assert not torch.equal(first, torch.rand(3, generator=flow.generator_for(2, "motion", 5)))


def test_a_weighted_loss_ignores_the_rest():
    prediction, target = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 16, 3, 4, 4)
    weight = torch.zeros(2, 1, 3, 4, 4)
    weight[:, :, 1:] = 1
    expected = (prediction - target)[:, :, 1:].square().mean()
    torch.testing.assert_close(flow.loss(prediction, target, weight), expected)
    torch.testing.assert_close(flow.loss(prediction, target), (prediction - target).square().mean())
