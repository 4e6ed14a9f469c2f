"""Masks: polarity, grey fill, packing for each model family."""

from __future__ import annotations

import pytest
import torch

from common.errors import UserError
from loraedit_ext import masks


def _packing_cases(golden):
    g = golden("wan_mask_packing")
    return {name.removesuffix(".pixel_mask"): (mask.bool(), g.outputs[name.replace("pixel", "latent")])
            for name, mask in g.inputs.items()}


CASES = ["first_frame", "first_frame_21f", "half_plane", "half_plane_raw", "moving_box", "checkerboard",
         "frame_gate"]


@pytest.mark.parametrize("case", CASES)
def test_packing_by_the_nearest_rule_equals_the_original(golden, case):
    preserve, expected = _packing_cases(golden)[case]
    assert torch.equal(masks.wan_channels(preserve, "nearest"), expected)


def test_every_golden_case_is_tested(golden):
    assert set(_packing_cases(golden)) == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_the_careful_rule_preserves_a_cell_only_if_every_pixel_is(golden, case):
    preserve, _ = _packing_cases(golden)[case]
    cells = masks.latent_cells(preserve, "all")
    for f, y, x in torch.cartesian_prod(*(torch.arange(n) for n in cells.shape)).tolist():
        assert cells[f, y, x] == preserve[f, 8 * y: 8 * y + 8, 8 * x: 8 * x + 8].all()


def test_white_is_edit_and_true_is_preserve():
    grey = torch.zeros(5, 8, 8, dtype=torch.uint8)
    grey[2, 3, 4] = 255
    preserve = masks.from_grey(grey, "mask.mp4")
    assert not preserve[2, 3, 4]
    assert preserve.sum() == grey.numel() - 1


def test_grey_from_128_on_is_edit():
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert masks.from_grey(ramp, "mask.png").flatten().tolist() == [True] * 128 + [False] * 128


@pytest.mark.parametrize(("value", "word"), [(0, "all black"), (255, "all white"), (127, "all black")])
def test_a_mask_without_contrast_is_refused_by_name(value, word):
    with pytest.raises(UserError, match=rf"clip/masks: the mask is {word}"):
        masks.from_grey(torch.full((5, 8, 8), value, dtype=torch.uint8), "clip/masks")


def test_a_wholly_white_mask_is_taken_where_nothing_needs_to_be_preserved_and_else_the_cure_is_told():
    white = torch.full((5, 8, 8), 255, dtype=torch.uint8)
    assert not masks.from_grey(white, "mask", whole=True).any()
    with pytest.raises(UserError) as error:
        masks.from_grey(white, "mask")
    for cure in ("regime naive", "mix = { naive = 1 }", 'edit.condition = "first_frame"', "edit.composite = false"):
        assert cure in str(error.value)
    with pytest.raises(UserError, match="all black"):
        masks.from_grey(255 - white, "mask", whole=True)


def test_one_edit_pixel_opens_its_cell_in_its_frame_and_channel_only():
    preserve = torch.ones(9, 16, 24, dtype=torch.bool)
    preserve[6, 9, 17] = False
    channels = masks.wan_channels(preserve)
    assert (channels == 0).nonzero().tolist() == [[1, 2, 1, 2]]  # frame 6 = 4*(2-1)+1+1
    assert (masks.latent_mask(preserve) == 0).nonzero().tolist() == [[0, 2, 1, 2]]


def test_channels_unfold_to_the_cells_again():
    preserve = torch.rand(13, 16, 16, generator=torch.Generator().manual_seed(0)) > 0.2
    channels = masks.wan_channels(preserve, "nearest")
    unfolded = channels.permute(1, 0, 2, 3).flatten(0, 1)[3:]
    assert torch.equal(unfolded.bool(), masks.latent_cells(preserve, "nearest"))


def test_frame_zero_counts_four_times():
    channels = masks.wan_channels(masks.first_frame_only(9, 16, 16))
    assert channels[:, 0].eq(1).all()
    assert channels[:, 1:].eq(0).all()


def test_grey_fill_keeps_preserved_pixels_and_greys_the_rest():
    video = torch.rand(3, 5, 8, 8) * 2 - 1
    preserve = torch.rand(5, 8, 8) > 0.5
    filled = masks.grey_fill(video, preserve)
    assert torch.equal(filled[:, preserve], video[:, preserve])
    assert filled[:, ~preserve].eq(0).all()


def test_a_mask_of_another_size_is_never_stretched():
    with pytest.raises(UserError, match="never stretched"):
        masks.grey_fill(torch.zeros(3, 5, 16, 16), torch.ones(5, 8, 8, dtype=torch.bool))
    with pytest.raises(UserError, match="4n\\+1"):
        masks.wan_channels(torch.ones(8, 16, 16, dtype=torch.bool))
    with pytest.raises(UserError, match="multiple of 8"):
        masks.wan_channels(torch.ones(9, 16, 20, dtype=torch.bool))
