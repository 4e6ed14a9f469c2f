"""Still pictures: one image file in or out, 8 or 16 bit, in the order that people number them."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np

from common.errors import UserError
from common.files import write_atomic
from dataset.profiles import in_srgb

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
ONE_COLOUR = 24
"""Grey levels that lossy coding and smooth edges leave between pixels of one colour, and between the channels of grey."""


def read_image(path: Path) -> np.ndarray:
    """Read a picture as uint8 (H, W, 3) in sRGB; 16-bit values are rounded to 8 bits.

    As viewers do, a JPEG is turned upright by its EXIF tag (other formats are taken as stored), and colours follow the
    picture's profile.

    Raises:
        UserError: the file is missing, empty, truncated, no picture of a known format, or transparent.
    """
    image = _read(path)
    if _is_transparent(image):
        raise UserError(f"{path}: has transparent pixels, expected an opaque picture. Flatten it.")
    return in_srgb(_rgb(image), path)


def read_mask(path: Path) -> np.ndarray:
    """Read a picture of a shape as `read_image` does, also one whose shape is in its alpha channel.

    Image editors write the latter for a shape that is painted in one colour on a transparent layer; its alpha becomes the grey.

    Raises:
        UserError: as `read_image`; or what is not transparent has several colours.
    """
    return shape_of(_read(path), path)


def shape_of(image: np.ndarray, path: Path) -> np.ndarray:
    """The same of pixels as OpenCV orders channels, uint8 (H, W), (H, W, 3) or (H, W, 4), out of a file."""
    if not _is_transparent(image):
        return _rgb(image)
    visible = image[image[..., 3] >= 128][:, :3]
    if len(visible) and (visible.max(0) - visible.min(0)).max() > ONE_COLOUR:
        raise UserError(f"{path}: has transparent pixels and several colours, so its shape may be in either. Paint it in one "
                        "colour on a transparent layer, or white on black without transparency.")  # fmt: skip
    return cv2.cvtColor(np.ascontiguousarray(image[..., 3]), cv2.COLOR_GRAY2RGB)


def _is_transparent(image: np.ndarray) -> bool:
    return image.ndim == 3 and image.shape[2] == 4 and image[..., 3].min() < 255


def _rgb(image: np.ndarray) -> np.ndarray:
    """Of OpenCV's grey, BGR or BGRA."""
    return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB) if image.ndim == 2 else np.ascontiguousarray(image[..., 2::-1])


def _read(path: Path) -> np.ndarray:
    """uint8 (H, W), (H, W, 3) or (H, W, 4), as OpenCV orders channels."""
    image = _decode(path)
    if image.dtype == np.uint16:
        image = ((image.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if image.dtype != np.uint8:
        raise UserError(f"{path}: has {image.dtype} pixels, expected 8 or 16 bits a channel. Convert it.")
    return image


def _decode(path: Path) -> np.ndarray:
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: is not a picture ({', '.join(sorted(SUFFIXES))}).")
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: could not be read ({error.strerror}), expected a picture.") from error
    # IMREAD_UNCHANGED ignores EXIF and keeps alpha; a JPEG has EXIF and no alpha, whatever its name ends in.
    jpeg = data[:3].tobytes() == b"\xff\xd8\xff"
    image = cv2.imdecode(data, cv2.IMREAD_COLOR if jpeg else cv2.IMREAD_UNCHANGED) if data.size else None
    if image is None or (image.ndim == 3 and image.shape[2] not in (3, 4)):
        found = "unreadable or truncated" if data.size else "empty"
        raise UserError(f"{path}: is {found}, expected a whole picture. Export it again.")
    return image


def channel_range(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest channel of each pixel, (H, W, 3) -> (H, W); numpy takes ten times as long along so short an axis."""
    one, two, three = cv2.split(picture)
    return cv2.min(cv2.min(one, two), three), cv2.max(cv2.max(one, two), three)


def write_png(path: Path, image: np.ndarray) -> None:
    """Write uint8 (H, W, 3) RGB or (H, W) grey as PNG, atomically and without loss."""
    data = as_png(image)
    write_atomic(path, lambda partial: partial.write_bytes(data) and None)


def as_png(image: np.ndarray) -> bytes:
    """The bytes of that file."""
    pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
    ok, data = cv2.imencode(".png", pixels)
    assert ok, "PNG encodes every uint8 picture"
    return data.tobytes()


def image_files(folder: Path) -> list[Path]:
    """The pictures of a folder in natural order: `2.png` before `10.png`; hidden files are left out.

    Raises:
        UserError: the folder holds no picture, or two pictures of the same stem.
    """
    files = [file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != "."]
    if not files:
        raise UserError(f"{folder}: holds no pictures ({', '.join(sorted(SUFFIXES))}).")
    stems: dict[str, Path] = {}
    for file in sorted(files, key=natural_key):
        if file.stem in stems:
            raise UserError(f"{folder}: {stems[file.stem].name} and {file.name} claim one frame. Keep one.")
        stems[file.stem] = file
    return list(stems.values())


def natural_key(path: Path) -> list[tuple[int, int, str]]:
    """Sort key of a file name by which numbers compare as numbers."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts]


def numbering_gap(files: list[Path]) -> tuple[int, int] | None:
    """The first two neighbours whose last numbers are not consecutive, or None."""
    found = [re.findall(r"\d+", file.stem) for file in files]
    if not all(found):
        return None
    numbers = [int(digits[-1]) for digits in found]
    return next(((a, b) for a, b in pairwise(numbers) if b != a + 1), None)
