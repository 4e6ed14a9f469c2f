"""Say what a file or folder is: `python -m loraedit_ext.inspect FILE_OR_FOLDER` (checkpoint, LoRA or run)."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from common.errors import UserError
from loraedit_ext import cli, lora
from loraedit_ext import run as runs
from loraedit_ext.training import state
from loraedit_ext.transformers_on_disk import STEMS, open_transformer
from models.checkpoint import Tensors, guess_content, open_tensors, read_config
from models.hunyuan.checkpoint import HunyuanCheckpoint
from models.lora_names import split_key
from models.scaled_fp8 import SCALE_SUFFIXES
from models.wan.checkpoint import WanCheckpoint, expert_folders

LOADED_BY = {
    "comfyui": "ComfyUI, diffusers, diffusion-pipe, LoRA-Edit",
    "kohya": "ComfyUI, musubi-tuner, LoRA-Edit; diffusers only if every linear of every block is there",
    "diffusers": "diffusers, LoRA-Edit; for ComfyUI convert it (loraedit_ext.lora.convert)",
    "peft": "LoRA-Edit; for others convert it (loraedit_ext.lora.convert)",
    "bare": "LoRA-Edit, DiffSynth-Studio; for others convert it (loraedit_ext.lora.convert)",
}  # fmt: skip
_FOR_DIFFUSERS = "for diffusers convert it (loraedit_ext.lora.convert)"
_CHECKPOINTS = {"wan": WanCheckpoint, "hunyuan-video": HunyuanCheckpoint}
_BLOCK = re.compile(r"\w*blocks\.\d+")
_METRICS = "metrics.jsonl"


def describe(path: Path) -> list[str]:
    """Lines that say what `path` is.

    Raises:
        UserError: it does not exist, is damaged, or is nothing known here.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder.")
    if path.is_dir() and ((path / _METRICS).is_file() or any(path.glob("global_step*"))):
        return describe_run(path)
    if path.is_dir() and (path / "state.json").is_file():
        return describe_run(path.parent)
    if path.is_dir() and _is_whole_checkpoint(path):
        return describe_checkpoint(path)
    if path.is_dir() and any((path / name).is_file() for name in lora.FILE_NAMES):
        return describe_lora(path)
    if path.is_dir() and (found := sorted((child.parent for child in path.glob(f"*/{_METRICS}")), key=runs.age)):
        return [f"folder      {path}", f"what        {len(found)} runs; the newest:", *describe_run(found[-1])]
    tensors = open_tensors(path, (*STEMS, "model", "pytorch_model"))
    if any("lora_" in name or name.endswith((".diff", ".diff_b")) for name in tensors):
        return describe_lora(path)
    try:
        return describe_transformer(path, tensors)
    except UserError:
        guess = guess_content(tensors)
        if guess.startswith("Likely") or ("VAE" not in guess and "encoder" not in guess and "CLIP" not in guess):
            raise
        return [f"file        {path}", f"what        {guess.split('. ')[0]}", *_contents(tensors)]


def _is_whole_checkpoint(path: Path) -> bool:
    return any((path / name).exists() for name in ("model_index.json", "transformer", "hunyuan-video-i2v-720p")) or (
        any(path.glob("models_t5*")) or any(path.glob("*VAE*"))
    )


def describe_checkpoint(path: Path) -> list[str]:
    """A checkpoint's folder: its transformer, or both experts, and whether the other parts are there."""
    experts = expert_folders(path)
    lines = []
    for root in experts.values() or [path]:
        family, files = open_transformer(root)
        lines += describe_transformer(files.transformer, open_tensors(files.transformer, STEMS), root)
    chosen = {"expert": next(iter(experts))} if experts else {}
    try:
        return [*lines, f"parts       {_CHECKPOINTS[family].open(path, **chosen).describe_layout()}"]
    except UserError as error:
        return [*lines, f"incomplete  {error}"]


def describe_transformer(path: Path, tensors: Tensors, root: Path | None = None) -> list[str]:
    """A transformer's weights: family, variant, naming scheme, dtypes, size, scales."""
    family, files = open_transformer(root or path)
    config = files.config
    variant = config.variant
    dimensions = ", ".join(f"{key} {value}" for key, value in vars(config).items() if not isinstance(value, str))
    return [
        f"file        {path}",
        f"what        {family} transformer, {variant}, {files.layout} names",
        f"dimensions  {dimensions}",
        *_contents(tensors),
        f"complete    {_completeness(files)}",
    ]


def _completeness(files: object) -> str:
    try:
        return f"yes, all {len(files.transformer_tensors())} tensors"  # type: ignore[attr-defined]
    except UserError as error:
        return f"no: {error}"


def _contents(tensors: Tensors) -> list[str]:
    counts: Counter[str] = Counter()
    for entry in tensors.entries.values():
        counts[str(entry.dtype).removeprefix("torch.")] += math.prod(entry.shape)
    scales = [name for name in tensors if name.endswith(SCALE_SUFFIXES)]
    total = sum(counts.values())
    shares = ", ".join(f"{name} {count / total:.1%}" for name, count in counts.most_common())
    return [
        f"parameters  {total:,} in {len(tensors)} tensors: {shares}",
        f"scales      {len(scales)} ({scales[0]}, ...)" if scales else "scales      none",
    ]


def describe_lora(path: Path) -> list[str]:
    """A LoRA: family, spelling, targets, ranks, strength per block, and what it says of itself."""
    found = lora.read_of(path)
    ranks = Counter(found.ranks.values())
    facts = found.metadata
    lines = [
        f"file        {found.path}",
        f"what        LoRA for {found.family}, {found.layout} names, "
        f"{sum(w.numel() for w in found.weights.values()):,} weights",
        f"targets     {', '.join(_targets(found.ranks))}",
        "rank        " + ", ".join(f"{rank} ({count} linears)" for rank, count in ranks.most_common()),
        f"alpha       {facts['alpha']} in training, multiplied into the weights" if "alpha" in facts
        else "alpha       read from the file; scale 1 after reading",
        f"trigger     {facts.get('trigger', 'unknown')}",
        f"base model  {facts.get('base_model') or _foreign_base(found.header)}",
    ]
    if found.differences:
        lines.append(f"also        whole changes of {len(found.differences)} norms or biases: for inference only")
    if "model" in facts:
        lines.append(f"trained for {facts['model']}, {facts.get('steps')} steps")
    lines.append(f"loaded by   {_loaded_by(found)}")
    return [*lines, "norm of the change by block", *_norms(found)]


def _loaded_by(found: lora.LoraFile) -> str:
    """The tools that take the file as it is; of HunyuanVideo's original names diffusers knows one spelling only."""
    if found.family != "hunyuan-video" or found.layout not in ("comfyui", "kohya"):
        return LOADED_BY[found.layout]
    if found.layout == "kohya":
        return f"ComfyUI, musubi-tuner, LoRA-Edit; {_FOR_DIFFUSERS}"
    keys = list(open_tensors(found.path))
    fits = all(".lora_A." in key or ".lora_B." in key for key in keys) and any("img_attn_qkv" in key for key in keys)
    return LOADED_BY["comfyui"] if fits else f"ComfyUI, LoRA-Edit; {_FOR_DIFFUSERS}"


def _targets(modules: Iterable[str]) -> list[str]:
    return sorted({re.sub(r"\d+", "N", name, count=1) if _BLOCK.match(name) else name for name in modules})


def _foreign_base(header: dict[str, str]) -> str:
    keys = ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name", "base_model")
    return next((header[key] for key in keys if key in header), "unknown")


def _norms(found: lora.LoraFile) -> list[str]:
    squares: dict[str, float] = {}
    for name, a in found.weights.items():
        module, part = split_key(name)
        if part == "lora_A.weight":
            block = match[0] if (match := _BLOCK.match(module)) else "outside blocks"
            squares[block] = squares.get(block, 0.0) + _square_norm(a, found.weights[f"{module}.lora_B.weight"])
    if not squares:
        return ["  none"]
    largest = max(squares.values()) or 1.0
    width = max(map(len, squares))
    return [
        f"  {block:{width}}  {math.sqrt(max(square, 0)):9.4f}  {'#' * round(30 * math.sqrt(max(square, 0) / largest))}"
        if math.isfinite(square) else f"  {block:{width}}  not finite: this LoRA is broken"
        for block, square in squares.items()
    ]


def _square_norm(a: Tensor, b: Tensor) -> float:
    """||B A||^2 without the product: trace of (B^T B)(A A^T)."""
    a, b = a.double(), b.double()
    return float(((b.T @ b) * (a @ a.T)).sum())


def describe_run(path: Path) -> list[str]:
    """A run's folder: how far it came, what can be resumed, what was exported."""
    lines = [f"folder      {path}", "what        a run of train.py"]
    if (path / runs.CONFIG_COPY).is_file():
        saved = read_config(path / runs.CONFIG_COPY)
        config, job = saved.get("config") or {}, saved.get("job") or {}
        model, adapter = config.get("model") or {}, config.get("adapter") or {}
        lines.append(f"job         {job.get('name', 'unknown')}, trigger {job.get('trigger', 'unknown')}")
        lines.append(f"model       {model.get('type')} from {model.get('transformer_path') or model.get('ckpt_path')}, "
                     f"rank {adapter.get('rank')}")
    lines.append(f"progress    {_progress(path / _METRICS)}")
    exports = sorted(path.glob(f"step*/{lora.EXPORT_NAME}"), key=_step_of)
    lines.append("exported    " + (", ".join(each.parent.name for each in exports) or "no LoRA"))
    try:
        newest = state.find(path)
        facts = state.load_facts(newest)
        lines.append(f"resume      {newest.name}, step {facts['step']}, rank {facts.get('rank')}: "
                     f"--resume_from_checkpoint {path.name}")
    except UserError as error:
        lines.append(f"resume      not possible: {error}")
    others = sorted((each for each in path.glob("global_step*") if (each / "state.json").is_file()), key=_step_of)
    if others:
        lines.append("states      " + ", ".join(each.name for each in others))
    return lines


def _step_of(path: Path) -> int:
    numbers = re.findall(r"step(\d+)", str(path))
    return int(numbers[-1]) if numbers else 0


def _progress(metrics: Path) -> str:
    """The last complete row of metrics.jsonl with a loss."""
    try:
        rows = metrics.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return f"unknown, no readable {metrics.name}"
    for row in reversed(rows):
        try:
            values = json.loads(row)
        except ValueError:
            continue  # the last line of a killed run may be cut
        if isinstance(values, dict) and "train/loss" in values:
            return f"step {values.get('step')}, loss {values['train/loss']:.4f}"
    return "no step finished"


def main(arguments: list[str] | None = None) -> int:
    """Parse, look, say."""
    parser = argparse.ArgumentParser("inspect", description=__doc__.splitlines()[0])
    parser.add_argument("path", type=cli.path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a user error")
    options = parser.parse_args(arguments)
    return cli.guarded(lambda: print("\n".join(describe(options.path))), options.traceback)


if __name__ == "__main__":
    sys.exit(main())
