"""The guard: two quick tasks of the benchmark through the whole pipeline, against recorded bounds.

`guard_bounds.json` beside this file holds `overrides` (as for `evaluate.py --suite scenes --quick`) and `at_least`:
{task: {method: {score: bound}}}. The scores come from fixed seeds, and came out the same to 0.01 dB with AVX2 in place of
AVX-512, so the bounds lie close below what was measured.
alpha is half the rank and the edit takes few steps, so that a lost LoRA scale and a lost shift show.

Broken on purpose, one at a time, all in dB (still / panning task; whole: what it is without the breakage):

| broken | what failed | whole | broken |
|---|---|---|---|
| polarity: `masks.from_grey` takes black for edit | motion, nearer to edit than source | 11.5 / 3.5 | -21.0 / -18.0 |
| packing: `masks.wan_channels` mixes up frames and channels | motion, nearer to edit than source (panning) | 3.5 | 0.0 |
| normalisation: `WanVAE.encode` returns latents as they are | appearance, background | 37.5 / 32.6 | 16.9 / 17.6 |
| scheduler shift: `flow.inference_sigmas` leaves it out | appearance, background (still) | 37.48 | 36.93 |
| LoRA scale: `lora.save` leaves alpha / rank out | appearance, background | 37.5 / 32.6 | 29.2 / 23.8 |
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraedit_ext.evaluation.suite.run import quick_scores

ROOT = Path(__file__).parents[3]
CHECKPOINT = ROOT / "checkpoints" / "tiny-wan-i2v"
BOUNDS = json.loads((Path(__file__).parent / "guard_bounds.json").read_text())
CASES = [
    (task, method, score, bound)
    for task, methods in BOUNDS["at_least"].items() for method, wanted in methods.items()
    for score, bound in wanted.items()
]  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHECKPOINT / "config.json").is_file(), reason="checkpoints/tiny-wan-i2v is not there (pretraining/README.md)"
    ),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    return quick_scores(CHECKPOINT, tmp_path_factory.mktemp("guard"), BOUNDS["overrides"])


def test_bounds_are_recorded() -> None:
    assert CASES, "guard_bounds.json holds no bounds"


@pytest.mark.parametrize(("task", "method", "score", "bound"), CASES)
def test_quality_stays_above_its_bound(
    found: dict[str, dict[str, dict[str, float]]], task: str, method: str, score: str, bound: float
) -> None:
    assert found[task][method][score] >= bound
