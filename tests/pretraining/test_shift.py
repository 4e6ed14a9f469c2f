"""Latents moved by a part of a latent: where they lie, and what the VAE's training makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretraining import clips, shift, vae


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, 0), (4, 4), (3, 7)])
def test_moved_latents_are_those_of_the_same_part_of_the_picture(down: int, right: int) -> None:
    """Exact for block averages of what is linear in space, whatever the place of a pixel in its block."""
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
    video = torch.stack([y, x, 2 * y - 3 * x + 5])[:, None]
    average = torch.nn.AvgPool2d(shift.STRIDE)
    found = shift.moved(average(video), down, right)
    assert found.shape == (3, 1, 3, 5)
    assert torch.allclose(found, average(shift.same_part(video, down, right)), atol=1e-4)


def test_the_interpolation_is_exact_where_nothing_moves() -> None:
    latents = torch.randn(2, 16, 3, 9, 9)
    assert torch.equal(shift.moved(latents, 0, 0), latents[..., 1:-2, 1:-2])


def test_steps_on_moved_and_unmoved_latents_take_turns(tmp_path: Path) -> None:
    made = vae.Options(out=tmp_path, steps=100, shifted=0.6)
    training = vae.VAETraining(made)
    shifts = []
    for training.step in range(200):
        shifts.append(training._shift())
    assert 60 < sum(by != (0, 0) for by in shifts) < 160
    assert {down for down, _ in shifts} == {right for _, right in shifts} == set(range(8))
    assert torch.equal(training._batch(), training._batch())
    training.step = next(step for step, by in enumerate(shifts) if by != (0, 0))
    loss, metrics = training.loss()
    assert loss.isfinite()
    assert metrics.keys() == {"loss", "kl", "shifted"}


def test_crops_lie_around_objects_and_some_are_greyed() -> None:
    batch = clips.object_batch(0, 0, 24, 72)
    assert batch.shape == (24, 3, 13, 72, 72)
    grey = batch.eq(0).all(1).flatten(1).float().mean(1)
    conditions = batch[:, :, 1:].eq(0).flatten(1).all(1)
    assert 0 < conditions.sum() < 12
    assert ((grey > 0.01) & ~conditions).any()
    assert (grey == 0).sum() > 8
