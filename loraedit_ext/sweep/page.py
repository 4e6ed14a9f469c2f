"""One HTML page over a sweep: a sortable table of all trials, each with a small video."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from common.files import write_text_atomic
from dataset.resize import Grid, fit
from dataset.video import read_media
from loraedit_ext.editing.results import EDITED
from loraedit_ext.evaluation.catalogue import BY_KEY
from loraedit_ext.evaluation.pages import Film, environment, place_films
from loraedit_ext.sweep.results import columns, text

PAGE, TEMPLATE, VIDEOS = "results.html", "sweep.html.j2", "results_videos"
AREA = 208 * 120
"""Pixels of a frame of a small video."""
CRF = 26


def write_page(folder: Path, entries: Sequence[dict[str, Any]]) -> Path:
    """Write results.html; the videos are part of it, or beside it if they are too large together.

    Args:
        entries: of results.json.
    """
    parameters, measures = columns(entries)
    films = ((entry["name"], film) for entry in entries if (film := small_video(entry)))
    videos = place_films(folder, VIDEOS, films)
    page = environment(Path(__file__).parent).get_template(TEMPLATE).render(
        entries=entries, parameters=parameters, measures=measures, videos=videos, text=text,
        arrows={key: BY_KEY[key].arrow for key in measures if key in BY_KEY},
        titles={key: BY_KEY[key].title for key in measures if key in BY_KEY},
    )  # fmt: skip
    write_text_atomic(folder / PAGE, page)
    return folder / PAGE


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
