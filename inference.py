"""Edit the video with the trained LoRA: `python inference.py --config edit.toml [key=value ...]`.

Under `deepspeed --num_gpus N` (or torchrun) each GPU takes one of the passes of guidance.
"""

from __future__ import annotations

import argparse
import sys

from loraedit_ext import cli


def main(arguments: list[str] | None = None) -> int:
    """Parse, build, run."""
    parser = cli.parser("Propagate the edited first frame through the video with a trained LoRA.")
    parser.add_argument("--lora", type=cli.path, metavar="FILE", help="LoRA to use; default: the newest in output_dir")
    parser.add_argument("--out", type=cli.path, metavar="FOLDER", help="where to write; default: a folder beside the LoRA")
    parser.add_argument(
        "--seeds", type=cli.integers, metavar="N,N,...",
        help="edit once with each, in place of edit.seed; results lie side by side (in FOLDER/seed_N with --out)",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_intermixed_args(arguments)

    def run() -> None:
        from loraedit_ext import launch

        config = cli.read_config(options)
        launch.edit_with_seeds(config, options.lora, options.out, options.seeds or [config.edit.seed])

    return cli.guarded(run, options.traceback)


if __name__ == "__main__":
    sys.exit(main())
