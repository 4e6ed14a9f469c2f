"""HDR in the standard range, against the levels that ITU-R BT.2408 lists and colours worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np
import pytest

from dataset.hdr import to_standard
from dataset.video import read_video

BT2408 = {
    "grey card": (26, 0.38, 0.38), "reflects 83 %": (162, 0.56, 0.71), "90 %": (179, 0.57, 0.73), "white": (203, 0.58, 0.75),
}
"""cd/m2 and the codes of PQ and HLG, table 1 there, rounded to a hundredth."""


def grey(code: float) -> np.ndarray:
    return np.full((1, 1, 3), round(code * 65535), np.uint16)


@pytest.mark.parametrize("name", BT2408)
def test_both_curves_give_a_level_of_light_the_same_grey(name):
    _, pq, hlg = BT2408[name]
    (one,), (other,) = (to_standard(grey(code), transfer)[0] for code, transfer in ((pq, "PQ"), (hlg, "HLG")))
    assert one.min() == one.max()
    assert other.min() == other.max()
    assert abs(int(one[0]) - int(other[0])) <= 3, "the table's codes are rounded"


def test_a_grey_card_is_as_bright_as_a_standard_display_shows_it():
    assert to_standard(grey(0.38), "PQ")[0, 0, 0] == pytest.approx(255 * (26 / 203) ** (1 / 2.4), abs=2)


@pytest.mark.parametrize("transfer", ["PQ", "HLG"])
def test_brighter_stays_brighter_up_to_white(transfer):
    top = 0.7518 if transfer == "PQ" else 1.0  # 1,000 cd/m2
    ramp = np.repeat(np.linspace(0, top * 65535, 300).round().astype(np.uint16)[None, :, None], 3, axis=2)
    shown = to_standard(ramp, transfer)[0, :, 0].astype(int)
    assert (np.diff(shown) >= 0).all()
    assert shown[0] == 0
    assert shown[-1] == 255
    assert 220 < to_standard(grey(BT2408["white"][1]), "PQ")[0, 0, 0] < 240, "white paper leaves room for highlights"


def pq_code(light: float) -> float:
    power = (light / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


PRIMARIES = ((0.6274, 0.0691, 0.0164), (0.3293, 0.9195, 0.0880), (0.0433, 0.0114, 0.8956))


@pytest.mark.parametrize(("axis", "light"), list(enumerate(PRIMARIES)))
def test_primaries_of_bt709_come_back_pure(axis, light):
    """How BT.2087 writes them in BT.2020."""
    codes = np.array([[[round(pq_code(60 * part) * 65535) for part in light]]], np.uint16)
    shown = to_standard(codes, "PQ")[0, 0]
    assert shown[axis] == pytest.approx(255 * (60 / 203) ** (1 / 2.4), abs=2)
    assert np.delete(shown, axis).max() < 20


def write_hdr(path, luma: int, transfer: int):
    """A still grey in ten bits, BT.2020, studio range."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx265", rate=Fraction(30), options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        codec = stream.codec_context
        codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range = 9, 9, transfer, 1
        for index in range(3):
            frame = av.VideoFrame(64, 48, "yuv420p10le")
            for plane, value in zip(frame.planes, (luma, 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, value, np.uint16).tobytes())
            frame.pts, frame.colorspace, frame.color_range, frame.color_trc = index, 9, 1, transfer
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


@pytest.mark.parametrize(("transfer", "code", "name"), [(18, 0.38, "HLG"), (16, 0.38, "PQ")])
def test_a_file_of_a_phone_is_read_so_and_says_so(tmp_path, transfer, code, name):
    """Taken as they are, these codes would be 97 of 255: once it was so, with a note that the picture looks pale."""
    video = read_video(write_hdr(tmp_path / "hdr.mp4", round(64 + 876 * code), transfer))
    assert video.frames == pytest.approx(np.full((3, 48, 64, 3), 108), abs=3)
    assert video.notes == (f"HDR ({name}) brought into the standard range (BT.709): a result is in that, too",)
