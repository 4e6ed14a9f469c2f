"""The schedule: shares at every point of a run, and independence of how samples are batched."""

from __future__ import annotations

import pytest
import torch

from dataset.loader import PipelineLoader, SampleSchedule, Share
from dataset.triple import EncodedTriple

GROUPS = {"motion": ["m0", "m1", "m2"], "appearance": ["a0", "a1"]}


def test_the_mix_is_kept_at_every_point_of_the_run():
    schedule = SampleSchedule(GROUPS, {"motion": 1, "appearance": 9}, 200, 1)
    for done in range(10, 200, 7):
        share = schedule.group_of_step[:done].count("motion") / done
        assert abs(share - 0.1) <= 1 / done + 1e-9


def test_every_sample_of_a_group_gets_its_turn():
    schedule = SampleSchedule(GROUPS, {"motion": 1, "appearance": 1}, 24, 2)
    drawn = [draw.name for step in range(24) for draw in schedule.draws(step)]
    assert {name: drawn.count(name) for name in ("m0", "m1", "m2", "a0", "a1")} == {
        "m0": 8, "m1": 8, "m2": 8, "a0": 12, "a1": 12,
    }


def test_samples_of_a_step_come_from_one_group():
    schedule = SampleSchedule(GROUPS, {"motion": 2, "appearance": 1}, 30, 4)
    for step in range(30):
        assert len({draw.name[0] for draw in schedule.draws(step)}) == 1


@pytest.mark.parametrize(
    "shares",
    [
        [Share(1, 4, 0, 1)],
        [Share(2, 2, 0, 1)],
        [Share(1, 2, 0, 2), Share(1, 2, 1, 2)],
        [Share(2, 1, 0, 2), Share(2, 1, 1, 2)],
    ],
)
def test_batching_does_not_change_which_samples_train(shares):
    """Micro-batch size, accumulation and replicas are interchangeable: same draws, same noise numbers."""
    schedule = SampleSchedule(GROUPS, {"motion": 1}, 5, 4)
    for step in range(5):
        draws = schedule.draws(step)
        seen = [draw for share in shares for micro in share.micro_batches(draws) for draw in micro]
        assert sorted(seen, key=lambda d: d.number) == draws


def test_the_loader_hands_out_samples_with_their_numbers():
    samples = {name: EncodedTriple(name, torch.zeros(1), {}) for name in GROUPS["motion"]}
    seen = []

    def collate(batch, numbers):
        seen.append(([sample.name for sample in batch], list(numbers)))
        return (), ()

    loader = PipelineLoader(SampleSchedule(GROUPS, {"motion": 1}, 3, 2), samples, Share(1, 2, 0, 1), collate)
    list(loader.step(2))
    assert seen == [(["m1"], [4]), (["m2"], [5])]
