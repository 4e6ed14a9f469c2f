"""Videos out: H.264 for people, ProRes for their editing programs (both with the source's audio), ffv1 or PNG without loss; all
atomic.

Axes: F frames, H W pixels, 3 = RGB.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

from common.errors import UserError
from common.files import atomic_path
from common.progress import stepping
from dataset.images import write_png
from dataset.video import nice_rate

_TICKS = Fraction(1, 90_000)  # clock of a variable-rate result
_BLOCK = 16  # side in pixels of what encoders work on at once


@dataclass(frozen=True)
class _Kind:
    """What the end of a file's name stands for."""

    container: str
    codec: str
    pixels: str
    options: dict[str, str]
    audio: frozenset[str]
    """Codecs whose packets may go into it as they are."""
    even: bool = False
    """Whether its sides must be."""


_COMPRESSED = {"aac", "mp3", "ac3", "eac3", "alac"}
_PCM = {f"pcm_{kind}" for kind in ("s16le", "s16be", "s24le", "s24be", "s32le", "s32be", "f32le", "f32be")}
_KINDS = {
    ".mp4": _Kind("mp4", "libx264", "yuv420p", {"preset": "medium"}, frozenset(_COMPRESSED | {"opus", "flac"}), even=True),
    # "apl0" is what Apple's own encoder signs with: some programs take no other.
    ".mov": _Kind("mov", "prores_ks", "yuv444p10le", {"profile": "4444", "vendor": "apl0", "bits_per_mb": "8000"},
                  frozenset(_COMPRESSED | _PCM)),
}  # fmt: skip


def write_video(
    path: Path,
    frames: np.ndarray,
    fps: Fraction | float,
    *,
    times: Sequence[float] | np.ndarray | None = None,
    audio_from: Path | None = None,
    audio_start: float = 0.0,
    audio_seconds: float | None = None,
    crf: int = 16,
) -> list[str]:
    """Write a video for people, converted to and tagged as BT.709; the end of the path's name says which.

    `.mp4` is H.264 yuv420p, which every player and browser shows; `.mov` ProRes 4444, which editing programs take and whose
    pixels hardly differ from those given.

    Args:
        frames: uint8 (F, H, W, 3). Odd sizes of an mp4 are padded by one repeated row or column.
        fps: frames per second; a decimal like 29.97 is taken as the fraction it stands for.
        times: seconds of each frame, for a variable rate; the first frame is shown at 0 all the same.
        audio_from: file whose first audio stream is copied, packet by packet, without encoding it again.
        audio_start: seconds in that file (as a player counts) that belong to the first frame.
        audio_seconds: length of the audio to copy; default: as long as the frames last.
        crf: x264's quality, lower is better; of an mp4.

    Returns:
        One sentence for each thing that a person should know: padding, audio copied or left out.

    Raises:
        UserError: the disk is full, the folder cannot be written, or the audio file cannot be read.
    """
    kind = _KINDS[path.suffix]
    rate = nice_rate(float(fps)) if isinstance(fps, float) else Fraction(fps)
    height, width = frames.shape[1:3]
    size = (even_size(width), even_size(height)) if kind.even else (width, height)
    notes = []
    if size != (width, height):
        notes.append(f"{path.name}: padded from {width}x{height} to even {size[0]}x{size[1]}.")
    seconds = audio_seconds if audio_seconds is not None else _duration(len(frames), rate, times)
    with ExitStack() as stack:
        audio = _open_audio(stack, audio_from, kind, notes) if audio_from else None
        partial = stack.enter_context(atomic_path(path))
        output = stack.enter_context(
            av.open(str(partial), "w", format=kind.container, options={"movflags": "faststart"})
        )
        options = kind.options | ({"crf": str(crf)} if kind.codec == "libx264" else {})
        video = _add_video(output, kind, options, size, rate, times)
        sound = output.add_stream_from_template(audio) if audio else None
        _encode(output, video, frames, _ticks(len(frames), rate, times), path.name)
        if audio and sound:
            copied = _copy_audio(output, audio, sound, audio_start, seconds)
            notes.append(f"{path.name}: audio copied from {audio_from} ({copied} packets).")
    return notes


def write_lossless(path: Path, frames: np.ndarray, fps: Fraction | float) -> None:
    """Write uint8 (F, H, W, 3) as ffv1/bgr0 in Matroska: reading it gives back the same bytes."""
    rate = nice_rate(float(fps)) if isinstance(fps, float) else Fraction(fps)
    with atomic_path(path) as partial, av.open(str(partial), "w", format="matroska") as output:
        stream = output.add_stream("ffv1", rate=rate)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "bgr0"
        for index, frame in enumerate(stepping(frames, f"writing {path.name}")):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            picture = picture.reformat(format="bgr0")
            picture.pts, picture.time_base = index, 1 / rate
            output.mux(stream.encode(picture))
        output.mux(stream.encode())


def write_images(folder: Path, frames: np.ndarray | Sequence[np.ndarray]) -> None:
    """Write uint8 (F, H, W, 3) or grey (F, H, W) as 00000.png, 00001.png ...; the folder appears whole.

    Frames written there before are replaced. A sequence of frames does as well as an array.

    Raises:
        UserError: the folder holds anything else than such frames, or cannot be written.
    """
    others = [file.name for file in folder.iterdir() if not re.fullmatch(r"\d{5}\.png", file.name)] \
        if folder.exists() else []
    if others:
        raise UserError(f"{folder}: holds {others[0]}, expected an empty or new folder. Choose another one.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    former = folder.with_name(f".{folder.name}.{os.getpid()}.former")
    try:
        for index, frame in enumerate(stepping(frames, f"writing {folder.name}")):
            write_png(partial / f"{index:05d}.png", frame)
        if folder.exists():
            folder.rename(former)
        partial.rename(folder)
    except OSError as error:
        if former.exists() and not folder.exists():
            former.rename(folder)
        raise UserError(f"{folder}: could not be written ({error.strerror}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def even_size(side: int) -> int:
    """Width or height of an mp4 for frames of `side` pixels: yuv420p halves both."""
    return side + side % 2


def _duration(count: int, rate: Fraction, times: Sequence[float] | np.ndarray | None) -> float:
    if times is None or count < 2:
        return float(count / rate)
    return float(times[-1] - times[0]) * count / (count - 1)


def _ticks(count: int, rate: Fraction, times: Sequence[float] | np.ndarray | None) -> list[int]:
    """Presentation time of each frame in units of the stream's clock."""
    if times is None:
        return list(range(count))
    return [round((float(time) - float(times[0])) / _TICKS) for time in times]


def _add_video(
    output: OutputContainer, kind: _Kind, options: dict[str, str], size: tuple[int, int], rate: Fraction,
    times: Sequence[float] | np.ndarray | None,
) -> VideoStream:
    stream = output.add_stream(kind.codec, rate=rate, options=options)
    (stream.width, stream.height), stream.pix_fmt = size, kind.pixels
    codec = stream.codec_context
    codec.time_base = 1 / rate if times is None else _TICKS
    codec.colorspace, codec.color_primaries, codec.color_trc = 1, ColorPrimaries.BT709, ColorTrc.BT709
    codec.color_range = ColorRange.MPEG
    return stream


def _encode(output: OutputContainer, stream: VideoStream, frames: np.ndarray, ticks: list[int], name: str) -> None:
    shown = stepping(zip(frames, ticks, strict=True), f"writing {name}", total=len(frames))
    for frame, tick in shown:
        picture = _converted(frame, (stream.width, stream.height), stream.pix_fmt)
        picture.pts, picture.time_base = tick, stream.codec_context.time_base
        output.mux(stream.encode(picture))
    output.mux(stream.encode())


def _converted(frame: np.ndarray, size: tuple[int, int], pixels: str) -> av.VideoFrame:
    """A picture for the encoder, whose last row and column are repeated up to `size`, and on to a multiple of 16.

    swscale and FFmpeg's ProRes encoder read beyond the right border of other widths, into memory that nobody has written.
    """
    height, width = frame.shape[:2]
    whole = [-(-side // _BLOCK) * _BLOCK for side in size]
    padded = np.pad(frame, ((0, whole[1] - height), (0, whole[0] - width), (0, 0)), mode="edge")
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(padded), format="rgb24").reformat(
        format=pixels, dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG,
    )
    if whole == list(size):
        return picture
    part = av.VideoFrame(*size, pixels)
    for from_plane, to_plane in zip(picture.planes, part.planes, strict=True):
        source = np.frombuffer(from_plane, np.uint8).reshape(from_plane.height, from_plane.line_size)
        target = np.zeros((to_plane.height, to_plane.line_size), np.uint8)
        shared = min(source.shape[1], target.shape[1])
        target[:, :shared] = source[: len(target), :shared]
        to_plane.update(target.tobytes())
    part.colorspace, part.color_range = Colorspace.ITU709, ColorRange.MPEG
    return part


def _open_audio(stack: ExitStack, path: Path, kind: _Kind, notes: list[str]) -> AudioStream | None:
    """The first audio stream of a file, or None with a note that says why."""
    try:
        container = stack.enter_context(av.open(str(path)))
    except av.FFmpegError as error:
        raise UserError(f"{path}: its audio could not be read ({error.strerror}).") from error
    stream = container.streams.best("audio")
    if stream is None:
        return None
    name = stream.codec_context.name
    if name not in kind.audio:
        others = [other.container for other in _KINDS.values() if name in other.audio]
        cure = f" Into {others[0]} it does." if others else ""
        notes.append(f"{path}: audio left out: {name} does not go into {kind.container} as it is.{cure}")
        return None
    return stream


def _copy_audio(
    output: OutputContainer, source: AudioStream, target: AudioStream, start: float, seconds: float
) -> int:
    """Copy the packets that begin within the span, moved so that `start` becomes 0; return their number."""
    origin = (source.container.start_time or 0) / av.time_base
    shift = round((origin + start) / source.time_base)
    copied = 0
    for packet in source.container.demux(source):
        if packet.pts is None:
            continue
        if 0 <= packet.pts - shift < seconds / source.time_base:
            packet.pts, packet.dts = packet.pts - shift, packet.pts - shift
            packet.stream = target
            output.mux(packet)
            copied += 1
    return copied
