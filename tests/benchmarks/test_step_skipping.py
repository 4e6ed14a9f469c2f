"""The comparison of ways to save passes: each does what its row says."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import step_skipping
from benchmarks.step_skipping import ALL, WAYS, EasyCache, Repeating, Way
from loraedit_ext import flow
from loraedit_ext.editing import skipping

SIGMAS = flow.inference_sigmas(step_skipping.STEPS, 5.0, "euler")
SHAPE = (1, 4, 2, 4, 4)


def asked(way: Way) -> list[int]:
    """The steps of a sampling that ask the model, for a velocity that changes as the state does."""
    calls: list[int] = []
    step = 0

    def predict(x: Tensor, t: Tensor) -> Tensor:
        calls.append(step)
        return 2 + t * x

    velocity = way.wrap(predict, SIGMAS[:-1].tolist())
    for step, sigma in enumerate(SIGMAS[:-1]):  # noqa: B007 (predict reads it)
        velocity(torch.full(SHAPE, float(sigma)), sigma)
    return calls


def test_every_way_computes_the_steps_that_it_claims() -> None:
    assert asked(ALL) == list(range(30))
    by_name = {way.name: way for way in WAYS}
    plan = [n for n, wanted in enumerate(skipping.computed(SIGMAS[:-1].tolist(), 3)) if wanted]
    assert asked(by_name["`edit.compute_every=3`"]) == asked(by_name["the same steps, velocity repeated (3)"]) == plan
    assert len(asked(by_name["EasyCache, threshold 0.4"])) < len(asked(by_name["EasyCache, threshold 0.05"])) < 30


def test_easycache_repeats_what_a_step_changes_and_computes_first_and_last() -> None:
    velocity = EasyCache(lambda x, _t: x + 3, 10, threshold=100.0)
    seen = [velocity(torch.full(SHAPE, float(n)), torch.tensor(0.5)) for n in range(1, 11)]
    assert all((v == n + 3).all() for n, v in enumerate(seen, 1)), "v - x is constant here, so repeating it is exact"
    calls: list[int] = []
    velocity = EasyCache(lambda x, _t: calls.append(1) or x + 3, 10, threshold=100.0)
    for n in range(1, 11):
        velocity(torch.full(SHAPE, float(n)), torch.tensor(0.5))
    assert len(calls) == 3, "a fifth of ten, and the last"


def test_a_repeated_velocity_is_the_last_computed_one() -> None:
    velocity = Repeating(lambda _x, t: t, (True, False, True, False))
    assert [velocity(torch.zeros(()), torch.tensor(t)).item() for t in (4.0, 3.0, 2.0, 1.0)] == [4.0, 4.0, 2.0, 2.0]


def test_the_table_has_means_over_tasks() -> None:
    found = {
        ALL: {"a": (30, float("inf"), 20.0), "b": (30, float("inf"), 22.0)},
        WAYS[1]: {"a": (17, 50.0, 20.0), "b": (17, 60.0, 21.0)},
    }
    lines = step_skipping.table(found).splitlines()
    assert lines[2] == "| all steps | 30.0 | – | 21.00 |"
    assert lines[3] == "| `edit.compute_every=2` | 17.0 | 55.0 | 20.50 |"


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_names_say_what_is_set(way: Way) -> None:
    assert way.steps == (int(way.name.strip("`").split("=")[1]) if "edit.steps" in way.name else step_skipping.STEPS)
