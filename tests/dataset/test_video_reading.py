"""Reading: every frame, its true time, upright, and never a short clip for a whole one."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from media_makers import cut_short, encode, picture_frames, write_folder, write_picture

from common.errors import UserError
from dataset.containers import gif_images, missing_matroska_bytes, missing_mp4_bytes
from dataset.video import _shown, hash_media, nice_rate, read_images, read_media, read_video

KINDS = {
    "a.mp4": {},
    "a.mov": {"codec": "prores", "pix_fmt": "yuv422p10le"},
    "faststart.mp4": {"options": {"movflags": "faststart"}},
    "a.mkv": {},
    "a.webm": {"codec": "libvpx-vp9"},
    "vp8.webm": {"codec": "libvpx"},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8", "rate": 10},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_all_frames_and_times(tmp_path, name):
    kind = KINDS[name]
    path = encode(tmp_path / name, picture_frames(13), **kind)
    video = read_media(path)
    rate = kind.get("rate", 30)
    assert video.frames.shape == (13, 48, 64, 3)
    assert video.frames.dtype == np.uint8
    assert (video.total, video.fps, video.variable_rate, video.has_audio) == (13, rate, False, False)
    np.testing.assert_allclose(video.times, np.arange(13) / rate, atol=6e-4)
    tolerance = 25 if "gif" in name else 6  # rgb8 has few colours
    assert np.abs(video.frames.astype(int) - picture_frames(13)).mean() < tolerance


@pytest.mark.parametrize("share", [0.97, 0.6, 0.05])
@pytest.mark.parametrize("name", KINDS)
def test_a_cut_file_is_an_error_not_a_short_clip(tmp_path, name, share):
    path = encode(tmp_path / name, picture_frames(25), **KINDS[name])
    with pytest.raises(UserError, match=f"short_{name}.*truncated"):
        read_video(cut_short(path, share))


def test_damage_inside_matroska_is_an_error(tmp_path):
    """FFmpeg gives up at the damage without an error, 14 of 49 frames in the case that taught us this."""
    path = encode(tmp_path / "a.webm", picture_frames(49), codec="libvpx")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    span = slice(middle, middle + len(data) // 10)  # several blocks with their heads
    data[span] = bytes(byte ^ 0x5A for byte in data[span])
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        read_video(path)


def test_a_range_keeps_the_count_of_the_whole(tmp_path):
    path = encode(tmp_path / "a.mp4", picture_frames(13))
    whole, part = read_video(path), read_video(path, first=4, count=5)
    assert (part.total, part.first, len(part.frames)) == (13, 4, 5)
    assert (part.frames == whole.frames[4:9]).all()
    assert (part.times == whole.times[4:9]).all()
    assert len(read_video(path, first=11, count=5).frames) == 2
    assert read_video(path, first=20, count=5).frames.shape == (0, 48, 64, 3)


def test_frames_equal_those_that_opencv_extracts(tmp_path):
    """Edited frames start from such extractions; another colour rule would show as a seam."""
    path = encode(tmp_path / "a.mp4", picture_frames(5))
    capture = cv2.VideoCapture(str(path))
    for frame in read_video(path).frames:
        ok, expected = capture.read()
        assert ok
        assert (frame == expected[..., ::-1]).all()


def test_variable_rate_is_seen_and_times_are_true(tmp_path):
    ticks = [0, 40, 80, 120, 620, 1120, 1620]
    video = read_video(encode(tmp_path / "a.mp4", picture_frames(7), ticks=ticks))
    assert video.variable_rate
    np.testing.assert_allclose(video.times, np.array(ticks) / 1000, atol=1e-6)
    assert float(video.fps) == pytest.approx(6 / 1.62, rel=1e-3)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001), 25])
def test_millisecond_clocks_are_no_variable_rate(tmp_path, rate):
    video = read_video(encode(tmp_path / "a.mkv", picture_frames(31), rate=rate))
    assert (video.fps, video.variable_rate) == (rate, False)


def test_an_edit_list_hides_frames_that_the_header_counts(tmp_path):
    path, cut = encode(tmp_path / "a.mp4", picture_frames(49)), tmp_path / "cut.mp4"
    with av.open(str(path)) as source, av.open(str(cut), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        shift = int(Fraction(15, 30) / stream.time_base)
        for packet in source.demux(stream):
            if packet.size:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                target.mux(packet)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames == 49
    video = read_video(cut)
    assert video.total == 34
    assert (video.frames == read_video(path).frames[15:]).all()


def shown_through(matrix, path):
    """The mp4 with another display matrix (ISO 14496-12 8.3.2)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value << 16 for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("matrix", "seen"), [
    ((-1, 0, 0, 1), lambda stored: stored[:, ::-1]), ((1, 0, 0, -1), lambda stored: stored[::-1]),
    ((0, 1, 1, 0), lambda stored: stored.swapaxes(0, 1)), ((0, -1, -1, 0), lambda stored: np.rot90(stored, 2).swapaxes(0, 1)),
])
def test_a_mirrored_picture_is_mirrored_as_players_do(tmp_path, matrix, seen):
    """OpenCV turns by 180 degrees instead: a rotation cannot say that a picture is mirrored."""
    path = encode(tmp_path / "a.mp4", picture_frames(3))
    stored = read_video(path).frames[0]
    video = read_video(shown_through(matrix, path))
    assert (video.frames[0] == seen(stored)).all()
    assert "mirrored, as the file says" in video.notes


@pytest.mark.parametrize(("codec", "suffix"), [("libx264", "mp4"), ("mpeg2video", "mkv")])
def test_interlaced_frames_are_told(tmp_path, codec, suffix):
    """A camcorder's: two half pictures of two moments in each frame."""
    plain = encode(tmp_path / f"plain.{suffix}", picture_frames(), codec)
    woven = encode(tmp_path / f"woven.{suffix}", picture_frames(), codec, stream_options={"flags": "+ildct+ilme"})
    assert not [note for note in read_video(plain).notes if "interlaced" in note]
    assert [note for note in read_video(woven).notes if "bwdif" in note]


def cut_out(path: Path, colours: np.ndarray) -> Path:
    """A box of some colours on a transparent ground, as effects programs export it: ProRes 4444 with alpha."""
    pictures = np.zeros((5, 48, 64, 4), np.uint8)
    pictures[:, 10:30, 20:50, :3] = colours
    pictures[:, 10:30, 20:50, 3] = 255
    with av.open(str(path), "w") as output:
        stream = output.add_stream("prores_ks", rate=Fraction(25), options={"profile": "4444"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuva444p10le"
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgba").reformat(format="yuva444p10le")
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def test_the_shape_of_a_mask_may_be_in_the_alpha_of_a_video(tmp_path):
    path = cut_out(tmp_path / "matte.mov", np.array([200, 10, 10]))
    shape = np.zeros((5, 48, 64), np.uint8)
    shape[:, 10:30, 20:50] = 255
    assert (read_video(path, masks=True).frames == shape[..., None]).all()
    assert "has transparent pixels: the colours under them are used" in read_video(path).notes


def test_a_cut_out_of_several_colours_is_no_plain_mask(tmp_path):
    path = cut_out(tmp_path / "matte.mov", np.random.default_rng(0).integers(0, 256, (20, 30, 3)))
    with pytest.raises(UserError, match=r"matte\.mov: has transparent pixels and several colours"):
        read_video(path, masks=True)


def test_wide_colours_are_told(tmp_path):
    path = encode(tmp_path / "p3.mp4", picture_frames(), stream_options={"color_primaries": "smpte432"})
    assert "colours of Display P3 taken for BT.709's: looks a little pale" in read_video(path).notes


def test_an_edit_list_that_cuts_everything_is_told(tmp_path):
    path = encode(tmp_path / "a.mp4", picture_frames(3))
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12  # duration of the first entry
    data[at : at + 4] = bytes(4)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.mp4: shows no frame: .* its edit list cuts all of it"):
        read_video(path)


@pytest.mark.parametrize(
    ("matrix", "degrees"), [((0, 1, -1, 0), 90), ((-1, 0, 0, -1), 180), ((0, -1, 1, 0), 270)]
)
def test_rotation_is_applied_as_opencv_does(tmp_path, matrix, degrees):
    path = shown_through(matrix, encode(tmp_path / "a.mp4", picture_frames(3)))
    video = read_video(path)
    assert video.size == ((48, 64) if degrees % 180 else (64, 48))
    assert any("upright" in note for note in video.notes)
    ok, expected = cv2.VideoCapture(str(path)).read()
    assert ok
    assert (video.frames[0] == expected[..., ::-1]).all()


def test_a_hidden_vp8_frame_is_not_waited_for():
    class Stream:
        class codec_context:
            name = "vp8"

    assert _shown(av.Packet(b"\x10\x00\x00"), Stream) == 1
    assert _shown(av.Packet(b"\x00\x00\x00"), Stream) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"this is no video" * 100, "unreadable"), (None, "no such file")],
)
def test_files_that_are_no_video(tmp_path, content, message):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.mp4.*{message}"):
        read_video(path)


def test_a_format_whose_wholeness_cannot_be_checked_is_refused(tmp_path):
    path = encode(tmp_path / "a.avi", picture_frames(5))
    with pytest.raises(UserError, match=r"AVI.*expected mp4"):
        read_video(path)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    with pytest.raises(UserError, match="no video"):
        read_video(path)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".bmp", ".tiff", ".jpg"])
def test_a_folder_in_natural_order(tmp_path, suffix):
    frames = picture_frames(12)
    folder = tmp_path / "frames"
    folder.mkdir()
    for index, frame in enumerate(frames):
        write_picture(folder / f"f{index}{suffix}", frame)
    video = read_images(folder, fps=Fraction(8))
    assert (video.total, video.fps) == (12, 8)
    error = np.abs(video.frames.astype(int) - frames).mean((1, 2, 3)).max()
    assert error < 4 if suffix in (".jpg", ".webp") else error == 0
    np.testing.assert_allclose(video.times, np.arange(12) / 8)


def test_sixteen_bit_grey_and_opaque_alpha(tmp_path):
    frames = picture_frames(1)
    cv2.imwrite(str(tmp_path / "a0.png"), frames[0][..., ::-1].astype(np.uint16) * 257)
    opaque = np.dstack([frames[0][..., ::-1], np.full((48, 64), 255, np.uint8)])
    cv2.imwrite(str(tmp_path / "a1.png"), opaque)
    write_picture(tmp_path / "a2.png", frames[0][..., 0])
    video = read_images(tmp_path)
    assert (video.frames[:2] == frames[0]).all()
    assert (video.frames[2] == frames[0][..., :1]).all()


def test_transparent_pictures_are_refused(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 4), np.uint8))
    with pytest.raises(UserError, match="transparent"):
        read_images(tmp_path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_jpeg_is_turned_upright_under_any_name(tmp_path, name):
    data = cv2.imencode(".jpg", np.tile(np.uint8([[[40], [200]]]), (24, 16, 1)).repeat(3, 2))[1].tobytes()
    turned = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    tag = b"\xff\xe1" + (len(turned) + 2).to_bytes(2, "big") + turned
    (tmp_path / name).write_bytes(data[:2] + tag + data[2:])
    assert read_images(tmp_path).frames.shape == (1, 32, 24, 3)


def test_a_transparent_picture_called_jpg_is_no_opaque_one(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((8, 8, 4), np.uint8))
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="transparent"):
        read_images(tmp_path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tif"])
def test_a_cut_picture_is_an_error(tmp_path, suffix):
    path = write_picture(tmp_path / f"a{suffix}", picture_frames(1)[0])
    cut_short(path, 0.9).rename(path)
    with pytest.raises(UserError, match="truncated"):
        read_images(tmp_path)


def test_folder_mistakes(tmp_path):
    with pytest.raises(UserError, match="no pictures"):
        read_images(tmp_path)
    folder = write_folder(tmp_path / "f", picture_frames(3))
    write_picture(folder / "00001.jpg", picture_frames(1)[0])
    with pytest.raises(UserError, match=r"00001\.jpg and 00001\.png claim one frame"):
        read_images(folder)
    (folder / "00001.jpg").unlink()
    write_picture(folder / "00003.png", picture_frames(1, width=32)[0])
    with pytest.raises(UserError, match=r"00003\.png: is 32x48, expected 64x48"):
        read_images(folder)


def test_folder_oddities_are_told(tmp_path):
    folder = write_folder(tmp_path / "f", picture_frames(4))
    (folder / "00002.png").unlink()
    (folder / "notes.txt").write_text("x")
    notes = " ".join(read_images(folder).notes)
    assert "jump from 1 to 3" in notes
    assert "notes.txt" in notes


def test_hashes_follow_bytes_and_order(tmp_path):
    folder = write_folder(tmp_path / "f", picture_frames(3))
    before = hash_media(folder)
    (folder / "00001.png").rename(folder / "00009.png")
    assert hash_media(folder) != before
    (folder / "00009.png").rename(folder / "00001.png")
    assert hash_media(folder) == before


def test_whole_files_pass_the_container_checks(tmp_path):
    assert gif_images(encode(tmp_path / "a.gif", picture_frames(9), codec="gif", pix_fmt="rgb8")) == 9
    assert missing_matroska_bytes(encode(tmp_path / "a.mkv", picture_frames(9))) == 0
    assert missing_mp4_bytes(encode(tmp_path / "a.mp4", picture_frames(9))) == 0
    live = encode(tmp_path / "live.mkv", picture_frames(9), options={"live": "1"})
    assert missing_matroska_bytes(live) == 0
    assert read_video(live).total == 9


def test_decimal_rates_mean_fractions():
    rates = [nice_rate(rate) for rate in (23.976, 29.97, 59.94, 12.5, 24.0, 8.0)]
    assert rates == [
        Fraction(24000, 1001), Fraction(30000, 1001), Fraction(60000, 1001), Fraction(25, 2), 24, 8,
    ]
