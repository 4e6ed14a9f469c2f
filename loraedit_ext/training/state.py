"""Full training state in one file per layer, so that a run resumes on any number of stages or replicas, exactly.

`global_stepN/layer_K.safetensors` holds, for each trainable weight, the weight and every tensor of its optimizer
state; `state.json` holds the step and, per weight, the optimizer's plain numbers. `latest` names the newest folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.files import atomic_path, write_json_atomic, write_text_atomic
from loraedit_ext.pipeline import World
from models.checkpoint import read_config

LATEST = "latest"
STATE_FORMAT = 1
GROUP = "group"
"""Prefix of values that belong to the optimizer as a whole."""


def save(
    run: Path, step: int, layers: Mapping[int, Mapping[str, nn.Parameter]], optimizer: torch.optim.Optimizer,
    writes: bool, world: World, extra: Mapping[str, Any],
) -> Path:
    """Write `global_stepN` and point `latest` at it; the folder gets its name only when it is whole.

    Args:
        layers: trainable weights of this process's layers, by layer index, then original name.
        writes: whether this process writes (replica 0 of each stage).
        extra: JSON facts of the run to keep with the state.
    """
    folder, partial = run / f"global_step{step}", run / f".global_step{step}.partial"
    if world.is_main:
        for left in run.glob(".global_step*.partial"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    world.barrier()
    try:
        if writes:
            for index, weights in layers.items():
                _save_layer(partial / f"layer_{index:03d}.safetensors", weights, optimizer)
        world.barrier()
        if world.is_main:
            write_json_atomic(partial / "state.json", {"format": STATE_FORMAT, "step": step, **extra})
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            write_text_atomic(run / LATEST, folder.name + "\n")
    except BaseException:  # perhaps because the disk is full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    world.barrier()
    return folder


def _save_layer(path: Path, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    from safetensors.torch import save_file

    values: dict[str, Any] = {f"{GROUP}/{key}": value for key, value in _moved(optimizer).items()}
    for name, parameter in weights.items():
        values[f"{name}/weight"] = parameter
        values |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    is_tensor = {key: isinstance(value, torch.Tensor) for key, value in values.items()}
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in values.items() if is_tensor[k]}
    numbers = {k: v for k, v in values.items() if not is_tensor[k]}
    with atomic_path(path) as partial:
        save_file(tensors, partial, metadata={"format": "pt", "numbers": json.dumps(numbers)})


def _moved(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Values that an optimizer keeps beside its settings and has changed itself, such as Prodigy's estimate of lr.

    Settings are not among them: they are the configuration's, also after a resume.
    """
    group, defaults = optimizer.param_groups[0], optimizer.defaults
    return {
        key: value for key, value in group.items()
        if key not in ("params", "lr") and isinstance(value, int | float | torch.Tensor)
        and (isinstance(value, torch.Tensor) or value != defaults.get(key))
    }


def find(run: Path) -> Path:
    """The newest full state of a run.

    Raises:
        UserError: there is none; the message lists what is there.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such folder, expected a run to resume, or a global_stepN in one. Give an existing one.")
    latest = run / LATEST
    name = latest.read_text().strip() if latest.is_file() else None
    if not name or not (run / name / "state.json").is_file():
        problem = "no file `latest`" if name is None else f"{name} is not whole" if name else "its file `latest` is empty"
        there = sorted(p.name for p in run.glob("*step*"))
        whole = sorted((p.parent for p in run.glob("global_step*/state.json")), key=lambda p: (len(p.name), p.name))
        cure = f"Whole is {whole[-1]}: name it as the one to resume." if whole else (
            "A LoRA alone (stepN) continues by adapter.init_from_existing."
        )
        raise UserError(f"{run}: nothing to resume: {problem}. Found: {', '.join(there) or 'no checkpoint'}. {cure}")
    return run / name


def is_newest(folder: Path) -> bool:
    """Whether a full state is the one that its run would go on from."""
    latest = folder.parent / LATEST
    return latest.is_file() and latest.read_text().strip() == folder.name


def load_facts(folder: Path) -> dict[str, Any]:
    """What `state.json` says: step, and the facts of the run."""
    facts = read_config(folder / "state.json")
    if facts.get("format") != STATE_FORMAT:
        raise UserError(f"{folder}: state format {facts.get('format')}, this version reads {STATE_FORMAT}.")
    return facts


def check(folder: Path, model: Mapping[str, Any], rank: int, alpha: float, optimizer: str) -> dict[str, Any]:
    """The facts of a state that a run with these can continue.

    Raises:
        UserError: it is of another model, rank, alpha or class of optimizer.
    """
    facts = load_facts(folder)
    theirs, mine = facts["model"] | {"rank": facts["rank"]}, {**model, "rank": rank}
    if differing := [key for key in sorted(theirs | mine) if theirs.get(key) != mine.get(key)]:
        details = "; ".join(f"{key}: state {theirs.get(key)!r}, this run {mine.get(key)!r}" for key in differing)
        raise UserError(f"{folder}: is of another model or rank ({details}). Set model and adapter.rank to the state's, or "
                        "start a new run.")  # fmt: skip
    if (before := facts.get("alpha", alpha)) != alpha:
        raise UserError(f"{folder}: was trained with alpha {before:g}, this run has {alpha:g}: what was learned would act "
                        f"{alpha / before:.3g} times as much. Set adapter.alpha = {before:g}, or start a new run.")  # fmt: skip
    if (their := facts.get("optimizer", optimizer)) != optimizer:
        raise UserError(f"{folder}: holds the state of optimizer {their}, this run has {optimizer}, which cannot use it. "
                        "Set that optimizer.type, or start a new run from the LoRA: adapter.init_from_existing.")
    return facts


def check_weights(folder: Path, layers: Mapping[int, Mapping[str, nn.Parameter]]) -> None:
    """Refuse a state of other weights than those that a run trains, which may be on the meta device; reads headers only.

    Raises:
        UserError: a layer's file is missing, unreadable, or holds other weights.
    """
    for index, weights in layers.items():
        if weights:
            with _opened(folder, index, weights):
                pass


def load(
    folder: Path, layers: Mapping[int, Mapping[str, nn.Parameter]], optimizer: torch.optim.Optimizer
) -> None:
    """Read weights and optimizer state of these layers.

    Raises:
        UserError: a layer's file is missing, unreadable, or holds other weights.
    """
    for index, weights in layers.items():
        if weights:
            with _opened(folder, index, weights) as file:
                _load_layer(file, weights, optimizer)


@contextmanager
def _opened(folder: Path, index: int, weights: Mapping[str, nn.Parameter]) -> Iterator[Any]:
    """The file of a layer, which holds these weights."""
    from safetensors import SafetensorError, safe_open

    path = folder / f"layer_{index:03d}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            _check_layer(path, file, weights)
            yield file
    except (OSError, SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"{path}: unreadable training state ({error}). Resume from another checkpoint.") from error


def _check_layer(path: Path, file: Any, weights: Mapping[str, nn.Parameter]) -> None:
    there = {key.removesuffix("/weight"): key for key in file.keys() if key.endswith("/weight")}  # noqa: SIM118 (not a dict)
    if other := min(there.keys() - weights.keys(), default=None):
        raise UserError(f"{path}: weight {other}: this run does not train it. Set the adapter.exclude_modules that the state "
                        "was made with, or start a new run.")  # fmt: skip
    for name, parameter in weights.items():
        found = tuple(file.get_slice(there[name]).get_shape()) if name in there else None
        if found != tuple(parameter.shape):
            raise UserError(
                f"{path}: weight {name}: expected shape {tuple(parameter.shape)}, found {found or 'nothing'}. Set the model, "
                "adapter.rank and adapter.exclude_modules that the state was made with, or start a new run."
            )


def _load_layer(file: Any, weights: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    entries = tensors | json.loads(file.metadata()["numbers"])
    optimizer.param_groups[0].update(_under(GROUP, entries))
    for name, parameter in weights.items():
        parameter.data.copy_(tensors[f"{name}/weight"])
        values = {key: value for key, value in _under(name, entries).items() if key != "weight"}
        group = optimizer.param_groups[0]
        optimizer.state[parameter] = {key: _place(value, key, parameter, group) for key, value in values.items()}


def _under(prefix: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(f"{prefix}/"): v for k, v in entries.items() if k.startswith(f"{prefix}/")}


def _place(value: Any, key: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> Any:
    """Optimizer tensors live with their weight; step counters on the CPU unless the kernels read them, as torch has it."""
    if not isinstance(value, torch.Tensor):
        return value
    counted_on_host = key == "step" and not (group.get("capturable") or group.get("fused"))
    return value if counted_on_host else value.to(parameter.device)
