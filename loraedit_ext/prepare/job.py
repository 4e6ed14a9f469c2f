"""Makes an edit job of a video: the frames to edit, then the mask that follows the edit, and the TOMLs of job and run.

Two calls, as a person works: without an edited picture only the frames to edit are written; with one, all else.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from common.errors import UserError
from common.progress import stepping
from common.settings import read_toml
from dataset import footage
from dataset.images import SUFFIXES, write_png
from dataset.resize import box_around
from dataset.video import Video
from dataset.video_writer import write_video
from loraedit_ext import difference, masks
from loraedit_ext.editing.pictures import contact_sheet, overlaid
from loraedit_ext.prepare.folder import JobFolder
from loraedit_ext.prepare.given import read_clip, read_given, read_grey
from loraedit_ext.prepare.outlines import track_of
from loraedit_ext.prepare.prompts import prompts_of
from loraedit_ext.prepare.regions import Region, filled, widened
from loraedit_ext.prepare.request import Request
from loraedit_ext.prepare.tomls import EDIT, JOB, MASK, job_toml, no_longer_there, plan_tomls
from loraedit_ext.prepare.tracking import Track, track

if TYPE_CHECKING:
    from loraedit_ext.prepare.sam import Sam2

FRAME, PREVIEW, SHEET = "frame.png", "preview.mp4", "preview.png"
_CAPTIONS = {
    "caption": "an old man exercising in a park",
    "edited_caption": "an old man with a white helmet exercising in a park",
}


class _Words(NamedTuple):
    """What a doubtful track is called, and its cure."""

    gone: str
    doubtful: str
    cure: str


_WORDS = {
    False: _Words("the region has left the picture", "the motion is unclear", "--box FRAME:LEFT,TOP,WIDTH,HEIGHT"),
    True: _Words(
        "SAM 2 sees no object there: it is hidden, has left the picture, or is lost", "the outline changes at once",
        "--click FRAME:X,Y on the object (and --not FRAME:X,Y off it)",
    ),
}  # fmt: skip
"""By whether SAM 2 followed the region."""


def prepare(request: Request, sam: Sam2 | None = None) -> list[str]:
    """Write what can be written; returns what a person should know, a line each.

    Args:
        request: the call.
        sam: its checkpoint, where that is loaded already.

    Raises:
        UserError: media that cannot be read or do not fit together, a region that cannot be found, a folder that cannot be
            made, or a TOML in it that a person edited and that contradicts the call.
    """
    request.check()
    clip = read_clip(request)
    last = request.in_source(len(clip.frames) - 1)
    steps = f" in steps of {request.every}" if request.every > 1 else ""
    lines = [f"clip      {request.source.name}: frames {request.start} to {last}{steps} of "
             f"{clip.total}, {clip.size[0]}x{clip.size[1]}",
             *(f"note      {clip.path.name}: {note}"
               for note in (*clip.notes, *footage.notes(clip.frames, request.start, request.every)))]  # fmt: skip
    given = read_given(request, clip)
    edited, keys = given.edited, given.regions
    lines += [f"note      {each}" for each in given.told]
    folder = JobFolder(request.out, request.overwrite, {*request.edited.values(), *request.painted.values()})
    if not (keys or request.clicks or request.background):
        folder.make()
        with folder.writing():
            lines += _write_frames(request, folder, clip)
        return [*lines, *_kept(folder), *_next(request, folder)]
    aligned = {frame: _aligned_name(frame) for frame in sorted(given.aligned)}
    request = replace(request, edited={**request.edited, **{frame: folder.path / name for frame, name in aligned.items()}})
    texts = plan_tomls(request, folder, len(clip.frames))
    by_hand = _masks_by_hand(request, folder, clip)
    follow = _follower(request, clip, edited, keys, sam)
    captions = _captions(request, clip, edited) if JOB in texts else {}
    if captions:
        texts[JOB] = job_toml(replace(request, **captions), len(clip.frames))
    folder.make(MASK)
    tracked = follow()
    grey = _masks(tracked, request.margin)
    for frame, painted in by_hand.items():
        grey[frame] = painted
    lines += _told(request, keys, tracked, grey, by_hand)
    lines += [f"caption   {'edited: ' if key == 'edited_caption' else ''}{words}" for key, words in captions.items()]
    for frame, picture in edited.items():
        lines += _lost(frame, clip.frames[frame], picture, grey[frame])
    with folder.writing():
        lines += _write_frames(request, folder, clip)
        lines += _write_aligned(folder, aligned, edited)
        lines += _write_masks(request, folder, clip, grey)
        lines += _write_previews(folder, clip, edited, grey)
        lines += _write_tomls(folder, texts)
    return [*lines, *_kept(folder), *_next(request, folder)]


def _follower(
    request: Request, clip: Video, edited: Mapping[int, np.ndarray], keys: Mapping[int, Region], loaded: Sam2 | None
) -> Callable[[], Track]:
    """What follows the regions, ready to go: optical flow or SAM 2, whose prompts and weights are in order."""
    if request.sam is None:
        return lambda: track(clip.frames, keys)
    prompts = prompts_of(request, keys)
    from loraedit_ext.prepare.sam import Sam2  # transformers takes seconds

    sam = loaded or Sam2(request.sam)
    found = keys.keys() - request.boxes.keys() - request.painted.keys()
    edits = {frame: filled(difference.changed(clip.frames[frame], edited[frame])) for frame in found}
    return lambda: track_of(sam.outlines(clip.frames, prompts), prompts, edits)


def _captions(request: Request, clip: Video, edited: Mapping[int, np.ndarray]) -> dict[str, str]:
    """Key of the job -> caption, of those that the call asks a model for."""
    ask_source, ask_edited = not request.caption, not request.edited_caption and 0 in edited
    if request.captioner is None or not (ask_source or ask_edited):
        return {}
    from loraedit_ext.prepare.captioner import Captioner  # transformers takes seconds

    model, found = Captioner(request.captioner), {}
    if ask_source:
        found["caption"] = model.caption(clip.frames[0])
    if ask_edited:
        found["edited_caption"] = model.caption(edited[0], before=request.caption or found["caption"])
    return found


def _masks(tracked: Track, margin: float) -> np.ndarray:
    """uint8 (F, H, W), white = edit."""
    return np.stack([widened(shape, margin) if shape.any() else shape for shape in tracked.shapes]).astype(np.uint8) * 255


def _told(
    request: Request, keys: Mapping[int, Region], tracked: Track, grey: np.ndarray, by_hand: Collection[int]
) -> list[str]:
    """What came of the regions; frames whose mask was made by hand are no longer the track's."""
    lines = []
    for frame, region in sorted(keys.items()):
        left, top, width, height = box_around(region.shape)
        lines.append(f"region    frame {frame}: {width}x{height} at ({left}, {top})")
    for frame in sorted({*request.clicks, *request.background}):
        on, off = (len(pixels.get(frame, ())) for pixels in (request.clicks, request.background))
        lines.append(f"clicks    frame {frame}: {on} on the object, {off} off it")
    cover = grey.mean((1, 2)) / 2.55
    lines.append(f"mask      {cover.mean():.1f} % of the picture on average, {cover.min():.1f} to {cover.max():.1f} %")
    if cover.min() == 100:
        lines.append("note      the mask marks all of every frame: nothing is left to preserve, and training on motion will "
                     "refuse it. Give a smaller region or --margin")  # fmt: skip
    words = _WORDS[request.sam is not None]
    if gone := [int(index) for index in np.flatnonzero(~grey.any((1, 2))) if index not in by_hand]:
        lines.append(f"note      nothing is marked in frames {_spans(gone)}: {words.gone}")
    if doubtful := [index for index in tracked.doubtful() if index not in by_hand]:
        lines.append(f"note      {words.doubtful} in frames {_spans(doubtful)}: look at {SHEET} and {PREVIEW}; mend it with "
                     f"{words.cure} for a frame where the mask is wrong")  # fmt: skip
    return lines


def _lost(frame: int, before: np.ndarray, edited: np.ndarray, grey: np.ndarray) -> list[str]:
    """A word on edited pixels that the mask of their frame leaves out: they would be put back."""
    change = difference.left_out(before, edited, grey < masks.THRESHOLD)
    if change.share <= difference.LITTLE:
        return []
    left, top, width, height = box_around(change.outside)
    place = f"({left}, {top}) to ({left + width}, {top + height})"
    return [f"note      {change.share:.0%} of what the edited picture of frame {frame} changes is outside the mask, "
            f"from {place}, and will be lost. Widen the region or --margin."]  # fmt: skip


def _spans(numbers: list[int]) -> str:
    """`3-5, 9` of 3, 4, 5, 9."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _picture_name(frame: int) -> str:
    return f"frame_{frame:05d}.png" if frame else FRAME


def _aligned_name(frame: int) -> str:
    return f"aligned_{frame:05d}.png"


def mask_name(source_frame: int) -> str:
    """The mask of a frame of the source, in the job's folder."""
    return f"{MASK}/{source_frame:05d}.png"


def _masks_by_hand(request: Request, folder: JobFolder, clip: Video) -> dict[int, np.ndarray]:
    """Frame of the clip -> uint8 (H, W), of the masks that must be kept.

    Raises:
        UserError: one of them does not fit the source, or the folder holds a picture that is none of its masks.
    """
    expected = {mask_name(index) for index in range(clip.total)}
    for path in sorted((folder.path / MASK).glob("*")):
        name = f"{MASK}/{path.name}"
        if path.suffix.lower() in SUFFIXES and name not in expected and not folder.is_ours(name):
            raise UserError(f"{path}: is no mask of {clip.path.name}, which has {clip.total} frames; expected 00000.png to "
                            f"{clip.total - 1:05d}.png. Move it out of the folder.")  # fmt: skip
    names = {frame: mask_name(request.in_source(frame)) for frame in range(len(clip.frames))}
    return {frame: read_grey(folder.path / name, clip) for frame, name in names.items() if folder.keeps(name)}


def _write_frames(request: Request, folder: JobFolder, clip: Video) -> list[str]:
    """The source's frames, to be edited."""
    names = {frame: _picture_name(frame) for frame in sorted({0, *request.pictures})}
    for frame, name in names.items():
        folder.write_png(name, clip.frames[frame])
    return [f"wrote     {folder.path / name}" for name in names.values() if name not in folder.kept]


def _write_aligned(folder: JobFolder, names: Mapping[int, str], edited: Mapping[int, np.ndarray]) -> list[str]:
    """Edited pictures that were brought into line, which the job takes in place of those that were given."""
    for frame, name in names.items():
        folder.write_png(name, edited[frame])
    return [f"wrote     {folder.path / name}" for name in names.values() if name not in folder.kept]


def _write_masks(request: Request, folder: JobFolder, clip: Video, grey: np.ndarray) -> list[str]:
    """One for every frame of the source, black where the clip has none; those of a longer source before go."""
    black = np.zeros_like(grey[0])
    used = {request.in_source(frame): mask for frame, mask in enumerate(grey)}
    for index in stepping(range(clip.total), f"writing {MASK}"):
        folder.write_png(mask_name(index), used.get(index, black))
    for path in (folder.path / MASK).glob("*"):
        name = f"{MASK}/{path.name}"
        if folder.is_ours(name) and int(path.stem) >= clip.total:
            folder.remove(name)
    return [f"wrote     {folder.path / MASK}"]


def _write_previews(folder: JobFolder, clip: Video, edited: Mapping[int, np.ndarray], grey: np.ndarray) -> list[str]:
    """The masks laid over the clip, with its edited frames in place."""
    shown = clip.frames.copy()
    for frame, picture in edited.items():
        shown[frame] = picture
    shown = overlaid(shown, grey)
    write_video(folder.path / PREVIEW, shown, clip.fps)
    write_png(folder.path / SHEET, contact_sheet([shown]))
    return [f"wrote     {folder.path / name}" for name in (PREVIEW, SHEET)]


def _write_tomls(folder: JobFolder, texts: Mapping[str, str]) -> list[str]:
    gone = no_longer_there(folder, texts[JOB]) if JOB in texts else []
    for name, text in texts.items():
        folder.write_text(name, text)
    lines = [f"wrote     {folder.path / name}" if name in texts else f"kept      {folder.path / name}, which is there already"
             for name in (JOB, EDIT)]  # fmt: skip
    if gone:
        lines.append(f"note      {JOB} no longer has {', '.join(gone)}: this call does not give them")
    return lines


def _kept(folder: JobFolder) -> list[str]:
    """A word on pictures that a person changed since they were written."""
    if not folder.kept:
        return []
    more = f" and {len(folder.kept) - 5} more" if len(folder.kept) > 5 else ""
    return [f"kept      {', '.join(folder.kept[:5])}{more} as changed by hand; --overwrite writes them anew"]


def _next(request: Request, folder: JobFolder) -> list[str]:
    """What to do now."""
    out = folder.path
    later = [] if max(request.edited, default=0) else [
        "later     to guide how the edit looks later on, --frame N writes that frame too and --edited N:PICTURE takes its edit"
    ]
    if 0 not in request.edited:
        region = "" if (out / JOB).exists() else ", or give the region with --box or --painted"
        return [*later, f"next      edit {out / FRAME} with any image editor, keep its size, save it under another name, and "
                f"run the same command with --edited PICTURE{region}"]  # fmt: skip
    notes = [*_about_captions(out), *_about_weights(request)]
    lines = [*notes, *later, f"next      look at {out / SHEET} or {out / PREVIEW}, then:"]
    if folder.is_ours(EDIT) and "ckpt_path" not in read_toml(out / EDIT)["model"]:
        lines.append(f"          fill in ckpt_path in {out / EDIT}, or run the same command with --ckpt FOLDER")
    return lines + [f"          {command}" for command in _commands(out / EDIT)]


def _about_weights(request: Request) -> list[str]:
    """A word on weights that are not there: they may be on the machine that trains."""
    if request.ckpt is None or request.ckpt.exists():
        return []
    return [f"note      --ckpt {request.ckpt}: no such folder on this machine; training needs it there"]


def _about_captions(out: Path) -> list[str]:
    job = read_toml(out / JOB)
    missing = [key for key in _CAPTIONS if key not in job and f"{key}_file" not in job]
    if not missing:
        return []
    examples = " ".join(f'--{key} "{_CAPTIONS[key]}"' for key in missing)
    return [f"note      no {' and no '.join(missing)}: say in one sentence who or what is seen, doing what, and where, e.g. "
            f"{examples}; without captions prompts hold the trigger alone"]  # fmt: skip


def _commands(config: Path) -> list[str]:
    """Plan, training and edit, as they are typed in the working directory."""
    root = Path(__file__).parents[2]
    python, run = _here(Path(sys.executable)), ["--config", str(config)]
    calls = (["train.py", *run, "--dry_run"], ["train.py", *run], ["inference.py", *run])
    return [shlex.join([python, _here(root / verb), *rest]) for verb, *rest in calls]


def _here(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
