"""The resumable training loop: step, report, save, stop in time."""

from __future__ import annotations

import argparse
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import UserError
from common.files import write_atomic
from loraedit_ext import cli
from pretraining import replicas
from pretraining.muon import Muon, split_parameters
from pretraining.report import Reporter

MEMORY_HELP = "Smaller numbers need less, where a command takes them (--batch, --size, --clips); --device cpu needs no GPU."
_PACE_KNOWN = 200  # steps of a run after which a stretched schedule trusts its pace


@dataclass(frozen=True)
class Options:
    """What every run needs to know.

    Attributes:
        out: folder of `state.pt` (all that a resumed run needs), the weights and `log.jsonl`.
        steps: length of the whole schedule; resuming with another number re-plans what is left.
        minutes: stop, with the state saved, after this long; None: run to the end.
        lr: peak learning rate of both optimizers.
        seed: of weights, data and noise.
        device: where to compute.
        save_seconds: how often the state is written.
        threads: of the CPU; two are worth 1.4 of one on two idle cores, and far less than one on busy ones.
        compile: use torch.compile, which saves a third of a step on a CPU; needs a C++ compiler.
        stretch: plan the learning rate for as many steps as `minutes` will hold, instead of `steps`.
    """

    out: Path
    steps: int = 4000
    minutes: float | None = None
    lr: float = 2e-3
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    compile: bool = False
    stretch: bool = False
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.stretch and self.minutes is None:
            raise UserError("--stretch fits the schedule into --minutes: give both.")


class Training(ABC):
    """A model with its optimizers and step counter; all else of a step follows from the seed and the step's number."""

    evaluate_every = 250

    def __init__(self, options: Options, model: nn.Module, decay: float = 0.0) -> None:
        self.options = options
        self.model = model.to(options.device)
        matrices, rest = split_parameters(self.model)
        self.trainable = matrices + rest
        on_gpu = torch.device(options.device).type == "cuda"
        self.rate = torch.tensor(options.lr, device=options.device) if on_gpu else options.lr
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, self.rate, decay=decay),
            torch.optim.AdamW(rest, self.rate, betas=(0.9, 0.98), weight_decay=decay, fused=on_gpu, capturable=on_gpu),
        ]
        self.step = 0
        self.planned = options.steps

    @abstractmethod
    def learn(self) -> dict[str, torch.Tensor | float]:
        """`update` by the loss of this process's clips of the step; metrics to report, whose tensors nothing waits for."""

    @abstractmethod
    def evaluate(self, final: bool) -> dict[str, float]:
        """Metrics on held-out scenes."""

    @abstractmethod
    def weights(self) -> dict[str, dict[str, Any]]:
        """File name -> state dict of what is of use outside training."""

    def after_update(self) -> None:
        """Called after every optimizer step."""
        return

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            for group, ours in zip(saved["param_groups"], optimizer.param_groups, strict=True):
                group |= {name: ours[name] for name in ("fused", "capturable") if name in ours}  # of this device
            optimizer.load_state_dict(saved)
        self.step = state["step"]

    def train_step(self) -> dict[str, torch.Tensor | float]:
        """One optimizer step; returns its metrics."""
        lr = self.options.lr * schedule(self.step, self.planned)
        self._set_rate(lr)
        metrics = self.learn()
        self.step += 1
        return {**metrics, "lr": lr}

    def update(self, loss: torch.Tensor) -> None:
        """The weights, by the gradients of a loss."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        replicas.average([weight.grad for weight in self.trainable if weight.grad is not None])
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.after_update()

    def _set_rate(self, lr: float) -> None:
        """On a GPU in a tensor, which a recorded step reads."""
        self.rate = self.rate.fill_(lr) if isinstance(self.rate, torch.Tensor) else lr
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate

    def generator(self) -> torch.Generator:
        """Noise of the present step, drawn where it is used."""
        return torch.Generator(self.options.device).manual_seed(self.options.seed * 1_000_003 + self.step)


def schedule(step: int, steps: int) -> float:
    """Warm-up over 50 steps, constant, cosine decay to 2 % over the last 45 % of the run."""
    warm = min(1.0, (step + 1) / 50)
    tail = max(0.0, (step / steps - 0.55) / 0.45)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(tail, 1.0))))


def resume(training: Training) -> None:
    """Take up `state.pt` of the output folder, if there is one."""
    path = training.options.out / "state.pt"
    if path.exists():
        training.load_state(torch.load(path, weights_only=True, map_location=training.options.device))


def save(training: Training) -> None:
    """Write the state and the weights, each atomically; process 0 alone does."""
    if replicas.rank():
        return
    out = training.options.out
    write_atomic(out / "state.pt", lambda path: torch.save(training.state(), path))
    for name, weights in training.weights().items():
        write_atomic(out / name, lambda path, content=weights: torch.save(content, path))


def run(training: Training) -> None:
    """Train to `options.steps` or until the time is up; the state is saved either way.

    Of several processes the first reports the losses of its share.
    """
    options = training.options
    options.out.mkdir(parents=True, exist_ok=True)
    resume(training)
    reporter = None if replicas.rank() else Reporter(options.out / "log.jsonl", training.step, options.steps)
    started = saved = time.monotonic()
    first = training.step
    while training.step < options.steps:
        metrics = training.train_step()
        now = time.monotonic()
        elapsed = now - started if options.minutes is None else replicas.agreed(now - started)
        if options.stretch and training.step - first > _PACE_KNOWN:
            training.planned = training.step + round(_seconds_left(options, elapsed) * (training.step - first) / elapsed)
        if reporter:
            reporter.steps = training.planned
            reporter.step(training.step, metrics)
            if training.step % training.evaluate_every == 0:
                reporter.note(training.step, training.evaluate(final=False))
        if now - saved > options.save_seconds:
            save(training)
            saved = now
        if not _seconds_left(options, elapsed):
            break
    save(training)
    if reporter:
        reporter.note(training.step, training.evaluate(final=True))


def _seconds_left(options: Options, elapsed: float) -> float:
    return math.inf if options.minutes is None else max(0.0, 60 * options.minutes - elapsed)


def parser(description: str | None, defaults: Options) -> argparse.ArgumentParser:
    """Command line of a training run; `Options` fields by name."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, required=True, help="folder of the state, the weights and the log")
    made.add_argument("--steps", type=int, default=defaults.steps, help="length of the whole schedule")
    made.add_argument("--minutes", type=float, help="stop after this long; run again to go on")
    made.add_argument("--stretch", action="store_true",
                      help="plan the learning rate for as many steps as fit into --minutes, instead of --steps")
    made.add_argument("--lr", type=float, default=defaults.lr)
    made.add_argument("--seed", type=int, default=defaults.seed)
    made.add_argument("--threads", type=int, default=defaults.threads, help="on a CPU; more than one only if it is idle")
    made.add_argument("--compile", action="store_true", help="use torch.compile")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return made


def existing(text: str) -> Path:
    """An argument of `argparse` that names a file or folder that must be there."""
    path = Path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError(f"{path} is not there")
    return path


def guarded(command: Callable[[], None]) -> int:
    """Run a command of this package; what a user can cure becomes one message and exit status 2."""
    return cli.guarded(command, traceback=False, memory_help=MEMORY_HELP)


@contextmanager
def started(device: str, threads: int = 1) -> Iterator[None]:
    """Around what every command of this package does: few threads, among the other processes."""
    limit_threads(device, threads)
    with replicas.joined(device):
        yield


def limit_threads(device: str, threads: int = 1) -> None:
    """On a CPU, one thread unless asked for more: on a shared machine two were 5 to 16 times slower."""
    if device == "cpu":
        torch.set_num_threads(threads)
