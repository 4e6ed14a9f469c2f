"""LoRA: inject through peft, initialise the same on any number of stages, export, read back, stack.

A trained file has keys `<family prefix><original linear name>.lora_A.weight` and `.lora_B.weight` (ComfyUI's) and
always scale 1: where alpha differs from rank the scale is multiplied into B, so that no tool can lose it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.files import write_atomic
from loraedit_ext import lora_formats
from loraedit_ext.config import AdapterSettings
from loraedit_ext.flow import generator_for
from models.base import I2VModel
from models.checkpoint import open_tensors, read_config, read_header
from models.eight_bit import EIGHT_BIT
from models.layers import PipelineLayer
from models.lora_names import LoraNames, LoraWeights, split_key

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
EXPORT_NAME = "adapter_model.safetensors"
FILE_NAMES = (EXPORT_NAME, "pytorch_lora_weights.safetensors", "adapter_model.bin")
"""Files looked for in a folder: ours and peft's, diffusers', peft's former one."""
METADATA_KEY = "loraedit"
_PEFT_PART = re.compile(rf"\.lora_([AB])\.{ADAPTER}\.weight$")


def inject(transformer: nn.Module, model: I2VModel, settings: AdapterSettings) -> None:
    """Wrap the family's target linears with LoRA branches, on the meta device, and freeze everything else.

    Raises:
        UserError: an entry of `exclude_modules` matches no linear, or all together leave none.
    """
    from peft import LoraConfig

    targets = target_names(transformer, model, settings.exclude_modules)
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.effective_alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    _inject(config, transformer)


def _inject(config: LoraConfig, transformer: nn.Module) -> None:
    """peft's branches, which leave their input in its dtype: autocast casts it, once for all that read it."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    inject_adapter_in_model(config, transformer, ADAPTER, low_cpu_mem_usage=True)
    for module in transformer.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def target_names(transformer: nn.Module, model: I2VModel, excluded: Iterable[str] = ()) -> list[str]:
    """Original names of the linears that get a LoRA."""
    pattern = re.compile(model.lora_targets)
    names = [n for n, m in transformer.named_modules() if isinstance(m, nn.Linear) and pattern.fullmatch(n)]
    for suffix in excluded:
        kept = [name for name in names if not name.endswith(suffix)]
        if len(kept) == len(names):
            ends = sorted({re.sub(r"^.*?\d+\.", "", name) for name in names})
            raise UserError(
                f"adapter.exclude_modules: `{suffix}` ends the name of no LoRA target. Targets are: {', '.join(ends)}."
            )
        if not kept:
            raise UserError(f"adapter.exclude_modules: {list(excluded)} leave no linear to train. Take one out.")
        names = kept
    return names


def initialise(layers: Iterable[PipelineLayer], seed: int, device: torch.device) -> None:
    """Materialise the LoRA weights of these layers in fp32: A uniform (Kaiming, a = sqrt 5), B zero.

    Each tensor has a generator of its own, so the start does not depend on how layers are split over stages.
    """
    for layer in layers:
        for name, parameter in list(layer.original_parameters()):
            if not (match := _PEFT_PART.search(name)):
                continue
            value = torch.zeros(parameter.shape)
            if match[1] == "A":
                bound = 1 / math.sqrt(parameter.shape[1])
                value.uniform_(-bound, bound, generator=generator_for(seed, "lora", name))
            _replace(layer, parameter, nn.Parameter(value.to(device)))


def _replace(root: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    for module in root.modules():
        for name, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[name] = new


def trainable(layers: Iterable[PipelineLayer]) -> dict[str, nn.Parameter]:
    """The LoRA weights of these layers by original name, e.g. `blocks.0.self_attn.q.lora_A.weight`."""
    return {
        _PEFT_PART.sub(r".lora_\1.weight", name): parameter
        for layer in layers
        for name, parameter in layer.original_parameters()
        if _PEFT_PART.search(name)
    }


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


def write(lora: LoraFile, path: Path, names: LoraNames, layout: lora_formats.Export = "comfyui") -> None:
    """Write a LoRA in a tool's spelling; atomic, and read back before it counts as written.

    Raises:
        UserError: it is broken, cannot be written, reads back differently, or does not fit the format.
    """
    from safetensors.torch import save_file

    check_finite(lora)
    tensors, header = lora_formats.spell(lora.weights, lora.differences, names, layout)
    tensors = {name: w.clone(memory_format=torch.contiguous_format) for name, w in tensors.items()}  # none may share memory
    kept = {key: value for key, value in lora.header.items() if key != lora_formats.DIFFUSERS_METADATA}
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
    names = names or lora_formats.family_of(tensors, file)
    config = file.with_name("adapter_config.json")
    peft = any(key.startswith(lora_formats.PEFT_PREFIX) for key in tensors) and config.is_file()
    parsed = lora_formats.parse(tensors, names, file, header, read_config(config) if peft else None)
    if not parsed.weights and not parsed.differences:
        raise UserError(f"{file}: holds no LoRA weights (its {len(tensors)} tensors are biases or scales alone).")
    text = header.get(METADATA_KEY, "{}")
    metadata = lora_formats.json_object(text, f"{file}: metadata {METADATA_KEY}")
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


def attach(
    transformer: nn.Module, layers: Iterable[PipelineLayer], lora: LoraFile, device: torch.device
) -> None:
    """Give a loaded transformer a LoRA of any ranks and targets, for inference.

    Raises:
        UserError: it adapts linears that the model lacks or has in another size.
    """
    from peft import LoraConfig

    layers = list(layers)
    _check_fit(transformer, lora)
    _add_differences(layers, lora, device)
    ranks = lora.ranks
    if not ranks:
        return
    common = max(ranks.values())
    other = {re.escape(name): rank for name, rank in ranks.items() if rank != common}
    config = LoraConfig(
        r=common, lora_alpha=common, target_modules=list(ranks), rank_pattern=other, alpha_pattern=other
    )
    _inject(config, transformer.requires_grad_(False))
    for layer in layers:
        for name, parameter in trainable([layer]).items():
            value = lora.weights[name].to(device, torch.float32)
            _replace(layer, parameter, nn.Parameter(value, requires_grad=False))


def _check_fit(transformer: nn.Module, lora: LoraFile) -> None:
    check_shapes({name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}, lora)


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


def _add_differences(layers: Iterable[PipelineLayer], lora: LoraFile, device: torch.device) -> None:
    for layer in layers:
        changed = [(name, parameter) for name, parameter in layer.original_parameters() if name in lora.differences]
        with layer.streamed.changing() if layer.streamed and changed else nullcontext():
            for name, parameter in changed:
                if parameter.dtype in EIGHT_BIT:
                    raise UserError(
                        f"{lora.path}: changes the whole of {name}, which is stored in 8 bits here. Set "
                        "model.transformer_dtype to bfloat16, or merge the LoRA first (loraedit_ext.merge_lora)."
                    )
                difference = lora.differences[name].to(device, torch.float32)
                value = (parameter.detach().float() + difference).to(parameter.dtype)
                if layer.streamed:
                    parameter.data.copy_(value)
                else:
                    _replace(layer, parameter, nn.Parameter(value, requires_grad=False))


def check_model(lora: LoraFile, model: I2VModel) -> None:
    """Refuse a LoRA that was trained for another model, by its metadata and by its shapes."""
    trained_for, found = lora.metadata.get("model"), model.describe()
    if trained_for and trained_for != found:
        differing = [k for k in sorted(trained_for.keys() | found.keys()) if trained_for.get(k) != found.get(k)]
        details = "; ".join(f"{k}: LoRA {trained_for.get(k)!r}, checkpoint {found.get(k)!r}" for k in differing)
        raise UserError(f"{lora.path}: this LoRA was trained for another model ({details}). Use the one it belongs to.")
    _check_fit(model.build_transformer(), lora)


def start_from(
    path: Path, model: I2VModel, parameters: Mapping[str, nn.Parameter], scale: float = 1.0, partial: bool = False
) -> None:
    """`load` the LoRA at a path.

    Raises:
        UserError: it cannot be read, is of another model, or does not fit.
    """
    lora = read(path, model)
    check_model(lora, model)
    load(parameters, lora, scale, partial)


def load(
    parameters: Mapping[str, nn.Parameter], lora: LoraFile, scale: float = 1.0, partial: bool = False
) -> None:
    """Copy a LoRA file's weights into injected parameters.

    Args:
        parameters: from `trainable`.
        scale: alpha / rank of the injected LoRA, divided out of B.
        partial: the parameters are one pipeline stage's, so the file may hold more.

    Raises:
        UserError: names or shapes do not match, or the LoRA also changes norms or biases.
    """
    if lora.differences:
        raise UserError(
            f"{lora.path}: also changes {len(lora.differences)} norms or biases ({next(iter(lora.differences))}), which "
            "training cannot continue from. Use it for inference, as [[edit.lora]]."
        )
    missing = sorted(parameters.keys() - lora.weights.keys())
    unexpected = [] if partial else sorted(lora.weights.keys() - parameters.keys())
    shapes = [n for n, p in parameters.items() if n in lora.weights and lora.weights[n].shape != p.shape]
    if missing or unexpected or shapes:
        pairs = [f"{n}: file {tuple(lora.weights[n].shape)}, model {tuple(parameters[n].shape)}" for n in shapes[:1]]
        raise UserError(
            f"{lora.path}: does not fit the model: {len(missing)} weights missing (first {missing[:1]}), "
            f"{len(unexpected)} unexpected (first {unexpected[:1]}), {len(shapes)} of another shape (first "
            f"{pairs}). "
            "Check model.ckpt_path, adapter.rank and adapter.exclude_modules against the run that made it."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = lora.weights[name].to(parameter)
            parameter.copy_(value / scale if ".lora_B." in name else value)
