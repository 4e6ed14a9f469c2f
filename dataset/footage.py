"""What in a clip stands in the way of an edit: cuts, and frames that repeat the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

THUMBNAIL = (48, 27)
"""Width and height at which frames are compared: grain and compression vanish, what moves does not."""
CUT, STANDS_OUT = 15.0, 4.0
"""Grey levels by which a frame must differ on average from the one before, and times as much as its neighbours do."""
MOVES, STILL = 3.0, 0.15
"""Grey levels by which the liveliest places of a clip must change for it to move, and what share of that is no motion."""
_SHOWN = 4


def notes(frames: np.ndarray, first: int = 0, every: int = 1) -> Iterator[str]:
    """One clause for each hindrance, and what to do about it.

    Args:
        frames: uint8 (F, H, W, 3), those that are used.
        first, every: number in the source of the first of them, and the step to the next.
    """
    if len(frames) < 3:
        return
    thumbnails = np.stack([cv2.resize(frame, THUMBNAIL, interpolation=cv2.INTER_AREA) for frame in frames])
    steps = np.abs(np.diff(thumbnails.astype(np.float32), axis=0)).max(axis=-1).reshape(len(frames) - 1, -1)
    if found := [first + every * index for index in cuts(steps)]:
        yield (f"looks cut before frame {_listed(found)}: an edit follows one shot. Choose `start` and `frames` within one, "
               "unless this is a flash")
    if found := [first + every * index for index in repeats(steps)]:
        yield (f"{len(found)} frames repeat the one before ({_listed(found)}): its motion stutters, and so will an edit's. "
               "Leave them out: `every` = 2 if each second one repeats, else "
               "ffmpeg -i IN -vf mpdecimate,setpts=N/FRAME_RATE/TB OUT.mp4")


def cuts(steps: np.ndarray) -> list[int]:
    """Frames that begin another shot: they differ from the one before far more than that and the next one do from theirs.

    Args:
        steps: (F - 1, places), by how many grey levels each frame differs from the one before.
    """
    sizes = steps.mean(axis=1)
    around = np.pad(sizes, 1)
    calm = np.maximum(np.maximum(around[:-2], around[2:]), 1)
    return [int(index) + 1 for index in np.flatnonzero((sizes > CUT) & (sizes > STANDS_OUT * calm))]


def repeats(steps: np.ndarray) -> list[int]:
    """Frames that show what the one before did, if there are several and the others move; `steps` as in `cuts`."""
    liveliest = np.percentile(steps, 98, axis=1)
    usual = np.percentile(liveliest, 75)
    same = np.flatnonzero(liveliest < STILL * usual) + 1
    several = len(same) >= max(3, 0.08 * len(steps))
    return [int(index) for index in same] if usual >= MOVES and several else []


def _listed(numbers: Sequence[int]) -> str:
    more = ", ..." if len(numbers) > _SHOWN else ""
    return ", ".join(map(str, numbers[:_SHOWN])) + more
