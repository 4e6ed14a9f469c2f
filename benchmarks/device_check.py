"""One training step on a device against fp32 on the CPU, in every way to save memory: `python -m benchmarks.device_check`.

Small Wan and HunyuanVideo transformers with random weights, and a LoRA whose B is random too, so that every gradient
counts. Weights come through the project's own loader, steps go through its engine; the reference on the CPU is a plain
forward and backward pass of the same layers. Columns: relative errors of the loss and of the LoRA's whole gradient; how
far the gradient is from that of the plain row of the same dtypes (ways to save memory change no number, so this is what
the kernels themselves vary by); the most that a repeated step differed from the first; seconds; peak memory.
A row that fails says why, and its traceback goes to stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.random_weights import in_memory, independent
from benchmarks.wan_step import device_name
from common.errors import first_line
from dataset.triple import EncodedTriple
from loraedit_ext import lora
from loraedit_ext.config import ATTENTION, OFFLOAD, AdapterSettings
from loraedit_ext.flow import TimestepSampler, generator_for
from loraedit_ext.objective import Objective
from loraedit_ext.pipeline import Engine, autocast, distributed
from loraedit_ext.training.trainer import checkpoint_activations
from models.base import I2VModel, release_memory
from models.eight_bit import multiply_integers
from models.hunyuan.config import VARIANT_OF_CHANNELS, HunyuanConfig, rope_axes
from models.hunyuan.wrapper import HunyuanI2V
from models.layers import PipelineLayer
from models.wan.config import WanConfig
from models.wan.wrapper import IMAGE_TOKENS, WanI2V

CPU = torch.device("cpu")
HEAD, BLOCKS, SWAPPED = 128, 6, 3
TEXT_TOKENS, TEXT_VALID = 96, 70
TEXT_DIM, IMAGE_DIM, POOLED_DIM = 64, 80, 48
FRAMES, SIDE = 13, 128


@dataclass(frozen=True)
class Row:
    """One way to compute the step."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    storage: torch.dtype | None = None
    """Store the blocks' linears in 8 bits."""
    integers: bool = False
    """Multiply in 8 bits too."""
    checkpointing: bool | str = False
    """As `activation_checkpointing` has it."""
    swapped: int = 0
    tf32: bool = True
    """Let convolutions use TF32, as torch does by itself."""
    cpu: bool = False
    """Like the reference, for the error that the dtype alone makes."""

    @property
    def arithmetic(self) -> tuple[Any, ...]:
        """What of a row may change numbers."""
        return self.dtype, self.storage, self.integers, self.tf32, self.cpu


REFERENCE = Row("fp32 on the CPU", torch.float32, cpu=True)
BF16, FLOAT8 = Row("bf16"), Row("float8 weights", storage=torch.float8_e4m3fn)
INT8 = Row("int8 weights", storage=torch.int8)
PRODUCTS = replace(INT8, name="int8 weights and products", integers=True)
ROWS = (
    Row("fp32", torch.float32), Row("fp32 without TF32", torch.float32, tf32=False),
    replace(BF16, name="bf16 on the CPU", cpu=True), BF16,
    replace(BF16, name="bf16, recompute", checkpointing=True),
    replace(BF16, name="bf16, attention", checkpointing=ATTENTION),
    replace(BF16, name="bf16, offload", checkpointing=OFFLOAD),
    replace(BF16, name="bf16, blocks_to_swap", checkpointing=True, swapped=SWAPPED),
    replace(BF16, name="bf16, attention, blocks_to_swap", checkpointing=ATTENTION, swapped=SWAPPED),
    replace(BF16, name="bf16, offload, blocks_to_swap", checkpointing=OFFLOAD, swapped=SWAPPED),
    replace(FLOAT8, name="float8 weights on the CPU", cpu=True), FLOAT8,
    replace(FLOAT8, name="float8 weights, recompute", checkpointing=True),
    replace(FLOAT8, name="float8 weights, offload, blocks_to_swap", checkpointing=OFFLOAD, swapped=SWAPPED),
    replace(INT8, name="int8 weights on the CPU", cpu=True), INT8,
    replace(PRODUCTS, name="int8 weights and products on the CPU", cpu=True), PRODUCTS,
    replace(PRODUCTS, name="int8 weights and products, recompute", checkpointing=True),
)  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A small model with its weights and one sample."""

    name: str
    open: Callable[[torch.device], I2VModel]
    sample: EncodedTriple


@dataclass(frozen=True)
class Step:
    """What a step gave."""

    loss: float
    gradient: Tensor
    spread: float = 0.0
    """Largest relative difference of a repeated step's gradient."""
    seconds: float = 0.0
    megabytes: float = 0.0


@dataclass
class Recorder:
    """Keeps each step's gradients before the optimizer clears them."""

    weights: Mapping[str, nn.Parameter]
    gradients: list[Tensor] = field(default_factory=list)

    def __call__(self, *_: Any) -> None:
        self.gradients.append(flat(self.weights))


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=256, help=f"of the models, a multiple of {HEAD}")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--side", type=int, default=SIDE, help="width and height of the video")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one to warm up")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with distributed() as world:
        print(f"{device_name(world.device)}, torch {torch.__version__}\n")
        print("| model | row | loss error | gradient error | from the plain row | repeated | s/step | peak MB |")
        print("|---|---|---|---|---|---|---|---|")
        for subject in subjects(options.width, options.frames, options.side):
            reference, plain = on_cpu(subject, REFERENCE), {}
            print(f"| {subject.name} | {REFERENCE.name} | loss {reference.loss:.4f} | norm {reference.gradient.norm():.4f} "
                  "| | | | |", flush=True)
            for row in ROWS:
                line = guarded(subject, row, world.device, options.steps, reference, plain)
                print(f"| {subject.name} | {row.name} | {line} |", flush=True)


def guarded(
    subject: Subject, row: Row, device: torch.device, steps: int, reference: Step, plain: dict[tuple[Any, ...], Tensor]
) -> str:
    """The row's cells, or why there are none; the first of its arithmetic is added to `plain`."""
    try:
        step = on_cpu(subject, row) if row.cpu else on_device(subject, row, device, steps)
    except Exception as error:  # whatever it is, the other rows count
        traceback.print_exc(file=sys.stderr)
        return f"{type(error).__name__}: {first_line(error)} | | | | |".replace("\n", " ")
    finally:
        release_memory()
    same = plain.setdefault(row.arithmetic, step.gradient)
    cells = [abs(step.loss - reference.loss) / reference.loss, distance(step.gradient, reference.gradient)]
    cells += [distance(step.gradient, same), step.spread]
    memory = f"{step.megabytes:.1f}" if step.megabytes else "not counted"
    return " | ".join([*(f"{cell:.1e}" for cell in cells), f"{step.seconds:.4f}" if step.seconds else "", memory])


def subjects(width: int, frames: int, side: int) -> list[Subject]:
    """Wan, and HunyuanVideo in both variants."""
    wan = WanConfig(dim=width, ffn_dim=width * 11 // 4, num_heads=width // HEAD, num_layers=BLOCKS, text_dim=TEXT_DIM,
                    image_dim=IMAGE_DIM)
    found = [subject("Wan", WanI2V, wan, frames, side)]
    for channels, variant in VARIANT_OF_CHANNELS.items():
        hunyuan = HunyuanConfig(
            dim=width, num_heads=width // HEAD, mlp_dim=2 * width, num_double=2, num_single=BLOCKS - 2, in_channels=channels,
            guidance_embed=variant == "token_replace", rope_axes=rope_axes(HEAD), text_dim=TEXT_DIM, pooled_dim=POOLED_DIM,
        )  # fmt: skip
        found.append(subject(f"HunyuanVideo {variant}", HunyuanI2V, hunyuan, frames, side))
    return found


def subject(name: str, family: type[I2VModel], config: WanConfig | HunyuanConfig, frames: int, side: int) -> Subject:
    """A model of random weights, the same whenever it is loaded, and a random sample for it."""
    checkpoint = SimpleNamespace(config=config, expert=None)
    tensors = in_memory(family(checkpoint, CPU).build_transformer(), independent)
    checkpoint.transformer_tensors = lambda: tensors
    shape = family.geometry.latent_shape(frames, side, side)
    generator = generator_for("device check", name)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    if isinstance(config, WanConfig):
        condition = {"y": normal(20, *shape[1:]), "text": normal(config.text_len, TEXT_DIM),
                     "image": normal(IMAGE_TOKENS, IMAGE_DIM)}
    else:
        mask = torch.zeros(1, *shape[1:])
        mask[:, 0], mask[..., : shape[3] // 2] = 1, 1
        condition = {"known": normal(*shape) * mask, "mask": mask, "text": normal(TEXT_TOKENS, TEXT_DIM),
                     "text_length": torch.tensor(TEXT_VALID), "pooled": normal(POOLED_DIM)}
    return Subject(name, lambda device: family(checkpoint, device), EncodedTriple("check", normal(*shape), condition))


def build(subject: Subject, row: Row, device: torch.device) -> tuple[I2VModel, list[PipelineLayer]]:
    """Weights and LoRA on the device, as the trainer does it, then a random B."""
    model = subject.open(device)
    transformer = model.build_transformer()
    layers = transformer.layers()
    model.load_weights(layers, row.dtype, device, row.storage, row.swapped)
    lora.inject(transformer, model, AdapterSettings())
    lora.initialise(layers, 0, device)
    for name, weight in lora.trainable(layers).items():
        if ".lora_B." in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator_for("B", name)) * 0.02)
    checkpoint_activations(layers, row.checkpointing, device)
    if row.integers:
        multiply_integers(layers, device)
    return model, layers


def on_cpu(subject: Subject, row: Row) -> Step:
    """One step without any engine."""
    model, layers = build(subject, row, CPU)
    stream, labels = Objective(model, TimestepSampler(), 0, False).batch("check", [subject.sample], [0])
    with autocast(CPU, row.dtype):
        for layer in layers:
            stream = layer(stream)
    loss = Objective.loss(stream, labels)
    loss.backward()
    return Step(loss.item(), flat(lora.trainable(layers)))


def on_device(subject: Subject, row: Row, device: torch.device, steps: int) -> Step:
    """The same step several times through the trainer's engine; its learning rate of 0 changes nothing."""
    torch.backends.cudnn.allow_tf32 = row.tf32
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    model, layers = build(subject, row, device)
    weights = lora.trainable(layers)
    optimizer = torch.optim.SGD(weights.values(), lr=0.0)
    engine = Engine(layers, [0, len(layers)], optimizer, Objective.loss, 1, 1, row.dtype)
    recorder = Recorder(weights)
    optimizer.register_step_pre_hook(recorder)
    batch = Objective(model, TimestepSampler(), 0, False).batch("check", [subject.sample], [0])
    loss = engine.train_step(iter([batch]), "check")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    for _ in range(steps):
        engine.train_step(iter([batch]), "check")
    seconds = (time.perf_counter() - started) / max(1, steps)
    peak = torch.cuda.max_memory_allocated(device) - before if cuda else 0
    first, *others = recorder.gradients
    spread = max((distance(other, first) for other in others), default=0.0)
    return Step(loss, first, spread, seconds, peak / 1e6)


def flat(weights: Mapping[str, nn.Parameter]) -> Tensor:
    """All gradients as one fp64 vector on the CPU; a weight without one is an error."""
    missing = [name for name, weight in weights.items() if weight.grad is None]
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(weights)} LoRA weights got no gradient, {missing[0]} among them")
    return torch.cat([weight.grad.detach().double().flatten().cpu() for weight in weights.values()])


def distance(a: Tensor, b: Tensor) -> float:
    """Relative: ||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


if __name__ == "__main__":
    main()
