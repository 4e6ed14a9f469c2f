"""Small media for the tests of the dataset room."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np


def picture_frames(count: int = 9, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    """uint8 (F, H, W, 3): smooth colours that move, so that codecs have little to lose."""
    rng = np.random.default_rng(seed)
    small = rng.integers(60, 200, (3, 4, 3), dtype=np.uint8)
    base = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.stack([np.roll(base, 2 * index, axis=1) for index in range(count)])


def box_masks(count: int = 9, width: int = 64, height: int = 48) -> np.ndarray:
    """uint8 (F, H, W): a white box on black."""
    masks = np.zeros((count, height, width), np.uint8)
    masks[:, height // 4 : height // 2, width // 4 : width // 2] = 255
    return masks


def encode(
    path: Path, frames: np.ndarray, codec: str = "libx264", container: str | None = None,
    pix_fmt: str = "yuv420p", rate: Fraction | int = 30, ticks: list[int] | None = None,
    options: dict[str, str] | None = None, audio: bool = False, stream_options: dict[str, str] | None = None,
) -> Path:
    """Encode without any code of ours; `ticks` are presentation times in 1/1000 s."""
    with av.open(str(path), "w", format=container, options=options or {}) as output:
        stream = output.add_stream(codec, rate=Fraction(rate), options=stream_options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pix_fmt
        if ticks:
            stream.codec_context.time_base = Fraction(1, 1000)
        sound = output.add_stream("aac", rate=48_000, layout="mono") if audio else None
        for index, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts = ticks[index] if ticks else index
            picture.time_base = Fraction(1, 1000) if ticks else 1 / Fraction(rate)
            output.mux(stream.encode(picture))
        output.mux(stream.encode())
        if sound:
            _encode_chirp(output, sound, float(len(frames) / Fraction(rate)))
    return path


def _encode_chirp(output: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    """A rising tone: no two packets are equal."""
    for start in range(0, int(seconds * 48_000), 1024):
        t = (start + np.arange(1024)) / 48_000
        wave = (0.5 * np.sin(2 * np.pi * (200 + 300 * t) * t)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48_000, start, Fraction(1, 48_000)
        output.mux(stream.encode(frame))
    output.mux(stream.encode())


def write_folder(folder: Path, pictures: np.ndarray, suffix: str = ".png") -> Path:
    """One file per picture, RGB or grey, 00000 upwards."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(pictures):
        write_picture(folder / f"{index:05d}{suffix}", picture)
    return folder


def write_picture(path: Path, picture: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), picture[..., ::-1] if picture.ndim == 3 else picture)
    return path


def cut_short(path: Path, share: float) -> Path:
    """The first `share` of a file's bytes, beside it."""
    data = path.read_bytes()
    short = path.with_name(f"short_{path.name}")
    short.write_bytes(data[: int(len(data) * share)])
    return short
