"""Compositing: preserved pixels to the bit, the seam, and colours that meet the source's at the border."""

from __future__ import annotations

import numpy as np
import pytest

from loraedit_ext.config import EditSettings
from loraedit_ext.editing import compositing

SIZE = 64
BOX = (slice(16, 48), slice(20, 44))


def scene() -> tuple[np.ndarray, np.ndarray]:
    """A textured picture, uint8 (H, W, 3), and the preserved part of it, which holds all but a box."""
    picture = np.random.default_rng(0).integers(60, 200, (SIZE, SIZE, 3)).astype(np.uint8)
    preserve = np.ones((SIZE, SIZE), bool)
    preserve[BOX] = False
    return picture, preserve


def test_the_seam_rises_inside_the_region_only():
    preserve = np.ones((1, 40, 40), bool)
    preserve[0, 10:30, 10:30] = False
    kept, generated = np.full((1, 40, 40, 3), 50, np.uint8), np.full((1, 40, 40, 3), 250, np.uint8)
    out = compositing.composite(kept, generated, preserve, EditSettings(feather=5, color_match=0))[0, 20, :, 0].astype(int)
    assert (out[:10] == 50).all()
    assert (out[30:] == 50).all()
    assert (out[15:25] == 250).all()
    assert (np.diff(out[9:15]) > 0).all()


def test_feather_0_is_a_hard_edge_and_a_wholly_open_frame_has_no_seam():
    preserve = np.ones((2, 8, 8), bool)
    preserve[0, 2:6, 2:6] = False
    preserve[1] = False
    kept, generated = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 9, np.uint8)
    hard = compositing.composite(kept, generated, preserve, EditSettings(feather=0, color_match=0))
    assert set(np.unique(hard[0])) == {0, 9}
    assert (compositing.composite(kept, generated, preserve, EditSettings(feather=4, color_match=8))[1] == 9).all()


@pytest.mark.parametrize("drift", [(9, 9, 9), (-12, 0, 6)])
def test_a_drift_of_all_colours_is_undone_everywhere(drift: tuple[int, ...]) -> None:
    truth, preserve = scene()
    made = (truth + np.array(drift)).astype(np.uint8)
    left = np.abs(compositing.color_matched(truth, made, preserve, reach=8) - truth)[BOX]
    assert left.max() < 0.2 * np.abs(drift).max()


def test_a_drift_at_one_side_is_undone_there_and_fades_inside() -> None:
    truth, preserve = scene()
    made = truth.copy()
    made[:, :32] += 9
    left = (compositing.color_matched(truth, made, preserve, reach=8) - truth)[24:40].mean((0, 2))
    assert abs(left[20]) < 2
    assert left[20] < left[24] < left[30] == pytest.approx(9, abs=3)
    assert np.abs(left[34:44]).max() < 3, "the other side was right"


def test_what_an_object_does_beyond_the_mask_is_no_drift() -> None:
    """It is cut off there; its colour must not bleed into the region, as the mean of the differences would have it."""
    truth, preserve = scene()
    made = truth.copy()
    made[4:60, 30:60] = 255 - truth[4:60, 30:60] // 8  # an object over the right border
    shift = np.abs(compositing.color_matched(truth, made, preserve, reach=8) - made)[BOX]
    off = np.abs(truth.astype(int) - made)[16:48, 44:48].mean()
    assert shift.max() < 0.25 * off


def test_reach_0_a_frame_without_region_and_one_without_background_stay_as_they_are() -> None:
    truth, preserve = scene()
    made = 255 - truth
    for known, reach in ((preserve, 0), (np.ones_like(preserve), 8), (np.zeros_like(preserve), 8)):
        assert (compositing.color_matched(truth, made, known, reach) == made).all()


def test_colours_stay_within_the_8_bits_and_preserved_pixels_are_the_sources() -> None:
    truth, preserve = np.full((1, SIZE, SIZE, 3), 250, np.uint8), scene()[1][None]
    made = np.full_like(truth, 240)
    made[:, 30:34, 30:34] = 255
    out = compositing.composite(truth, made, preserve, EditSettings(feather=0, color_match=64))
    assert (out[preserve] == 250).all()
    assert (out[:, 31, 31] == 255).all(), "and not 265, which a byte would show as 9"


def test_only_the_surroundings_of_the_region_are_looked_at() -> None:
    """Which is what makes it quick on large pictures; what lies further off changes nothing."""
    truth, preserve = scene()
    made = (truth + 7).astype(np.uint8)
    wide = [np.pad(picture, [(40, 40), (40, 40)] + [(0, 0)] * (picture.ndim - 2), mode="edge") for picture in (truth, made)]
    wide[1][:8] = wide[1][-8:] = 0
    inside = compositing.color_matched(*wide, np.pad(preserve, 40, constant_values=True), reach=8)[40:-40, 40:-40]
    assert np.abs(inside - compositing.color_matched(truth, made, preserve, reach=8))[BOX].max() < 0.01


@pytest.mark.parametrize("sigma", [3.0, 8.0])
def test_the_region_gets_the_grain_of_its_surroundings(sigma: float) -> None:
    """On a picture of smooth gradients with edges; the seed and the number of the frame draw it."""
    preserve = np.ones((128, 160), bool)
    preserve[40:100, 50:120] = False
    row = np.linspace(60, 180, 160) + 40 * (np.arange(160) % 40 < 20)
    made = np.repeat(np.tile(row, (128, 1))[..., None], 3, axis=2).astype(np.uint8)
    kept = np.clip(made + np.random.default_rng(1).normal(0, sigma, (128, 160, 1)), 0, 255).round().astype(np.uint8)
    settings = EditSettings(feather=0, color_match=0, grain=1.0)
    clip = compositing.composite(*(np.stack([each] * 2) for each in (kept, made, preserve)), settings)
    first, other = clip
    again = compositing.composite(kept[None], made[None], preserve[None], settings)[0]
    added = (first.astype(int) - made)[~preserve]
    assert added.std() == pytest.approx(sigma, rel=0.15)
    assert (added == added[:, :1]).mean() > 0.99, "brightness, not colour"
    assert (first == again).all()
    assert (first != other)[~preserve].any()
    assert (first[preserve] == kept[preserve]).all()


def test_a_clean_source_a_grainy_result_and_too_little_background_get_no_grain() -> None:
    truth, preserve = scene()
    flat = np.full_like(truth, 100)
    random = np.random.default_rng(0)
    nothing = np.zeros_like(preserve)
    for kept, made, known in ((flat, flat, preserve), (flat, truth, preserve), (truth, flat, nothing)):
        assert (compositing.grained(kept, made.astype(np.float32), known, 1.0, random) == made).all()
