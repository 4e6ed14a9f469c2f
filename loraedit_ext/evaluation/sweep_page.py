"""One HTML page over a sweep: a sortable table of all trials, each with a small video."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_text_atomic
from dataset.resize import Grid, fit
from dataset.video import read_media
from dataset.video_writer import write_video
from loraedit_ext.evaluation.catalogue import BY_KEY
from loraedit_ext.evaluation.report import EMBED_BYTES, data_uri, environment
from loraedit_ext.results import EDITED
from loraedit_ext.sweep_results import columns, text

PAGE, TEMPLATE, VIDEOS = "results.html", "sweep.html.j2", "results_videos"
AREA = 208 * 120
"""Pixels of a frame of a small video."""
CRF = 26


@dataclass(frozen=True)
class Film:
    """A video for a page."""

    frames: np.ndarray
    """uint8 (F, H, W, 3)."""
    fps: Fraction
    crf: int
    """Of H.264."""


def write_page(folder: Path, entries: Sequence[dict[str, Any]]) -> Path:
    """Write results.html; the videos are part of it, or beside it if they are too large together.

    Args:
        entries: of results.json.
    """
    parameters, measures = columns(entries)
    films = ((entry["name"], film) for entry in entries if (film := small_video(entry)))
    videos = place_films(folder, VIDEOS, films)
    page = environment().get_template(TEMPLATE).render(
        entries=entries, parameters=parameters, measures=measures, videos=videos, text=text,
        arrows={key: BY_KEY[key].arrow for key in measures if key in BY_KEY},
        titles={key: BY_KEY[key].title for key in measures if key in BY_KEY},
    )  # fmt: skip
    write_text_atomic(folder / PAGE, page)
    return folder / PAGE


def place_films(folder: Path, beside: str, films: Iterable[tuple[str, Film]]) -> dict[str, str]:
    """Write videos for a page and tell what its `src` are: the films themselves, or files if they are too large together.

    Args:
        folder: of the page.
        beside: name of the folder in it for the files; what it held before is removed.
        films: by a name that can be a file's.
    """
    shutil.rmtree(folder / beside, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".results-") as partial:
        files = {}
        for name, film in films:
            files[name] = Path(partial) / f"{name}.mp4"
            write_video(files[name], film.frames, film.fps, crf=film.crf)
        embedded = sum(file.stat().st_size for file in files.values()) <= EMBED_BYTES
        if not embedded:
            shutil.copytree(partial, folder / beside)
        return {name: data_uri(file) if embedded else f"{beside}/{file.name}" for name, file in files.items()}


def small_video(entry: dict[str, Any]) -> Film | None:
    """The trial's edit, scaled down, or None where it has none."""
    edit = Path(entry["edit"] or "")
    found = next((edit / name for name in EDITED.values() if (edit / name).exists()), None)
    if not entry["edit"] or found is None:
        return None
    video = read_media(found)
    height, width = video.frames.shape[1:3]
    size = (width, height)
    small = fit(size, Grid(size_step=2, max_area=AREA).default_size(size)) if width * height > AREA else None
    frames = small.frames(video.frames) if small else video.frames
    return Film(np.ascontiguousarray(frames), Fraction(video.fps), CRF)
