"""Whether a video file is whole: FFmpeg ends a cut file early, for some formats without an error."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

_SEGMENT = 0x18538067  # Matroska element IDs
_VOID = 0xEC
_EBML = 0x1A45DFA3


def missing_mp4_bytes(path: Path) -> int:
    """How many bytes an MP4 or MOV file lacks of the size that its last box declares (ISO 14496-12 4.2)."""
    size = path.stat().st_size
    position = 0
    with open(path, "rb") as file:
        while position < size:
            file.seek(position)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length == 0:  # this box goes to the end of the file
                return 0
            position += max(length, 8)
    return position - size


def missing_matroska_bytes(path: Path) -> int:
    """How many bytes a Matroska or WebM file lacks of the size that its segment declares.

    0 also for live recordings, whose segment has no declared size (RFC 8794 section 6.2: all ones).
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        while file.tell() < size:
            element, length = _vint(file, keep_marker=True), _vint(file)
            if length is None:
                return 0
            if element == _SEGMENT:
                return max(0, file.tell() + length - size)
            if element not in (_EBML, _VOID):
                return 0
            file.seek(length, 1)
    return 0


def _vint(file: BinaryIO, keep_marker: bool = False) -> int | None:
    """One EBML variable-length integer (RFC 8794 section 4); None for the reserved "unknown" value."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    length = 9 - first[0].bit_length()
    value = int.from_bytes(first + file.read(length - 1), "big")
    if keep_marker:
        return value
    ones = (1 << 7 * length) - 1
    return None if value & ones == ones else value & ones


def gif_images(path: Path) -> int | None:
    """Number of pictures in a GIF (GIF89a specification, blocks), or None if it ends before its trailer."""
    data = path.read_bytes()
    try:
        position = 13 + _colour_table(data[10])
        images = 0
        while data[position] != 0x3B:
            kind = data[position]
            if kind == 0x2C:
                images += 1
                position += 11 + _colour_table(data[position + 9])
            elif kind == 0x21:
                position += 2
            else:
                return None
            while data[position]:
                position += data[position] + 1
            position += 1
        return images
    except IndexError:
        return None


def _colour_table(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
