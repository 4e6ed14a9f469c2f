"""Merge LoRAs into a full checkpoint: `python -m loraedit_ext.lora.merge --ckpt MODEL --lora FILE[=STRENGTH] --out FOLDER`.

The result is the transformer alone, in the original names and dtype, as shards: name it as `model.transformer_path`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_json_atomic
from loraedit_ext import cli, lora
from loraedit_ext.lora import formats
from loraedit_ext.transformers_on_disk import open_transformer
from models.checkpoint import Entry, release_pages
from models.hunyuan.checkpoint import HunyuanTransformerFiles
from models.parts import TRANSFORMER_STEM
from models.shards import SHARD_BYTES, Planned, write_shards
from models.wan.checkpoint import WanTransformerFiles, expert_of


def merge(
    checkpoint: Path, stack: Sequence[tuple[Path, float]], out: Path, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write `checkpoint`'s transformer with the LoRAs added; returns lines that say what was done.

    Weights keep their dtype, but 8-bit ones become bfloat16: a LoRA is finer than their steps. One tensor at a time is
    in memory.

    Raises:
        UserError: not a transformer, not a LoRA for it, or `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; nothing is overwritten. Name an empty or new folder.")
    family, files = open_transformer(checkpoint)
    tensors = files.transformer_tensors()
    names = formats.names_of(family)
    read = [(lora.read_of(path, names), strength) for path, strength in stack]
    for each, _ in read:
        _check_model(each, files, checkpoint)
    combined = lora.combine(read)
    lora.check_shapes(tensors.shapes, combined)
    planned = [
        Planned(name, entry.shape, _final_dtype(entry), _merged(name, entry, combined))
        for name, entry in tensors.entries.items()
    ]
    written = write_shards(out, TRANSFORMER_STEM, planned, shard_bytes)
    if isinstance(files, WanTransformerFiles):
        write_json_atomic(out / "config.json", files.config.original_json())
    lines = [f"{out}: {len(planned)} tensors in {len(written)} files, {len(combined.ranks)} linears changed by "
             f"{len(stack)} LoRA{'s' if len(stack) > 1 else ''}"]
    if any(_is_8_bit(entry) for entry in tensors.entries.values()):
        lines.append("note: 8-bit weights became bfloat16, since a LoRA is finer than their steps")
    return lines


def _check_model(each: lora.LoraFile, files: WanTransformerFiles | HunyuanTransformerFiles, checkpoint: Path) -> None:
    """Refuse a LoRA of another variant or of Wan2.2's other expert, whose linears have the same names and shapes."""
    for what, found in (("variant", files.config.variant), ("expert", expert_of(checkpoint))):
        trained_for = each.metadata.get("model", {}).get(what)
        if trained_for and found and not trained_for.endswith(found):  # a LoRA says `hunyuan-i2v-token_replace`
            raise UserError(f"{each.path}: was trained for the {what} {trained_for}, and {checkpoint} is {found}. Merge it "
                            "into the one that it belongs to.")  # fmt: skip


def _is_8_bit(entry: Entry) -> bool:
    return entry.scaled is not None or entry.dtype.itemsize == 1


def _final_dtype(entry: Entry) -> torch.dtype:
    return torch.bfloat16 if _is_8_bit(entry) else entry.dtype


def _merged(name: str, entry: Entry, combined: lora.LoraFile) -> Callable[[], Tensor]:
    module = name.removesuffix(".weight")
    a, b = (combined.weights.get(f"{module}.lora_{part}.weight") for part in "AB") if module != name else (None, None)
    difference = combined.differences.get(name)

    def make() -> Tensor:
        source = entry.read()
        if a is None and b is None and difference is None:
            result = source.to(_final_dtype(entry), copy=entry.mapped)
        else:
            value = source.float()
            value = value if a is None or b is None else value + b.float() @ a.float()
            result = (value if difference is None else value + difference).to(_final_dtype(entry))
        if entry.mapped and source.is_contiguous():
            release_pages(source)
        return result

    return make


def _stacked(text: str) -> tuple[Path, float]:
    path, found, strength = text.rpartition("=")
    try:
        value = float(strength) if found else 1.0
    except ValueError:
        return cli.path(text), 1.0
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text}: a strength of {value}, expected a finite number, e.g. {path}=0.8")
    return cli.path(path if found else text), value


def main(arguments: list[str] | None = None) -> int:
    """Parse, merge, say what was done."""
    parser = argparse.ArgumentParser("python -m loraedit_ext.lora.merge", description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=cli.path, required=True, help="checkpoint folder, transformer folder or file")
    parser.add_argument("--lora", type=_stacked, action="append", required=True, metavar="FILE[=STRENGTH]",
                        help="may be given several times")
    parser.add_argument("--out", type=cli.path, required=True, help="new folder for the merged transformer")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    options = parser.parse_args(arguments)
    return cli.guarded(
        lambda: print("\n".join(merge(options.ckpt, options.lora, options.out))), options.traceback
    )


if __name__ == "__main__":
    sys.exit(main())
