"""Progress bars with ETA for people, silence for log files."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

PATIENCE = 1.0
"""Seconds of work before a bar appears for what is often quick."""
INTERVAL = 0.1
"""Seconds between two states of a bar."""
Item = TypeVar("Item")


def progress(total: int | None, description: str, unit: str = "it", initial: int = 0, **options: Any) -> tqdm:
    """A bar on stderr with rate and ETA; quiet when stderr is not a terminal.

    Args:
        total: None if nobody knows; the bar then has no ETA.
        options: more of tqdm's.
    """
    return tqdm(
        total=total, desc=description, unit=unit, initial=initial, disable=not sys.stderr.isatty(),
        mininterval=INTERVAL, dynamic_ncols=True, file=sys.stderr, **options,
    )


def brief(total: int | None, description: str, unit: str = "it", **options: Any) -> tqdm:
    """The same for what is often quick: the bar appears after a moment, and goes when the work is done."""
    return progress(total, description, unit, delay=PATIENCE, leave=False, **options)


def stepping(items: Iterable[Item], description: str, unit: str = "frame", total: int | None = None) -> Iterable[Item]:
    """The items, behind a `brief` bar.

    Args:
        total: their number, where `items` does not know it.
    """
    return brief(total, description, unit, iterable=items)
