"""Pixel and motion metrics: against scikit-image, against arithmetic, and by what each must punish."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from loraedit_ext.evaluation import metrics, motion

STEP = 2
"""Pixels a frame that the moving clip goes to the right."""


def photo() -> np.ndarray:
    return cv2.resize(data.astronaut(), (256, 256), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """A window of 128x96 that slides over a photo, so that the picture moves left by STEP pixels a frame."""
    return np.stack([photo()[80:176, 60 + STEP * t : 188 + STEP * t] for t in range(6)])


@pytest.fixture(scope="module")
def preserve(clip) -> np.ndarray:
    """The edit is a box in the middle, in all frames."""
    mask = np.ones(clip.shape[:3], bool)
    mask[:, 30:66, 40:90] = False
    return mask


def noisy(clip: np.ndarray, sigma: float = 6.0, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, sigma, clip.shape)
    return np.clip(np.rint(clip + noise), 0, 255).astype(np.uint8)


def test_psnr_is_scikit_images(clip):
    other = noisy(clip)
    assert metrics.quality(other, clip).psnr == pytest.approx(peak_signal_noise_ratio(clip, other), abs=1e-9)


def test_a_known_error_has_its_known_psnr():
    target = np.full((2, 40, 40, 3), 100, np.uint8)
    found = metrics.quality(target + 5, target)
    assert found.psnr == pytest.approx(20 * math.log10(255 / 5))
    assert found.max_error == 5
    assert found.pixels == 2 * 40 * 40
    assert found.frame_psnr == pytest.approx([20 * math.log10(255 / 5)] * 2)


def test_ssim_is_scikit_images_with_wangs_settings(clip):
    other = noisy(clip)
    settings = {
        "channel_axis": -1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False,
        "data_range": 255,
    }  # fmt: skip
    theirs = [structural_similarity(a, b, full=True, **settings) for a, b in zip(clip, other, strict=True)]
    assert metrics.quality(other, clip).ssim == pytest.approx(np.mean([mean for mean, _ in theirs]), abs=2e-5)
    ours = metrics.ssim_map(clip[0], other[0], np.ones(clip.shape[1:3], bool))
    inner = slice(metrics.RADIUS, -metrics.RADIUS)
    np.testing.assert_allclose(ours[inner, inner], theirs[0][1][inner, inner], atol=2e-4)


def test_identity_is_perfect(clip, preserve):
    found = metrics.quality(clip, clip, preserve)
    assert (found.psnr, found.max_error) == (math.inf, 0)
    assert found.ssim == pytest.approx(1, abs=1e-6)
    seam = metrics.seam(clip, clip, preserve)
    assert (seam.leak, seam.excess) == (0, 0)


def test_a_region_sees_nothing_of_the_other(clip, preserve):
    edit = clip.copy()
    edit[~preserve] = 255 - edit[~preserve]
    background = metrics.preserved_quality(edit, clip, preserve)
    assert background.psnr == math.inf
    assert background.ssim == pytest.approx(1, abs=1e-5)
    assert metrics.edited_quality(edit, clip, preserve).psnr < 15
    assert metrics.edited_quality(edit, clip, preserve).ssim < 0.5


def test_more_noise_is_worse(clip, preserve):
    weak, strong = (metrics.preserved_quality(noisy(clip, sigma), clip, preserve) for sigma in (3, 12))
    assert weak.psnr > strong.psnr + 9
    assert weak.ssim > strong.ssim + 0.1
    assert weak.max_error < strong.max_error


def test_blur_costs_structure_more_than_a_brightness_shift_of_the_same_psnr(clip):
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 2) for frame in clip])
    shift = round(math.sqrt(np.mean((blurred.astype(float) - clip) ** 2)))
    brighter = np.clip(clip.astype(int) + shift, 0, 255).astype(np.uint8)
    assert metrics.quality(brighter, clip).ssim > metrics.quality(blurred, clip).ssim + 0.1


def test_empty_regions_have_no_number(clip):
    nothing = np.zeros(clip.shape[:3], bool)
    found = metrics.quality(clip, clip, nothing)
    assert all(math.isnan(x) for x in (found.psnr, found.ssim, found.max_error, *found.frame_psnr))
    assert math.isnan(metrics.seam(clip, clip, ~nothing).jump)
    assert math.isnan(motion.warping(clip, motion.flow(clip), nothing).error)


def test_a_colour_leak_raises_leak_and_only_leak(clip, preserve):
    ring = cv2.dilate((~preserve[0]).astype(np.uint8), np.ones((9, 9))) > 0
    leaked = clip.copy()
    leaked[:, ring & preserve[0]] = np.clip(leaked[:, ring & preserve[0]].astype(int) + np.array([40, 0, 0]), 0, 255)
    clean, dirty = (metrics.seam(video, clip, preserve) for video in (clip, leaked))
    assert clean.leak == 0
    assert dirty.leak > 3
    far = clip.copy()
    far[:, :10] = 255
    assert metrics.seam(far, clip, preserve).leak == 0


def test_a_step_at_the_border_raises_excess_and_a_faded_one_does_not(clip, preserve):
    weight = np.clip(cv2.distanceTransform((~preserve[0]).astype(np.uint8), cv2.DIST_L2, 5) / 12, 0, 1)
    hard, soft = clip.copy(), np.rint(np.clip(clip + 60 * weight[..., None], 0, 255)).astype(np.uint8)
    hard[~preserve] = np.clip(hard[~preserve].astype(int) + 60, 0, 255)
    assert metrics.seam(hard, clip, preserve).excess > 20
    assert abs(metrics.seam(soft, clip, preserve).excess) < 4


def test_flow_finds_the_known_motion(clip):
    found = motion.flow(clip)
    inner = found.backward[:, 10:-10, 10:-10]
    np.testing.assert_allclose(np.median(inner, axis=(0, 1, 2)), [STEP, 0], atol=0.1)
    assert found.visible[:, 10:-10, 10:-10].mean() > 0.95
    assert not found.visible[:, :, -1].any(), "the last column comes from outside the frame before"


def test_warping_punishes_frozen_and_shaking_video(clip):
    source_flow = motion.flow(clip)
    frozen = np.repeat(clip[:1], len(clip), axis=0)
    floor = motion.warping(clip, source_flow).error
    assert floor < 1e-3
    assert motion.warping(frozen, source_flow).error > 10 * floor
    assert motion.warping(noisy(clip, 12), source_flow).error > 3 * floor
    assert metrics.flicker(frozen) == 1, "flicker alone likes a frozen video"


def test_warping_is_the_mean_of_its_frames_where_all_count_alike(clip):
    source_flow = motion.Flow(np.zeros((5, 96, 128, 2), np.float32), np.ones((5, 96, 128), bool))
    found = motion.warping(clip, source_flow)
    by_hand = np.mean(np.square(np.diff(clip.astype(float), axis=0) / 255), axis=(1, 2, 3))
    assert found.frame_errors == pytest.approx(by_hand, rel=1e-5)
    assert found.error == pytest.approx(by_hand.mean(), rel=1e-5)


def test_occluded_pixels_are_not_held_against_the_edit(clip):
    """A square moves over the picture; what it uncovers has no past."""
    def with_square(t: int, size: int = 30) -> np.ndarray:
        frame = clip[0].copy()
        frame[30 : 30 + size, 10 + 9 * t : 10 + 9 * t + size] = photo()[:size, :size]
        return frame

    video = np.stack([with_square(t) for t in range(5)])
    found = motion.flow(video)
    everywhere = motion.Flow(found.backward, np.ones_like(found.visible))
    assert motion.warping(video, found).error < 0.5 * motion.warping(video, everywhere).error


def test_motion_agreement(clip, preserve):
    source_flow = motion.flow(clip)
    same = motion.agreement(source_flow, source_flow, ~preserve)
    assert same.error == 0
    assert same.frozen == pytest.approx(STEP, abs=0.2)
    frozen = motion.flow(np.repeat(clip[:1], len(clip), axis=0))
    assert motion.agreement(frozen, source_flow, ~preserve).ratio == pytest.approx(1, abs=0.01)
    backwards = motion.flow(np.ascontiguousarray(clip[::-1]))
    assert motion.agreement(backwards, source_flow, ~preserve).ratio == pytest.approx(2, abs=0.1)


def test_motion_agreement_ignores_colour(clip, preserve):
    recoloured = clip.copy()
    recoloured[~preserve] = recoloured[~preserve] // 2 + np.array([60, 0, 20], np.uint8)
    found = motion.agreement(motion.flow(recoloured), motion.flow(clip), ~preserve)
    assert found.ratio < 0.15


def test_what_does_not_fit_is_refused(clip, preserve):
    with pytest.raises(ValueError, match="do not fit"):
        metrics.quality(clip[:, :50], clip)
    with pytest.raises(ValueError, match="uint8"):
        metrics.quality(clip / 255.0, clip)
    with pytest.raises(ValueError, match="bool"):
        metrics.seam(clip, clip, preserve.astype(np.uint8))
    with pytest.raises(ValueError, match="do not fit"):
        metrics.quality(clip, clip, preserve[:3])
    with pytest.raises(ValueError, match="two frames"):
        motion.flow(clip[:1])
    with pytest.raises(ValueError, match="do not fit"):
        motion.agreement(motion.flow(clip), motion.flow(clip[:3]), preserve)
