"""Peak host memory of loading a checkpoint, over what stays resident: `python -m benchmarks.load_memory [--gb 1.6]`.

Writes a Wan2.1-I2V transformer of that size (1.3B's width) into a temporary folder, and a HunyuanVideo one in diffusers' names,
whose linears the loader has to fuse; loads them in child processes through the ordinary loader and measures each one's
high-water mark from /proc (Linux). Rewrites benchmarks/load_memory.md.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch

from common.files import write_json_atomic, write_text_atomic
from loraedit_ext.transformers_on_disk import open_transformer
from models.checkpoint import Shape, open_tensors
from models.hunyuan.wrapper import HunyuanI2V
from models.parts import TRANSFORMER_STEM
from models.shards import Planned, write_shards
from models.wan.config import WanConfig, transformer_shapes
from models.wan.wrapper import WanI2V

REPORT = Path(__file__).with_suffix(".md")
CASES: Mapping[str, tuple[str, str, str, int]] = {
    "bf16 file, kept": ("bfloat16", "", "all", 0),
    "bf16 file to fp32": ("float32", "", "all", 0),
    "bf16 file to float8": ("bfloat16", "float8_e4m3fn", "all", 0),
    "bf16 file, kept, first of two stages": ("bfloat16", "", "first", 0),
    "bf16 file to float8, second of two stages": ("bfloat16", "float8_e4m3fn", "second", 0),
    "bf16 file, kept, blocks_to_swap = 10": ("bfloat16", "", "all", 10),
    "bf16 file to float8, blocks_to_swap = 10": ("bfloat16", "float8_e4m3fn", "all", 10),
    "scaled fp8 file to bf16": ("bfloat16", "", "all", 0),
    "scaled fp8 file to float8 (bytes and scales kept)": ("bfloat16", "float8_e4m3fn", "all", 0),
    "scaled fp8 file to float8, blocks_to_swap = 10": ("bfloat16", "float8_e4m3fn", "all", 10),
    "HunyuanVideo in diffusers' names, fused": ("bfloat16", "", "all", 0),
    "HunyuanVideo in diffusers' names, fused, to fp32": ("float32", "", "all", 0),
}
"""Row -> storage dtype, that of the blocks' linears, which stage, blocks_to_swap (its two buffers on the device are not
filled yet, and not counted); the row's first word says which of the files."""
WRAPPERS = {"wan": WanI2V, "hunyuan-video": HunyuanI2V}
LIMIT = 1.1


def write_checkpoint(folder: Path, gigabytes: float, scaled: bool) -> int:
    """A checkpoint of at least that size in bf16, or the same in scaled fp8; returns its bytes."""
    config = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=1)
    sizes = [sum(torch.Size(shape).numel() for shape in transformer_shapes(c).values()) * 2 for c in
             (config, WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2))]  # fmt: skip
    blocks = max(2, -int(-(gigabytes * 1e9 - sizes[0]) // (sizes[1] - sizes[0])) + 1)
    config = WanConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=blocks)
    planned = [each for name, shape in transformer_shapes(config).items() for each in _planned(name, shape, scaled)]
    write_json_atomic(folder / "config.json", config.original_json())
    write_shards(folder, TRANSFORMER_STEM, planned, shard_bytes=500_000_000)
    return sum(each.nbytes for each in planned)


def write_hunyuan(folder: Path, gigabytes: float) -> None:
    """A HunyuanVideo-I2V transformer of about that size in bf16, as diffusers itself writes it."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=16, attention_head_dim=128, num_layers=3,
        num_single_layers=max(1, round((gigabytes - 1.1) / 0.15)), num_refiner_layers=2, guidance_embeds=True,
        text_embed_dim=1024, pooled_projection_dim=768, image_condition_type="token_replace",
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")


def _planned(name: str, shape: Shape, scaled: bool) -> list[Planned]:
    def full(size: Shape, dtype: torch.dtype) -> Planned:
        return Planned(name, size, dtype, lambda: torch.full(size, 0.01).to(dtype))

    if not scaled or not re.fullmatch(WanI2V.large_linears, name.removesuffix(".weight")):
        return [full(shape, torch.bfloat16)]
    scale = name.removesuffix("weight") + "scale_weight"
    return [full(shape, torch.float8_e4m3fn), Planned(scale, (), torch.float32, lambda: torch.tensor(0.5))]


def child(folder: Path, dtype: str, linears: str, part: str, swapped: int) -> None:
    """Load, touch every weight, print megabytes: peak over the start, resident weights, seconds."""
    torch.set_num_threads(1)
    _warm_up(folder)
    family, files = open_transformer(folder)
    model = WRAPPERS[family](files, torch.device("cpu"))
    layers = model.build_transformer().layers()
    half = len(layers) // 2
    layers = {"all": layers, "first": layers[:half], "second": layers[half:]}[part]
    before, started = _memory("VmRSS"), time.perf_counter()
    of_linears = getattr(torch, linears) if linears else None
    model.load_weights(layers, getattr(torch, dtype), torch.device("cpu"), of_linears, swapped)
    seconds = time.perf_counter() - started
    resident = [t for layer in layers if not layer.streamed for t in (*layer.parameters(), *layer.buffers()) if not t.is_meta]
    rings = {layer.streamed.ring for layer in layers if layer.streamed}
    resident += [piece for ring in rings for piece in chain(*ring.blocks)]
    tensors = {id(t): t for t in resident}
    for tensor in tensors.values():
        tensor.view(torch.uint8 if tensor.dtype.itemsize == 1 else tensor.dtype).flatten()[::512].float().sum()
    print(_memory("VmHWM") - before, sum(t.nbytes for t in tensors.values()) / 2**20, seconds)


def _warm_up(folder: Path) -> None:
    """Let libraries take what they take once, before the measurement starts."""
    torch.ones(8).bfloat16().sum()
    torch.ones(8).to(torch.float8_e4m3fn).float()
    len(open_tensors(folder, (TRANSFORMER_STEM,)))


def _memory(field: str) -> float:
    """A field of /proc/self/status in MB (2^20)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def measure(folder: Path, case: tuple[str, str, str, int]) -> tuple[float, float, float]:
    command = [sys.executable, "-m", "benchmarks.load_memory", "--child", str(folder), *map(str, case)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPORT.parents[1])
    peak, resident, seconds = map(float, done.stdout.split())
    return peak, resident, seconds


def report(size: int, rows: Mapping[str, tuple[float, float, float]]) -> str:
    lines = [
        "# Host memory while a checkpoint loads", "",
        f"Made by `python -m benchmarks.load_memory`: a Wan2.1-I2V transformer of {size / 1e9:.2f} GB in bf16 shards (or "
        "the same in scaled fp8), and a HunyuanVideo-I2V one of about that size, one child process a row, torch "
        f"{torch.__version__}, CPU. Peak is the process's high-water mark over its start, every weight touched; "
        f"resident is what the weights take; the target is a ratio of at most {LIMIT}.", "",
        "| | peak MB | resident MB | ratio | seconds |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [f"| {name} | {peak:.0f} | {resident:.0f} | {peak / resident:.3f} | {seconds:.1f} |"
              for name, (peak, resident, seconds) in rows.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser("load_memory", description=__doc__.splitlines()[0])
    parser.add_argument("--gb", type=float, default=1.6, help="size of the checkpoint")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        folder, *words, swapped = options.child
        child(Path(folder), *words, int(swapped))
        return 0
    with tempfile.TemporaryDirectory() as name:
        folders = {word: Path(name, word) for word in ("bf16", "scaled", "HunyuanVideo")}
        size = write_checkpoint(folders["bf16"], options.gb, scaled=False)
        write_checkpoint(folders["scaled"], options.gb, scaled=True)
        write_hunyuan(folders["HunyuanVideo"], options.gb)
        rows = {case: measure(folders[case.split()[0]], values) for case, values in CASES.items()}
    text = report(size, rows)
    write_text_atomic(REPORT, text)
    print(text)
    return int(any(peak > LIMIT * resident for peak, resident, _ in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
