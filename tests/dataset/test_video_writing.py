"""Writing: what people watch keeps colours, times and sound; what we read again keeps every bit."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from media_makers import encode, picture_frames

from common.errors import UserError
from dataset.video import read_images, read_video
from dataset.video_writer import write_images, write_lossless, write_video


@pytest.mark.parametrize("rate", [8, 29.97, Fraction(24000, 1001), 12.5])
def test_mp4_keeps_colours_rate_and_count(tmp_path, rate):
    frames = picture_frames(13)
    assert write_video(tmp_path / "o.mp4", frames, rate) == []
    video = read_video(tmp_path / "o.mp4")
    assert (video.total, video.variable_rate) == (13, False)
    assert float(video.fps) == pytest.approx(float(rate), rel=1e-5)
    assert np.abs(video.frames.astype(int) - frames).mean() < 3
    assert not video.notes  # tagged, so nothing had to be guessed


def test_mp4_is_what_browsers_play(tmp_path):
    write_video(tmp_path / "o.mp4", picture_frames(5), 8)
    with av.open(str(tmp_path / "o.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
    data = (tmp_path / "o.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("width", "height"), [(64, 48), (33, 47)])
def test_prores_is_what_editing_programs_take(tmp_path, width, height):
    """Also of noise, which is hard to code: an mp4 of it is off by dozens of levels."""
    frames = picture_frames(5, width, height)
    frames[2:] = np.random.default_rng(0).integers(0, 256, frames[2:].shape, dtype=np.uint8)
    assert write_video(tmp_path / "o.mov", frames, 29.97) == []
    video = read_video(tmp_path / "o.mov")
    error = np.abs(video.frames.astype(int) - frames)
    assert error[:2].max() <= 1
    assert error[2:].mean() < 1
    write_video(tmp_path / "again.mov", frames, 29.97)
    assert (read_video(tmp_path / "again.mov").frames == video.frames).all(), "the encoder read what nobody had written"
    assert (video.total, video.fps, video.notes) == (5, Fraction(30000, 1001), ())
    with av.open(str(tmp_path / "o.mov")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.codec_tag) == ("prores", "ap4h")
        assert (codec.colorspace, codec.color_primaries, codec.color_trc) == (1, 1, 1)


def test_flat_colours_are_converted_by_the_matrix_that_the_tag_names(tmp_path):
    """BT.601 numbers under a BT.709 tag would shift pure green by about 30 levels."""
    green = np.zeros((5, 32, 32, 3), np.uint8)
    green[..., 1] = 200
    write_video(tmp_path / "o.mp4", green, 8)
    assert np.abs(read_video(tmp_path / "o.mp4").frames.astype(int) - green).max() <= 3


def test_odd_sizes_are_padded_and_told(tmp_path):
    frames = picture_frames(3, width=33, height=47)
    notes = write_video(tmp_path / "o.mp4", frames, 8)
    assert "padded from 33x47 to even 34x48" in notes[0]
    video = read_video(tmp_path / "o.mp4")
    assert video.size == (34, 48)
    assert np.abs(video.frames[:, :47, :33].astype(int) - frames).mean() < 4


def test_variable_times_are_kept(tmp_path):
    times = np.array([5.0, 5.1, 5.2, 5.9, 6.6])
    write_video(tmp_path / "o.mp4", picture_frames(5), 4, times=times)
    np.testing.assert_allclose(read_video(tmp_path / "o.mp4").times, times - 5, atol=2e-5)


@pytest.mark.parametrize(("name", "out"), [("source.mp4", "o.mp4"), ("source.mkv", "o.mp4"), ("source.mp4", "o.mov")])
def test_audio_packets_of_the_span_pass_through(tmp_path, name, out):
    source = encode(tmp_path / name, picture_frames(60), audio=True)
    video = read_video(source)
    assert video.has_audio
    notes = write_video(
        tmp_path / out, video.frames[15:45], video.fps, audio_from=source, audio_start=video.times[15],
    )
    assert "audio copied" in notes[0]
    before, after = _audio(source), _audio(tmp_path / out)
    first = before.index(after[0])
    assert before[first : first + len(after)] == after
    assert first * 1024 / 48_000 == pytest.approx(0.5, abs=0.05)
    assert len(after) * 1024 / 48_000 == pytest.approx(1.0, abs=0.05)
    with av.open(str(tmp_path / out)) as container:
        assert container.duration / 1e6 == pytest.approx(1.0, abs=0.05)


def _audio(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def test_a_source_without_audio_leaves_a_silent_result(tmp_path):
    source = encode(tmp_path / "s.mp4", picture_frames(5))
    write_video(tmp_path / "o.mp4", picture_frames(5), 8, audio_from=source)
    assert not read_video(tmp_path / "o.mp4").has_audio


def test_audio_that_an_mp4_cannot_hold_is_kept_in_a_mov(tmp_path):
    """Cameras write sound without compression."""
    source = tmp_path / "camera.mov"
    with av.open(str(source), "w") as output:
        sound = output.add_stream("pcm_s16le", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.arange(48_000, dtype=np.int16)[None], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 48_000, 0
        output.mux(sound.encode(frame))
    (note,) = write_video(tmp_path / "o.mp4", picture_frames(5), 8, audio_from=source)
    assert note == f"{source}: audio left out: pcm_s16le does not go into mp4 as it is. Into mov it does."
    (note,) = write_video(tmp_path / "o.mov", picture_frames(8), 8, audio_from=source)
    assert "audio copied" in note
    assert b"".join(_audio(tmp_path / "o.mov")) == b"".join(_audio(source))


def test_audio_of_a_missing_file_is_a_user_error_and_writes_nothing(tmp_path):
    with pytest.raises(UserError, match=r"gone\.mp4"):
        write_video(tmp_path / "o.mp4", picture_frames(5), 8, audio_from=tmp_path / "gone.mp4")
    assert not list(tmp_path.iterdir())


def test_lossless_round_trip_is_exact(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (5, 47, 33, 3), dtype=np.uint8)
    write_lossless(tmp_path / "o.mkv", noise, 29.97)
    video = read_video(tmp_path / "o.mkv")
    assert (video.frames == noise).all()
    assert video.fps == Fraction(30000, 1001)
    write_images(tmp_path / "png", noise)
    assert (read_images(tmp_path / "png").frames == noise).all()


def test_writing_images_again_replaces_all_of_them(tmp_path):
    write_images(tmp_path / "png", picture_frames(9))
    write_images(tmp_path / "png", picture_frames(5, seed=1))
    assert (read_images(tmp_path / "png").frames == picture_frames(5, seed=1)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["png"]


def test_a_failing_replacement_brings_the_former_images_back(tmp_path, monkeypatch):
    write_images(tmp_path / "png", picture_frames(9))
    rename = Path.rename

    def rename_unless_partial(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_unless_partial)
    with pytest.raises(UserError, match="Input/output error"):
        write_images(tmp_path / "png", picture_frames(5, seed=1))
    assert (read_images(tmp_path / "png").frames == picture_frames(9)).all()
    assert [path.name for path in tmp_path.iterdir()] == ["png"]


def test_a_folder_of_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "png").mkdir()
    (tmp_path / "png" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"thesis\.txt"):
        write_images(tmp_path / "png", picture_frames(2))
    assert (tmp_path / "png" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize(("write", "name"), [(write_video, "o.mp4"), (write_video, "o.mov"), (write_lossless, "o.mkv")])
def test_a_failing_write_leaves_the_former_file(tmp_path, write, name):
    path = tmp_path / name
    path.write_bytes(b"former")
    frames = picture_frames(3)
    broken = np.concatenate([frames, frames])[..., :1]  # not RGB: the encoder refuses it
    with pytest.raises((ValueError, AssertionError)):
        write(path, broken, 8)
    assert path.read_bytes() == b"former"
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_disk_full_is_one_message(tmp_path, monkeypatch):
    """The partial file is a link to a device that is always full."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    (tmp_path / ".o.mp4.7.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"o\.mp4: could not be written \(No space left"):
        write_video(tmp_path / "o.mp4", picture_frames(5), 8)
    assert not (tmp_path / "o.mp4").exists()
