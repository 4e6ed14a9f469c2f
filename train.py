"""Train a LoRA on one edit: `deepspeed train.py --config edit.toml [key=value ...]`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from loraedit_ext import cli


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run."""
    parser = cli.parser("Fine-tune a LoRA on one video with a spatiotemporal mask (LoRA-Edit).")
    parser.add_argument(
        "--resume_from_checkpoint", nargs="?", const="true", metavar="RUN",
        help="continue the newest run in output_dir, or the named run folder or global_stepN in it",
    )
    parser.add_argument("--cache_only", action="store_true", help="encode everything into the cache, then stop")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, then stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)
    options.overrides += _resume(options.resume_from_checkpoint)

    def run() -> None:
        from loraedit_ext import launch

        launch.train(cli.read_config(options), options.dry_run, options.cache_only)

    return cli.guarded(run, options.traceback)


def _resume(run: str | None) -> list[str]:
    """--resume_from_checkpoint [RUN] as overrides; an override may follow the flag and then is no RUN."""
    if run is None:
        return []
    if "=" in run and not Path(run).exists():
        return ["resume_from_checkpoint=true", run]
    return [f"resume_from_checkpoint={run}"]


if __name__ == "__main__":
    sys.exit(main())
