"""LoRA files: read in any tool's spelling, checked, stacked, written in one.

A trained file has keys `<family prefix><original linear name>.lora_A.weight` and `.lora_B.weight` (ComfyUI's) and
always scale 1: where alpha differs from rank the scale is multiplied into B, so that no tool can lose it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError
from common.files import write_atomic
from loraedit_ext.lora import formats
from models.base import I2VModel
from models.checkpoint import open_tensors, read_config, read_header
from models.lora_names import LoraNames, LoraWeights, split_key

EXPORT_NAME = "adapter_model.safetensors"
FILE_NAMES = (EXPORT_NAME, "pytorch_lora_weights.safetensors", "adapter_model.bin")
"""Files looked for in a folder: ours and peft's, diffusers', peft's former one."""
METADATA_KEY = "loraedit"


@dataclass(frozen=True)
class LoraFile:
    """A LoRA: weights in original names (scale 1) and what it says of itself."""

    path: Path
    weights: LoraWeights
    metadata: dict[str, Any]
    """Empty for a file of another tool."""
    differences: dict[str, Tensor] = field(default_factory=dict)
    """Whole tensors to add to parameters (norms, biases), as step-distilled LoRAs have."""
    layout: str = "comfyui"
    """Whose spelling the file has."""
    family: str = ""
    """Model family that its names tell."""
    header: dict[str, str] = field(default_factory=dict)
    """The safetensors metadata as it is."""

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted linear."""
        return {split_key(name)[0]: w.shape[0] for name, w in self.weights.items() if name.endswith("lora_A.weight")}


def save(
    path: Path, weights: Mapping[str, Tensor], model: I2VModel, metadata: Mapping[str, Any], scale: float,
    dtype: torch.dtype,
) -> None:
    """Write a trained LoRA in ComfyUI's names, which diffusers loads as well.

    Args:
        scale: alpha / rank; multiplied into B.
        dtype: of the file.
    """
    scaled = {name: w.detach() * (scale if ".lora_B." in name else 1.0) for name, w in weights.items()}
    tensors = {name: w.to("cpu", dtype) for name, w in scaled.items()}
    write(LoraFile(path, tensors, dict(metadata)), path, model.lora_names)


def write(lora: LoraFile, path: Path, names: LoraNames, layout: formats.Export = "comfyui") -> None:
    """Write a LoRA in a tool's spelling; atomic, and read back before it counts as written.

    Raises:
        UserError: it is broken, cannot be written, reads back differently, or does not fit the format.
    """
    from safetensors.torch import save_file

    check_finite(lora)
    tensors, header = formats.spell(lora.weights, lora.differences, names, layout)
    tensors = {name: w.clone(memory_format=torch.contiguous_format) for name, w in tensors.items()}  # none may share memory
    kept = {key: value for key, value in lora.header.items() if key != formats.DIFFUSERS_METADATA}
    header = kept | header | {"format": "pt"}
    if lora.metadata:
        header[METADATA_KEY] = json.dumps(lora.metadata, default=str)
    write_atomic(path, lambda partial: save_file(tensors, partial, metadata=header))
    written = read_of(path, names)
    for theirs, ours in ((written.weights, lora.weights), (written.differences, lora.differences)):
        if theirs.keys() != ours.keys() or any(not torch.equal(theirs[n], w.cpu()) for n, w in ours.items()):
            raise UserError(f"{path}: reads back differently from what was written; the disk may be failing.")


def read(path: Path, model: I2VModel) -> LoraFile:
    """Read a LoRA of ComfyUI, diffusers, kohya's tools or peft: a file, or a folder that holds one.

    Raises:
        UserError: no such file, unreadable, or not a LoRA of this family.
    """
    return read_of(path, model.lora_names)


def read_of(path: Path, names: LoraNames | None = None) -> LoraFile:
    """Read a LoRA of the given family, or of the one that its names tell."""
    file = _file_in(path)
    tensors, header = open_tensors(file), read_header(file)
    names = names or formats.family_of(tensors, file)
    config = file.with_name("adapter_config.json")
    peft = any(key.startswith(formats.PEFT_PREFIX) for key in tensors) and config.is_file()
    parsed = formats.parse(tensors, names, file, header, read_config(config) if peft else None)
    if not parsed.weights and not parsed.differences:
        raise UserError(f"{file}: holds no LoRA weights (its {len(tensors)} tensors are biases or scales alone).")
    text = header.get(METADATA_KEY, "{}")
    metadata = formats.json_object(text, f"{file}: metadata {METADATA_KEY}")
    kept = {key: value for key, value in header.items() if key not in ("format", METADATA_KEY)}
    return LoraFile(file, parsed.weights, metadata, parsed.differences, parsed.layout, names.family, kept)


def _file_in(path: Path) -> Path:
    if not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: no such LoRA file.")
        return path
    if (path / "state.json").is_file():
        exported = path.with_name(path.name.removeprefix("global_"))
        raise UserError(f"{path}: is a training's full state, not a LoRA. One of that step would be in {exported}.")
    found = [path / name for name in FILE_NAMES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
    if not found:
        below = sorted(file.parent.name for file in path.glob(f"*/{EXPORT_NAME}"))
        raise UserError(f"{path}: no LoRA file in it (looked for {', '.join(FILE_NAMES)})."
                        + f" Name one of its folders: {', '.join(below)}." * bool(below))  # fmt: skip
    if len(found) > 1 and found[0].name not in FILE_NAMES:
        listed = ", ".join(file.name for file in found)
        raise UserError(f"{path}: several LoRA files in it ({listed}). Name the one to use.")
    return found[0]


def combine(stack: Sequence[tuple[LoraFile, float]]) -> LoraFile:
    """One LoRA with the effect of several together, each times its strength.

    The branches of a linear are laid side by side, so the sum is exact whatever their ranks and targets. The first
    one gives path and metadata.
    """
    weights: LoraWeights = {}
    differences: dict[str, Tensor] = {}
    for lora, strength in stack:
        for name, value in lora.weights.items():
            value = value.float() * (strength if ".lora_B." in name else 1.0)
            axis = 1 if ".lora_B." in name else 0
            if name in weights and weights[name].shape[1 - axis] != value.shape[1 - axis]:
                raise UserError(
                    f"{lora.path}: {name} has shape {tuple(value.shape)}, in {stack[0][0].path} "
                    f"{tuple(weights[name].shape)}: they are of different models."
                )
            weights[name] = torch.cat([weights[name], value], axis) if name in weights else value
        for name, value in lora.differences.items():
            if name in differences and differences[name].shape != value.shape:
                raise UserError(f"{lora.path}: {name} has another shape than in the LoRAs before it.")
            differences[name] = value.float() * strength + differences.get(name, 0.0)
    first = stack[0][0]
    return replace(first, weights=weights, differences=differences)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], lora: LoraFile) -> None:
    """Refuse a LoRA that is broken, or changes what a bare transformer lacks or has in another size.

    Args:
        shapes: of the transformer's parameters by original name.
    """
    check_finite(lora)
    changed = {name: tuple(value.shape) for name, value in lora.differences.items()}
    for name in lora.ranks:
        a, b = lora.weights[f"{name}.lora_A.weight"], lora.weights[f"{name}.lora_B.weight"]
        changed[f"{name}.weight"] = (b.shape[0], a.shape[1])
    unknown = [name for name in changed if name not in shapes]
    wrong = [
        f"{name}: LoRA {size}, model {shapes[name]}" for name, size in changed.items() if shapes.get(name, size) != size
    ]
    if unknown or wrong:
        raise UserError(
            f"{lora.path}: does not fit the model: {len(unknown)} weights that the model lacks (first {unknown[:1]}), "
            f"{len(wrong)} of another size (first {wrong[:1]}). It is of another model; check model.ckpt_path."
        )


def check_finite(lora: LoraFile) -> None:
    """Refuse a LoRA that would make everything it is added to infinite or not a number."""
    for name, value in (*lora.weights.items(), *lora.differences.items()):
        if not value.float().isfinite().all():
            raise UserError(f"{lora.path}: {name} holds numbers that are not finite, as a training that diverged leaves them. "
                            "Take an earlier step of its run.")  # fmt: skip
