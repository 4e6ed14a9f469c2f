"""Optimizers by the names that users know, learning-rate schedules, and clipping over all pipeline stages."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from common.errors import UserError
from loraedit_ext import diffusion_pipe
from loraedit_ext.config import OptimizerSettings

ALIASES = {"adamw8bit": ("bitsandbytes", "AdamW8bit"), "adamw_8bit": ("bitsandbytes", "AdamW8bit")}
ADAMW_DEFAULTS = {"betas": (0.9, 0.99), "weight_decay": 0.01}
"""Paper and released code."""


def build_optimizer(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """An optimizer from torch.optim, bitsandbytes or pytorch_optimizer, by its type's name.

    Raises:
        UserError: unknown type or one that cannot train here, or an argument that it does not take.
    """
    kind = find_optimizer(settings.type)
    arguments = dict(settings.arguments)
    if settings.type.lower() == "adamw":
        arguments = ADAMW_DEFAULTS | arguments
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure and closure.default is inspect.Parameter.empty:
        raise UserError(f"optimizer.type = {settings.type!r}: {kind.__name__} asks for the loss several times a step, which is "
                        "computed once here. Choose another, e.g. adamw.")  # fmt: skip
    known = inspect.signature(kind).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    for name in arguments:
        if name not in known and not takes_any:
            raise UserError(f"optimizer.{name}: {kind.__name__} takes no such argument; it takes {', '.join(known)}.")
    try:
        return kind(list(parameters), lr=settings.lr, **{k: _tuple(v) for k, v in arguments.items()})
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"[optimizer] type = {settings.type!r}: {error}") from error


def check_optimizer(settings: OptimizerSettings) -> None:
    """Refuse a type or an argument before anything is loaded.

    Raises:
        UserError: as `build_optimizer`.
    """
    build_optimizer([nn.Parameter(torch.zeros(2, 2))], settings)


def find_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """Look a type up: torch first, then bitsandbytes, then pytorch_optimizer; case does not matter."""
    if advice := diffusion_pipe.OPTIMIZERS.get(name.lower()):
        raise UserError(f"optimizer.type = {name!r} is diffusion-pipe's own; {advice}.")
    if name.lower() in ALIASES:
        library, attribute = ALIASES[name.lower()]
        return getattr(_library(library, name), attribute)
    candidates = _named_optimizers(torch.optim)
    if name.lower() not in candidates:
        candidates |= _named_optimizers(_library("pytorch_optimizer", name))
    if name.lower() in candidates:
        return candidates[name.lower()]
    close = difflib.get_close_matches(name.lower(), candidates, n=3)
    raise UserError(
        f"optimizer.type = {name!r}: no optimizer of this name in torch.optim, bitsandbytes or pytorch_optimizer"
        + (f"; did you mean {', '.join(candidates[c].__name__ for c in close)}?" if close else ".")
    )


def _library(name: str, wanted: str) -> Any:
    import importlib

    module = {"bitsandbytes": "bitsandbytes.optim"}.get(name, name)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"optimizer.type = {wanted!r} needs the package {name}: pip install {name}") from error


def _named_optimizers(library: Any) -> dict[str, type[torch.optim.Optimizer]]:
    return {
        name.lower(): value for name, value in vars(library).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the weights are those that are meant to be used; behind it they are to the bit what they were.

    Schedule-free optimizers take gradients at other points than the average that they arrive at (Defazio et al. 2024,
    arXiv 2405.15682). With all others nothing happens.
    """
    if not hasattr(optimizer, "eval") or not optimizer.state:  # before the first step there is nothing to average
        yield
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    before = [weight.detach().clone() for weight in weights]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)


def lr_factor(
    step: int, total: int, schedule: Literal["constant", "linear", "cosine"], warmup: int
) -> float:
    """Factor on the learning rate at optimizer step `step` (from 0) of `total`: linear warm-up, then the schedule.

    A function of the step alone, so that a resumed run needs no scheduler state.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]


class GradientGuard:
    """Runs before each optimizer step: global norm over all stages, clipping, refusal of non-finite gradients.

    DeepSpeed's own clipping counts only the first stage's gradients in fp32 without ZeRO, and reports no norm.

    Attributes:
        norm: gradient norm of the last step, before clipping.
    """

    def __init__(self, max_norm: float, sum_over_stages: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.max_norm = max_norm
        self.sum_over_stages = sum_over_stages
        self.norm = 0.0

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(lambda opt, _args, _kwargs: self.check(opt))

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradients in place.

        Raises:
            FloatingPointError: the norm is not finite; the weights are still those of the step before.
        """
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        squares = torch.stack([g.float().square().sum() for g in gradients]).sum()
        self.norm = self.sum_over_stages(squares).sqrt().item()
        if not math.isfinite(self.norm):
            raise FloatingPointError(f"gradient norm is {self.norm}; stopped before the weights were touched")
        if self.max_norm and self.norm > self.max_norm:
            torch._foreach_mul_(gradients, self.max_norm / (self.norm + 1e-6))
