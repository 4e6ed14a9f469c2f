"""Videos in: a file or a folder of images to RGB frames with true times; a cut file is an error.

Axes: F frames, H W pixels, 3 = RGB.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from common.errors import UserError
from common.files import hash_file, hash_json
from common.progress import stepping
from dataset import images
from dataset.containers import gif_images, missing_matroska_bytes, missing_mp4_bytes
from dataset.hdr import Transfer, to_standard

FORMATS = "mp4, mov, webm, mkv or gif"
FOLDER_FPS = Fraction(16)
"""Rate of a folder of images that nobody gave a rate."""
_HDR: dict[int, Transfer] = {16: "PQ", 18: "HLG"}  # AVCOL_TRC values
_WIDE = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}  # AVCOL_PRI values
_CURE = "Export or download it again, or re-encode it (ffmpeg -i IN OUT.mp4)."


@dataclass(frozen=True, eq=False)
class Video:
    """Decoded frames, or a range of them, with the facts that decoding found."""

    path: Path
    frames: np.ndarray
    """uint8 (F, H, W, 3): the frames asked for, upright."""
    times: np.ndarray
    """float64 (F,): when each frame is shown, in seconds as a player counts them."""
    first: int
    """Index in the file of `frames[0]`."""
    total: int
    """Frames in the file, counted by decoding all of them."""
    fps: Fraction
    """The constant rate of the file, or its mean rate if `variable_rate`."""
    variable_rate: bool
    has_audio: bool
    notes: tuple[str, ...]
    """What a person should know about how the file was read, one clause each."""

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.frames.shape[2], self.frames.shape[1]


def read_media(
    path: Path, first: int = 0, count: int | None = None, fps: Fraction | None = None, every: int = 1, masks: bool = False
) -> Video:
    """Read a video file, or a folder of images at `fps`; see `read_video` and `read_images`."""
    if path.is_dir():
        return read_images(path, first, count, fps, every, masks)
    return read_video(path, first, count, every, masks)


def hash_media(path: Path) -> str:
    """SHA-256 of a file's bytes, or of the bytes of a folder's images in their order."""
    if path.is_dir():
        return hash_json([hash_file(file) for file in images.image_files(path)])
    return hash_file(path)


def read_images(
    path: Path, first: int = 0, count: int | None = None, fps: Fraction | None = None, every: int = 1, masks: bool = False
) -> Video:
    """Read the pictures of a folder in natural order as a video; those that are kept must have one size.

    Which are kept is as with `read_video`.

    Args:
        masks: whether they are masks, whose shape may be in their alpha channel (`images.read_mask`).

    Raises:
        UserError: no pictures, one that cannot be read, or pictures of different sizes.
    """
    files, read = images.image_files(path), images.read_mask if masks else images.read_image
    frames: list[np.ndarray] = []
    shape: tuple[int, ...] | None = None
    for index, file in enumerate(stepping(files, f"reading {path.name}")):
        if shape and not _wanted(index, first, count, every):
            continue  # a mask for each of thousands of frames, of which a few dozen are used
        image = read(file)
        shape = shape or image.shape
        if image.shape != shape:
            raise UserError(
                f"{file}: is {_size(image.shape)}, expected {_size(shape)} as {files[0].name}. "
                "All images of a folder must have one size."
            )
        if _wanted(index, first, count, every):
            frames.append(image)
    rate = fps or FOLDER_FPS
    gap = images.numbering_gap(files)
    notes = (f"numbers jump from {gap[0]} to {gap[1]}; taken as consecutive frames",) if gap else ()
    others = sorted(file.name for file in path.iterdir() if file.name[0] != "." and file not in files)
    if others:
        notes += (f"{len(others)} other files left out ({', '.join(others[:3])})",)
    times = (first + every * np.arange(len(frames))) / float(rate)
    return Video(path, _stack(frames, shape), times, first, len(files), rate, False, False, notes)


def read_video(path: Path, first: int = 0, count: int | None = None, every: int = 1, masks: bool = False) -> Video:
    """Decode the whole file and keep `count` frames (default: all) from index `first` in steps of `every`.

    Frame counts and rates come from decoding, never from the header; rotation is applied. Colours
    follow FFmpeg's rule (BT.601 if untagged), so frames equal those that FFmpeg and (but mirrored ones) OpenCV extract; HDR
    is brought into the standard range (`hdr`).
    Fewer frames are kept where the file ends earlier; `total` tells.

    Args:
        masks: whether its frames are masks, whose shape may be in their alpha channel (`images.read_mask`).

    Raises:
        UserError: missing, empty, no video of a known format, truncated, or damaged.
    """
    _check_exists(path)
    try:
        with av.open(str(path)) as container:
            _check_whole(path, container)
            stream = container.streams.best("video")
            if stream is None:
                raise UserError(f"{path}: has no video in it, expected {FORMATS}. {_CURE}")
            return _decode(path, container, stream, first, count, every, masks)
    except av.FFmpegError as error:
        raise UserError(
            f"{path}: unreadable, truncated or damaged ({error.strerror}), expected {FORMATS}. {_CURE}"
        ) from error


def _check_exists(path: Path) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file, expected {FORMATS}, or a folder of images.")
    if not path.stat().st_size:
        raise UserError(f"{path}: is empty (0 bytes), expected {FORMATS}. {_CURE}")


def _check_whole(path: Path, container: InputContainer) -> None:
    """Refuse a file whose container says that bytes are missing, or whose format cannot say so."""
    names = container.format.name.split(",")
    size = path.stat().st_size
    if "mp4" in names:
        missing = missing_mp4_bytes(path)
    elif "matroska" in names:
        missing = missing_matroska_bytes(path)
    elif "gif" in names:
        missing = 1 if gif_images(path) is None else 0
    else:
        raise UserError(f"{path}: is {container.format.long_name}, expected {FORMATS}. Convert it.")
    if missing > 0:
        raise UserError(f"{path}: truncated: has {size} bytes, at least {missing} more expected. {_CURE}")


@dataclass
class _Tally:
    """What the packets promised, to be compared with the frames that came out."""

    frames: int = 0
    end: float = 0.0
    """Seconds at which the last packet's picture goes."""


def _decode(
    path: Path, container: InputContainer, stream: VideoStream, first: int, count: int | None, every: int, masks: bool
) -> Video:
    frames: list[np.ndarray] = []
    times: list[float] = []
    notes: dict[str, None] = {}
    shape: tuple[int, ...] | None = None
    tally = _Tally()
    begin = (container.start_time or 0) / av.time_base
    decoded = _decoded_frames(path, container, stream, tally)
    for index, frame in enumerate(stepping(decoded, f"reading {path.name}", total=stream.frames or None)):
        wanted = _wanted(index, first, count, every)
        if shape is None or wanted:
            image = _upright_rgb(frame, notes, path if masks else None)
            shape = shape or image.shape
            if image.shape != shape:
                raise UserError(
                    f"{path}: frame {index} is {_size(image.shape)}, those before it {_size(shape)}. {_CURE}"
                )
            if wanted:
                frames.append(image)
        times.append(round(frame.time - begin, 6) + 0.0)
    _check_complete(path, stream, times, tally)
    fps, variable = frame_rate(np.array(times), stream)
    kept = np.array(times[first::every][: len(frames)], dtype=np.float64)
    _describe_stream(container, stream, notes)
    has_audio = bool(container.streams.audio)
    return Video(
        path, _stack(frames, shape), kept, first, len(times), fps, variable, has_audio, tuple(notes)
    )


def _decoded_frames(
    path: Path, container: InputContainer, stream: VideoStream, tally: _Tally
) -> Iterator[av.VideoFrame]:
    stream.thread_type = "AUTO"
    index = 0
    for packet in container.demux(stream):
        tally.frames += _shown(packet, stream)
        if packet.pts is not None:
            tally.end = max(tally.end, float((packet.pts + (packet.duration or 0)) * stream.time_base))
        for frame in packet.decode():
            _check_frame(path, frame, index)
            yield frame
            index += 1


def _shown(packet: av.Packet, stream: VideoStream) -> int:
    """1 if a packet must give a frame to show: it has bytes, no edit list cuts it, VP8 does not hide it."""
    if not packet.size or packet.is_discard:
        return 0
    # RFC 6386 section 9.1: bit 4 of a VP8 frame's first byte is show_frame.
    return 0 if stream.codec_context.name == "vp8" and not bytes(packet)[0] & 0x10 else 1


def _check_frame(path: Path, frame: av.VideoFrame, index: int) -> None:
    if frame.is_corrupt:
        raise UserError(f"{path}: frame {index} is damaged. {_CURE}")
    if frame.time is None:
        raise UserError(f"{path}: frame {index} has no time stamp. {_CURE}")
    if frame.rotation % 90:
        raise UserError(f"{path}: turns its frames by {frame.rotation} degrees, not by right angles. {_CURE}")


def _check_complete(path: Path, stream: VideoStream, times: list[float], tally: _Tally) -> None:
    """Refuse a video of which fewer frames came out than its packets or its stream tag promised."""
    if not times and not tally.frames:
        raise UserError(f"{path}: shows no frame: its video is empty, or its edit list cuts all of it. {_CURE}")
    if len(times) < tally.frames:
        raise UserError(
            f"{path}: truncated or damaged: {len(times)} frames could be decoded, "
            f"expected {tally.frames}. {_CURE}"
        )
    # Damage inside a Matroska file can make FFmpeg stop early; this tag holds the stream's full length.
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
    if tag is None:
        return
    declared = int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    longest = float(np.diff(times).max()) if len(times) > 1 else tally.end
    if tally.end + 2.5 * longest < declared:
        raise UserError(f"{path}: damaged: ends at {tally.end:.3f} s, expected {declared:.3f} s. {_CURE}")


def _upright_rgb(frame: av.VideoFrame, notes: dict[str, None], masks: Path | None) -> np.ndarray:
    """uint8 (H, W, 3), turned as the file's display matrix says; `masks` is the file's path if it holds such."""
    if frame.rotation:
        notes[f"turned upright by {frame.rotation % 360} degrees, as the file says"] = None
    if frame.colorspace == 2 and "yuv" in frame.format.name:
        notes["no colour matrix in the file: read as BT.601, as FFmpeg and OpenCV do"] = None
    if frame.interlaced_frame:
        notes["interlaced: what moves shows combs, unless you make it progressive (ffmpeg -i IN -vf bwdif OUT.mp4)"] = None
    if frame.color_primaries in _WIDE and frame.color_trc not in _HDR:
        notes[f"colours of {_WIDE[frame.color_primaries]} taken for BT.709's: looks a little pale"] = None
    picture = _picture(frame, notes, masks)
    if _is_mirrored(frame):
        notes["mirrored, as the file says"] = None
        picture = picture[::-1]  # what is left is a rotation: it is measured by the picture's horizontal edge
    return np.ascontiguousarray(np.rot90(picture, frame.rotation // 90))


def _picture(frame: av.VideoFrame, notes: dict[str, None], masks: Path | None) -> np.ndarray:
    """uint8 (H, W, 3) of the standard range, or of a mask's shape, as it is stored."""
    if any(component.is_alpha for component in frame.format.components):
        if masks:
            return images.shape_of(frame.to_ndarray(format="bgra"), masks)
        if frame.to_ndarray(format="rgba")[..., 3].min() < 255:
            notes["has transparent pixels: the colours under them are used"] = None
    transfer = _HDR.get(frame.color_trc)
    if transfer is None:
        return frame.to_ndarray(format="rgb24")
    notes[f"HDR ({transfer}) brought into the standard range (BT.709): a result is in that, too"] = None
    return to_standard(frame.to_ndarray(format="rgb48le"), transfer)


def _is_mirrored(frame: av.VideoFrame) -> bool:
    """Whether the display matrix mirrors the picture, as that of a front camera may; `frame.rotation` does not tell."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False
    right, down = np.frombuffer(matrix, np.int32).reshape(3, 3)[:2, :2].astype(float)
    return right[0] * down[1] < right[1] * down[0]


def _describe_stream(container: InputContainer, stream: VideoStream, notes: dict[str, None]) -> None:
    aspect = stream.sample_aspect_ratio
    if aspect and aspect != 1:
        notes[f"its pixels are not square ({aspect}); taken as square: the result looks squeezed"] = None
    if len(container.streams.video) > 1:
        notes[f"{len(container.streams.video)} video streams: used number {stream.index}"] = None


def frame_rate(times: np.ndarray, stream: VideoStream) -> tuple[Fraction, bool]:
    """(rate, whether it varies) from the frames' times; the header's rate only where it agrees."""
    rates = [rate for rate in (stream.average_rate, stream.guessed_rate) if rate]
    if len(times) < 2:
        return (nice_rate(float(rates[0])) if rates else FOLDER_FPS), False
    mean = Fraction((len(times) - 1) / (times[-1] - times[0])) if times[-1] > times[0] else FOLDER_FPS
    steps = np.diff(times)
    # Containers round times to ticks (mkv 1 ms, gif 10 ms): that alone is no variable rate.
    tick = max(float(stream.time_base), 1.5e-3)
    if steps.max() - steps.min() > tick * 1.01:
        return mean.limit_denominator(1000), True
    # n frames' span is off by one tick at most.
    near = [rate for rate in rates if abs(float((len(times) - 1) / rate) - (times[-1] - times[0])) <= tick]
    return nice_rate(float(near[0] if near else mean)), False


def nice_rate(fps: float) -> Fraction:
    """The fraction meant by a decimal rate: 23.976 is 24000/1001, 29.97 is 30000/1001, 12.5 is 25/2."""
    ntsc = fps * 1.001
    if abs(ntsc - round(ntsc)) < 1e-3 < abs(fps - round(fps)):
        return Fraction(round(ntsc) * 1000, 1001)
    return Fraction(fps).limit_denominator(1000)


def _wanted(index: int, first: int, count: int | None, every: int) -> bool:
    steps, rest = divmod(index - first, every)
    return steps >= 0 and rest == 0 and (count is None or steps < count)


def _stack(frames: list[np.ndarray], shape: tuple[int, ...] | None) -> np.ndarray:
    """(F, H, W, 3), also where no frame is in the range asked for."""
    assert shape is not None, "readers raise before they return no frame at all"
    return np.stack(frames) if frames else np.empty((0, *shape), np.uint8)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
