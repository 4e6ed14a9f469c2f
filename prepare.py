"""Make an edit job of a video: `python prepare.py --source clip.mp4 --edited frame_edited.png --out jobs/helmet`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from loraedit_ext import cli
from loraedit_ext.family import Family

if TYPE_CHECKING:
    from loraedit_ext.prepare.request import Request

DESCRIPTION = (
    "Make an edit job of a video. Without --edited it writes the frame to edit; with it, it finds what was edited, follows "
    "that through the video, and writes the mask, a preview of it, job.toml and edit.toml."
)

_BY_FRAME = {"edited": "--edited", "boxes": "--box", "painted": "--painted"}
_CLICKS = ("clicks", "background")


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run."""
    options = _parser().parse_args(arguments)

    def run() -> None:
        request = _request(options)
        if options.page is None:
            from loraedit_ext.prepare.job import prepare

            print("\n".join(prepare(request)))
        else:
            from loraedit_ext.prepare.page import serve

            serve(request, options.page)

    return cli.guarded(run, options.traceback)


def _request(options: argparse.Namespace) -> Request:
    from loraedit_ext.prepare.request import Request, by_frame, grouped

    given = {name: value for name, value in vars(options).items() if value is not None and name not in ("page", "traceback")}
    given |= {name: by_frame(flag, given[name]) for name, flag in _BY_FRAME.items() if name in given}
    given |= {name: grouped(given[name]) for name in _CLICKS if name in given}
    return Request(**given)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--source", type=cli.path, required=True, metavar="PATH", help="video, or folder of images")
    parser.add_argument("--out", type=cli.path, required=True, metavar="FOLDER", help="the job's folder, made if need be")
    parser.add_argument(
        "--edited", type=_at_path, action="append", metavar="[FRAME:]PICTURE",
        help="an edited frame at the source's size, without a number the first; later ones guide how the edit looks there",
    )
    parser.add_argument(
        "--frame", dest="pictures", type=int, action="append", metavar="N", help="write frame N of the clip too, to be edited",
    )
    parser.add_argument(
        "--box", dest="boxes", type=_box, action="append", metavar="[FRAME:]LEFT,TOP,WIDTH,HEIGHT",
        help="the region to edit, in pixels, instead of what --edited shows; again with another frame to mend the track",
    )
    parser.add_argument(
        "--painted", type=_at_path, action="append", metavar="[FRAME:]PICTURE",
        help="the same as a picture, white = edit (from an image editor, ...)",
    )
    parser.add_argument(
        "--sam", type=cli.path, metavar="FOLDER",
        help="follow the region by SAM 2 instead of optical flow: a checkpoint on disk, e.g. of facebook/sam2.1-hiera-large",
    )
    parser.add_argument(
        "--click", dest="clicks", type=_pixel, action="append", metavar="[FRAME:]X,Y",
        help="with --sam: a pixel on the object; again for more of it, or in another frame to mend the track",
    )
    parser.add_argument(
        "--not", dest="background", type=_pixel, action="append", metavar="[FRAME:]X,Y",
        help="with --sam: a pixel that is not on the object",
    )
    parser.add_argument("--margin", type=float, help="widen the mask by this share of the region's size (default: 0.1)")
    parser.add_argument("--start", type=int, metavar="N", help="first source frame to use (default: 0)")
    parser.add_argument("--every", type=int, metavar="N", help="use every Nth source frame (default: 1, each)")
    parser.add_argument("--frames", type=int, metavar="N", help="how many to use, 4n+1 (default: up to 49)")
    parser.add_argument("--caption", type=cli.words, metavar="TEXT", help="what the source shows, for job.toml")
    parser.add_argument("--edited_caption", type=cli.words, metavar="TEXT", help="what the edited frame shows")
    parser.add_argument(
        "--captioner", type=cli.path, metavar="FOLDER",
        help="write the captions that are not given by a vision-language model: a checkpoint on disk, e.g. SmolVLM, Florence-2",
    )
    parser.add_argument("--ckpt", type=cli.path, metavar="FOLDER", help="the model's weights, for edit.toml")
    parser.add_argument("--model", choices=get_args(Family), help="the model's family, for edit.toml (default: wan)")
    parser.add_argument(
        "--overwrite", action="store_true", default=None, help="replace masks and frames that were changed by hand, too",
    )
    parser.add_argument(
        "--page", type=int, nargs="?", const=8860, metavar="PORT",
        help="draw regions and clicks, bring edited pictures and mend masks in a browser, on this machine's port 8860 or PORT",
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    return parser


def _at_frame(text: str) -> tuple[int, str]:
    """`12:REST` or `REST`, which is frame 0's."""
    frame, colon, rest = text.partition(":")
    return (int(frame), rest) if colon and frame.isdecimal() else (0, text)


def _box(text: str) -> tuple[int, tuple[int, int, int, int]]:
    frame, numbers = _at_frame(text)
    try:
        left, top, width, height = (int(number) for number in numbers.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected four whole numbers of pixels, LEFT,TOP,WIDTH,HEIGHT, e.g. "
                                         "310,80,120,150, and FRAME: before them for a later frame") from None  # fmt: skip
    if width < 1 or height < 1:
        raise argparse.ArgumentTypeError(f"{text}: width and height must be positive")
    return frame, (left, top, width, height)


def _pixel(text: str) -> tuple[int, tuple[int, int]]:
    frame, numbers = _at_frame(text)
    try:
        x, y = (int(number) for number in numbers.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected two whole numbers of pixels, X,Y from the left and the top, e.g. "
                                         "370,150, and FRAME: before them for a later frame") from None  # fmt: skip
    return frame, (x, y)


def _at_path(text: str) -> tuple[int, Path]:
    frame, path = _at_frame(text)
    return frame, cli.path(path)


if __name__ == "__main__":
    sys.exit(main())
