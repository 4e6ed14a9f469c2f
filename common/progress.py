"""Progress bars with ETA for people, silence for log files."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, description: str, unit: str = "it", initial: int = 0, **options: Any) -> tqdm:
    """A bar on stderr with rate and ETA; quiet when stderr is not a terminal."""
    return tqdm(
        total=total, desc=description, unit=unit, initial=initial, disable=not sys.stderr.isatty(),
        dynamic_ncols=True, file=sys.stderr, **options,
    )
