"""Sizes and resizing: one geometry for frames and masks, and a mask never loses an edited pixel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from media_makers import picture_frames

from dataset.resize import Grid, fit

GRID = Grid()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ((832, 480), (832, 480)),
        ((480, 832), (480, 832)),
        ((512, 512), (512, 512)),
        ((1920, 1080), (832, 464)),
        ((1080, 1920), (464, 832)),
        ((500, 500), (496, 496)),
        ((10, 10), (16, 16)),
    ],
)
def test_default_sizes(source, expected):
    assert GRID.default_size(source) == expected


@given(width=st.integers(100, 4000), height=st.integers(100, 2200))
@settings(max_examples=60, deadline=None)
def test_a_default_size_is_on_the_grid_within_the_area_and_never_enlarges(width, height):
    size = GRID.default_size((width, height))
    assert GRID.takes_size(size)
    assert size[0] * size[1] <= GRID.max_area
    assert size[0] <= width
    assert size[1] <= height
    assert abs(np.log(size[0] * height / size[1] / width)) < 0.08


def test_frame_counts():
    assert [GRID.frames_below(n) for n in (5, 8, 9, 16, 49, 52)] == [5, 5, 9, 13, 49, 49]
    assert [GRID.takes_frames(n) for n in (1, 4, 5, 49, 50)] == [False, False, True, True, False]
    assert GRID.nearest_frames(50) == [49, 53]
    assert GRID.nearest_frames(2) == [5]
    assert GRID.nearest_sizes((500, 304)) == [(496, 304), (512, 304)]


def test_small_changes_of_aspect_stretch_and_large_ones_crop_to_the_centre():
    assert not fit((1920, 1080), (832, 464)).cropped
    wide = fit((512, 512), (832, 480))
    assert wide.crop == (512, 295)
    assert wide.offset == (0, 108)
    tall = fit((512, 512), (480, 832))
    assert tall.crop == (295, 512)
    assert tall.offset == (108, 0)


@given(
    source=st.tuples(st.integers(64, 4096), st.integers(64, 2304)), place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    share=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)),
)
@settings(max_examples=200, deadline=None)
def test_a_window_holds_its_box_and_is_neither_scaled_up_nor_down_without_need(source, place, share):
    box_size = [max(1, int(side * part)) for side, part in zip(source, share, strict=True)]
    starts = [int((side - inner) * part) for side, inner, part in zip(source, box_size, place, strict=True)]
    window = GRID.window((*starts, *box_size), source)
    for start, inner, left, side, most in zip(starts, box_size, window[:2], window[2:], source, strict=True):
        assert 0 <= left <= start
        assert start + inner <= left + side <= most
    width, height = window[2:]
    room = min(GRID.max_area, source[0] * source[1])
    assert width * height >= room * 0.9 or min(width + 16 > source[0], height + 16 > source[1])
    if width < source[0] and height < source[1] and width * height <= GRID.max_area and GRID.takes_size(window[2:]):
        assert GRID.default_size(window[2:]) == window[2:], "worked on pixel by pixel"


def test_a_small_box_of_a_large_picture_gets_the_models_whole_picture():
    left, top, width, height = GRID.window((1700, 900, 100, 80), (1920, 1080))
    assert (left + width, top + height) == (1920, 1080)
    assert (width, height) == (704, 560)
    assert GRID.default_size((width, height)) == (width, height)
    fitted = fit((1920, 1080), (width, height), (left, top, width, height))
    assert (fitted.crop, fitted.offset, fitted.factors) == ((704, 560), (1216, 520), (1, 1))


def test_the_own_size_changes_nothing():
    frames = picture_frames(2)
    same = fit((64, 48), (64, 48))
    assert (same.frames(frames) == frames).all()
    mask = np.random.default_rng(0).integers(0, 256, (2, 48, 64), dtype=np.uint8)
    assert (same.mask(mask) == mask).all()


def test_shrinking_averages_areas():
    """A checkerboard of single pixels becomes grey; a filter without antialiasing leaves black or white."""
    board = np.indices((64, 64)).sum(0) % 2 * 255
    image = np.repeat(board[..., None], 3, 2).astype(np.uint8)
    assert np.abs(fit((64, 64), (16, 16)).image(image).astype(int) - 128).max() <= 1


@given(
    width=st.integers(3, 40), height=st.integers(3, 40),
    to_width=st.integers(1, 5), to_height=st.integers(1, 5), seed=st.integers(0, 10),
)
@settings(max_examples=80, deadline=None)
def test_a_mask_pixel_is_the_brightest_pixel_under_it(width, height, to_width, to_height, seed):
    mask = np.random.default_rng(seed).integers(0, 256, (2, height, width), dtype=np.uint8)
    size = (8 * to_width, 8 * to_height)
    fitted = fit((width, height), size)
    (left, top), (crop_w, crop_h) = fitted.offset, fitted.crop
    got = fitted.mask(mask)
    assert got.shape == (2, size[1], size[0])
    for y in range(0, size[1], 3):
        rows = slice(top + int(y * crop_h / size[1]), top + int(np.ceil((y + 1) * crop_h / size[1])))
        for x in range(0, size[0], 3):
            columns = slice(left + int(x * crop_w / size[0]), left + int(np.ceil((x + 1) * crop_w / size[0])))
            assert (got[:, y, x] == mask[:, rows, columns].max((1, 2))).all()


def test_one_bright_pixel_survives_any_shrinking():
    mask = np.zeros((1, 480, 832), np.uint8)
    mask[0, 333, 777] = 200
    small = fit((832, 480), (208, 128)).mask(mask)
    assert small.max() == 200


def test_frames_and_masks_stay_aligned():
    """A white box in the picture and in the mask: the mask covers it, with one pixel more at most."""
    picture = np.zeros((300, 500, 3), np.uint8)
    picture[101:203, 157:311] = 255
    fitted = fit((500, 300), (256, 256))
    image, mask = fitted.image(picture), fitted.mask(picture[None, ..., 0])[0]
    assert (mask[image[..., 0] > 0] == 255).all()
    assert (image[..., 0] > 0).sum() >= (mask > 0).sum() * 0.98
