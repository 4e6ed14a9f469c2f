"""Convert a LoRA between tools: `python -m loraedit_ext.lora.convert IN OUT --to comfyui|diffusers|kohya`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common.errors import UserError
from loraedit_ext import cli, lora
from loraedit_ext.lora import formats


def convert(source: Path, target: Path, to: formats.Export) -> str:
    """Write `source` in another tool's spelling; returns one line that says what was done.

    Raises:
        UserError: not a LoRA, or `target` exists or is no safetensors file.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: expected a name ending in .safetensors.")
    if target.exists():
        raise UserError(f"{target}: is there already; nothing is overwritten. Choose another name.")
    found = lora.read_of(source)
    lora.write(found, target, formats.names_of(found.family), to)
    ranks = sorted(set(found.ranks.values()))
    return (
        f"{target}: {found.family} LoRA of {len(found.ranks)} linears, rank {', '.join(map(str, ranks))}, "
        f"{found.layout} -> {to}; read back and compared"
    )


def main(arguments: list[str] | None = None) -> int:
    """Parse, convert, say what was done."""
    parser = argparse.ArgumentParser("python -m loraedit_ext.lora.convert", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=cli.path, metavar="IN", help="a LoRA of any tool, or a folder that holds one")
    parser.add_argument("target", type=cli.path, metavar="OUT", help="file to write")
    parser.add_argument("--to", choices=formats.EXPORTS, default="comfyui")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    options = parser.parse_args(arguments)
    return cli.guarded(lambda: print(convert(options.source, options.target, options.to)), options.traceback)


if __name__ == "__main__":
    sys.exit(main())
