"""Pictures with colour profiles. The one here is sRGB with its red and green primaries exchanged: a mistake is plain to see."""

from __future__ import annotations

import numpy as np
import pytest
from media_makers import picture_frames
from PIL import Image, ImageCms

from dataset.images import read_image, read_mask

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXCHANGED = SRGB.replace(b"rXYZ", b"????", 1).replace(b"gXYZ", b"rXYZ", 1).replace(b"????", b"gXYZ", 1)


@pytest.fixture
def picture() -> np.ndarray:
    return picture_frames(1)[0]


@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_colours_follow_the_profile(tmp_path, picture, suffix):
    Image.fromarray(picture).save(tmp_path / f"p.{suffix}", icc_profile=EXCHANGED, lossless=True)
    assert read_image(tmp_path / f"p.{suffix}") == pytest.approx(picture[..., [1, 0, 2]], abs=1)


def test_those_of_a_jpeg_too(tmp_path, picture):
    for name, profile in (("plain.jpg", None), ("profile.jpg", EXCHANGED)):
        Image.fromarray(picture).save(tmp_path / name, icc_profile=profile, quality=95)
    assert read_image(tmp_path / "profile.jpg") == pytest.approx(read_image(tmp_path / "plain.jpg")[..., [1, 0, 2]], abs=1)


@pytest.mark.parametrize("profile", [SRGB, b"no profile", None])
def test_pixels_of_srgb_stay_what_they_are(tmp_path, picture, profile):
    """To the bit, as the kept pixels of an edit must."""
    Image.fromarray(picture).save(tmp_path / "p.png", icc_profile=profile)
    assert (read_image(tmp_path / "p.png") == picture).all()


def test_a_profile_of_greys_changes_nothing(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "p.png", icc_profile=SRGB.replace(b"RGB ", b"GRAY", 1))
    assert (read_image(tmp_path / "p.png") == grey[..., None]).all()


def test_masks_have_no_colours_to_convert(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "p.png", icc_profile=EXCHANGED)
    assert (read_mask(tmp_path / "p.png") == picture).all()
