"""MaskedWan overrides the conditioning and nothing else."""

from __future__ import annotations

import pytest
import torch

from loraedit_ext import masks
from loraedit_ext.wan import MaskedWan
from models.wan.checkpoint import WanCheckpoint
from models.wan.wrapper import WanI2V

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair(tiny_wan):
    checkpoint = WanCheckpoint.open(tiny_wan)
    return WanI2V(checkpoint, CPU), MaskedWan(checkpoint, CPU)


@pytest.fixture(scope="module")
def video():
    return torch.rand(3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_first_frame_mask_gives_the_base_models_condition_bit_for_bit(pair, video):
    base, masked = pair
    arguments = (video, masks.first_frame_only(9, 32, 48), video[:, 0], "p3rs0n, a cat")
    expected, found = base.encode_condition(*arguments), masked.encode_condition(*arguments)
    assert expected.keys() == found.keys() == set(base.condition_names)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_only_the_conditioning_is_overridden():
    own = {name for name in vars(MaskedWan) if not name.startswith("_")}
    assert own == {"known_region"}


def test_a_changed_mask_cell_changes_its_own_channel(pair, video):
    _, masked = pair
    open_mask = torch.ones(9, 32, 48, dtype=torch.bool)
    hole = open_mask.clone()
    hole[7, 8:16, 16:24] = False
    _, whole = masked.known_region(video, open_mask)
    _, holed = masked.known_region(video, hole)
    assert (whole != holed).nonzero().tolist() == [[2, 2, 1, 2]]


def test_condition_has_the_released_shapes(pair, video):
    _, masked = pair
    condition = masked.encode_condition(video, masks.first_frame_only(9, 32, 48), video[:, 0], "a cat")
    assert condition["y"].shape == (20, 3, 4, 6)
    assert condition["text"].shape == (512, masked.checkpoint.config.text_dim)
    assert condition["image"].shape == (257, masked.checkpoint.config.image_dim)


def test_the_library_pipeline_prepares_the_same_first_frame_condition(pair, video):
    """diffusers' own conditioning for the released model, on the same VAE."""
    from diffusers import WanImageToVideoPipeline

    base, _ = pair
    pipeline = WanImageToVideoPipeline(None, None, base.vae.model, None, None, None, None)
    pipeline.vae_scale_factor_temporal, pipeline.vae_scale_factor_spatial = 4, 8
    _, condition = pipeline.prepare_latents(
        video[None, :, 0], 1, 16, 32, 48, 9, torch.float32, CPU, torch.Generator().manual_seed(0)
    )
    found = base.encode_condition(video, masks.first_frame_only(9, 32, 48), video[:, 0], "a cat")["y"]
    torch.testing.assert_close(found, condition[0], atol=1e-5, rtol=0)
