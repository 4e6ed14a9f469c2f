"""LoRA in a transformer: injected through peft, initialised the same on any number of stages, loaded, attached for an edit."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.errors import UserError
from loraedit_ext.config import AdapterSettings
from loraedit_ext.flow import generator_for
from loraedit_ext.lora.files import LoraFile, check_shapes, read
from models.base import I2VModel
from models.eight_bit import EIGHT_BIT
from models.layers import PipelineLayer

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
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


def _add_differences(layers: Iterable[PipelineLayer], lora: LoraFile, device: torch.device) -> None:
    for layer in layers:
        changed = [(name, parameter) for name, parameter in layer.original_parameters() if name in lora.differences]
        with layer.streamed.changing() if layer.streamed and changed else nullcontext():
            for name, parameter in changed:
                if parameter.dtype in EIGHT_BIT:
                    raise UserError(
                        f"{lora.path}: changes the whole of {name}, which is stored in 8 bits here. Set "
                        "model.transformer_dtype to bfloat16, or merge the LoRA first (loraedit_ext.lora.merge)."
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
