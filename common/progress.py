"""Progress with rate and ETA: bars on a terminal, now and then a line in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

PATIENCE = 1.0
"""Seconds of work before a bar appears for what is often quick."""
INTERVAL = 0.1
"""Seconds between two states of a bar."""
LINE_INTERVAL = 30.0
"""Seconds between two lines in a log file, and before the first: what is done sooner leaves none."""
_LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
Item = TypeVar("Item")


def progress(total: int | None, description: str, unit: str = "it", initial: int = 0, **options: Any) -> tqdm:
    """A bar on stderr with rate and ETA; lines where stderr is no terminal, as under nohup, Slurm, Docker or in a notebook.

    Args:
        total: None if nobody knows; the bar then has no ETA.
        options: more of tqdm's.
    """
    shown: dict[str, Any] = {"mininterval": INTERVAL, "dynamic_ncols": True, "file": sys.stderr}
    if not sys.stderr.isatty():
        # With `miniters` tqdm's watching thread leaves the lines alone.
        shown = {
            "mininterval": LINE_INTERVAL, "miniters": 1, "delay": LINE_INTERVAL, "bar_format": _LINE,
            "file": _Lines(sys.stderr),
        }  # fmt: skip
    return tqdm(total=total, desc=description, unit=unit, initial=initial, **options | shown)


class _Lines:
    """A text stream in which each state of a bar is a line of its own, and the last, which tqdm writes twice, but one."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.count = ""

    def write(self, text: str) -> None:
        count = text.strip().partition(" [")[0]
        if count and count != self.count:
            self.stream.write(f"{text.strip()}\n")
            self.count = count

    def flush(self) -> None:
        self.stream.flush()


def brief(total: int | None, description: str, unit: str = "it", **options: Any) -> tqdm:
    """The same for what is often quick: the bar appears after a moment, and goes when the work is done."""
    return progress(total, description, unit, delay=PATIENCE, leave=False, **options)


def stepping(items: Iterable[Item], description: str, unit: str = "frame", total: int | None = None) -> Iterable[Item]:
    """The items, behind a `brief` bar.

    Args:
        total: their number, where `items` does not know it.
    """
    return brief(total, description, unit, iterable=items)
