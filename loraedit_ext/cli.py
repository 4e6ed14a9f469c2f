"""What the verbs share on the command line: few flags, `key=value` overrides, errors without tracebacks.

Imports nothing that takes long: what a verb needs is imported when it is guarded, so that Ctrl-C ends it quietly then too.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError
from common.files import placed

if TYPE_CHECKING:
    from loraedit_ext.config import EvaluationSettings, RunConfig

MEMORY_HELP = (
    "What lowers it, cheapest first: model.transformer_dtype=float8 or int8, activation_checkpointing=offload, clip_frames in "
    "the job, blocks_to_swap=N or several GPUs with pipeline_stages=S. `train.py --dry_run` says what a run needs and what "
    "helps, docs/memory.md what each costs. --traceback shows where it happened."
)
"""Of the verbs that take a run's TOML."""
_CLOSED = "may not be read or written ({}). Change its permissions, or those of the folders above it, or name another."
_FULL = "could not be written ({}). Free disk space or choose another place; checkpoints and exports written so far are whole."
FILE_ERRORS = {
    errno.EACCES: _CLOSED, errno.EPERM: _CLOSED, errno.EROFS: _CLOSED,
    errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EFBIG: _FULL,
    errno.ENOENT: "is not there ({}). If it was moved or removed while it was in use, bring it back and run this again.",
    errno.ENAMETOOLONG: "{}. Expected the path of a file or folder; write a shorter one.",
    errno.EIO: "could not be read or written ({}). The disk or its connection may be failing.",
}
"""What the machine's owner can cure, wherever it is met: what happened, with the system's words for it, and what to do."""
OVERRIDES_HELP = "override any key of the TOML, e.g. optimizer.lr=2e-4 stage.0.steps=50 model.shift=None"


def parser(description: str, config_required: bool = True) -> argparse.ArgumentParser:
    """Flags that every verb has; knobs live in the TOML. Parse intermixed: overrides stand anywhere among the flags."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", type=path, required=config_required, metavar="TOML", help="the run's TOML (see examples/)"
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    return parser


def integers(text: str) -> list[int]:
    """The type of a flag that takes whole numbers with commas between them; one that stands twice counts once."""
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def words(text: str) -> str:
    """Text on the command line that is to stand in a file; bytes that are no UTF-8 could not."""
    if any("\udc80" <= character <= "\udcff" for character in text):
        raise argparse.ArgumentTypeError(f"{text!r}: is not UTF-8, as all text here must be. Write or name it anew.")
    return text


def path(text: str) -> Path:
    """A path on the command line, in which shells leave `~` as it is behind `--out=` and in quotes."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a path. Is a variable of the shell not set?")
    words(text)
    try:
        return placed(Path(text), Path())
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def read_config(options: argparse.Namespace) -> RunConfig:
    from loraedit_ext.config import load_config

    return load_config(options.config, options.overrides)


def read_evaluation(options: argparse.Namespace) -> EvaluationSettings:
    """The [evaluation] table alone, from overrides like evaluation.clip_path=FOLDER."""
    from loraedit_ext.config import load_evaluation

    return load_evaluation(options.overrides)


def guarded(action: Callable[[], None], traceback: bool, memory_help: str = MEMORY_HELP) -> int:
    """Run a verb; what a user or the machine's owner can cure becomes one message and exit status 2.

    Args:
        memory_help: what to do about a GPU without enough memory.
    """
    try:
        action()
    except KeyboardInterrupt:
        print("interrupted; checkpoints and exports written so far are whole.", file=sys.stderr)
        return 130
    except Exception as error:
        if traceback or not (told := _told(error, memory_help)):
            raise
        print(f"error: {told}", file=sys.stderr)
        return 2
    return 0


def _told(error: Exception, memory_help: str) -> str | None:
    """What happened and what to do about it, if somebody can; of a GPU's memory without torch's advice on its allocator."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        told = FILE_ERRORS.get(error.errno or 0)
        return told and f"{error.filename or 'a file'}: {told.format(error.strerror)}"
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        found = str(error).partition(" If reserved but unallocated memory")[0]
        return f"the GPU has not enough memory: {found} {memory_help}"
    return None
