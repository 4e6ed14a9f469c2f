"""What HTML pages of results share: the templates' environment, and videos that are part of a page or lie beside it."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import jinja2
import numpy as np

from dataset.video_writer import write_video

EMBED_BYTES = 20_000_000
"""Videos of more than this in all lie beside the page: base64 costs a third more, and browsers hold copies."""


@dataclass(frozen=True)
class Film:
    """A video for a page."""

    frames: np.ndarray
    """uint8 (F, H, W, 3)."""
    fps: Fraction
    crf: int
    """Of H.264."""


def environment(*folders: Path) -> jinja2.Environment:
    """Templates of these folders, and of this one."""
    loader = jinja2.FileSystemLoader([*folders, Path(__file__).parent])
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def place_films(folder: Path, beside: str, films: Iterable[tuple[str, Film]]) -> dict[str, str]:
    """Write videos for a page and tell what its `src` are: the films themselves, or files if they are too large together.

    Args:
        folder: of the page.
        beside: name of the folder in it for the files; what it held before is removed, and it is only there if needed.
        films: by a name that can be a file's.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".films-") as partial:
        files = {}
        for name, film in films:
            files[name] = Path(partial) / f"{name}.mp4"
            write_video(files[name], film.frames, film.fps, crf=film.crf)
        embedded = sum(file.stat().st_size for file in files.values()) <= EMBED_BYTES
        shutil.rmtree(folder / beside, ignore_errors=True)
        if not embedded:
            shutil.copytree(partial, folder / beside)
        return {name: _data_uri(file) if embedded else f"{beside}/{file.name}" for name, file in files.items()}


def _data_uri(file: Path) -> str:
    return "data:video/mp4;base64," + base64.b64encode(file.read_bytes()).decode()
