"""What the verbs share on the command line: few flags, `key=value` overrides, errors without tracebacks."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from common.errors import UserError
from loraedit_ext.config import EvaluationSettings, RunConfig, load_config, load_evaluation

OVERRIDES_HELP = "override any key of the TOML, e.g. optimizer.lr=2e-4 stage.0.steps=50 model.shift=None"


def parser(description: str, config_required: bool = True) -> argparse.ArgumentParser:
    """Flags that every verb has; knobs live in the TOML. Parse intermixed: overrides stand anywhere among the flags."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, required=config_required, metavar="TOML", help="the run's TOML (see examples/)"
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    return parser


def read_config(options: argparse.Namespace) -> RunConfig:
    return load_config(options.config, options.overrides)


def read_evaluation(options: argparse.Namespace) -> EvaluationSettings:
    """The [evaluation] table alone, from overrides like evaluation.clip_path=FOLDER."""
    return load_evaluation(options.overrides)


def guarded(action: Callable[[], None], traceback: bool) -> int:
    """Run a verb; a user error becomes one message and exit status 2."""
    try:
        action()
    except UserError as error:
        if traceback:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; checkpoints and exports written so far are whole.", file=sys.stderr)
        return 130
    return 0
