"""One training step at any size with random weights, through the real engine: `python -m benchmarks.wan_step`.

By default Wan2.1-I2V-14B at 49 frames of 832x480 on the GPU: seconds per step, peak memory, and the share of the bf16
peak, both by the FLOPs that the step needs (no recomputation counted) and by those that it does. `--small` is a size
that a CPU can do.
"""

from __future__ import annotations

import argparse
import platform
import time
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import get_args

import torch

from benchmarks.random_weights import Recurring, in_memory
from dataset.triple import EncodedTriple
from loraedit_ext import forecast, lora
from loraedit_ext.config import ATTENTION, OFFLOAD, AdapterSettings
from loraedit_ext.flow import TimestepSampler
from loraedit_ext.objective import Objective
from loraedit_ext.pipeline import Engine, distributed
from loraedit_ext.training.trainer import checkpoint_activations
from models.attention_backend import AttentionBackend, attention_backend
from models.layers import speed_up
from models.wan.config import WanConfig
from models.wan.wrapper import IMAGE_TOKENS, WanI2V

SMALL = WanConfig(dim=256, ffn_dim=704, num_heads=2, num_layers=4, text_dim=64, image_dim=80)
STORAGE = {"as computed": None, "float8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    frames: int
    width: int
    height: int
    checkpointing: bool | str
    """As `activation_checkpointing` has it."""


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model and clip")
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one to warm up")
    parser.add_argument("--swap", type=int, default=0, help="blocks_to_swap; then rows without recomputation are left out")
    parser.add_argument("--attention", action="store_true", help="each row with recomputation also with attention kept")
    parser.add_argument("--offload", action="store_true", help="each row with recomputation also with its inputs offloaded")
    parser.add_argument("--storage", choices=STORAGE, default="as computed", help="of the blocks' linears")
    parser.add_argument("--int8-matmul", action="store_true", help="with --storage int8: multiply integers too")
    parser.add_argument("--compile", action="store_true", help="use torch.compile; the first step then takes long")
    parser.add_argument("--attention-backend", choices=get_args(AttentionBackend), default="torch")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options = parser.parse_args()
    config = SMALL if options.small else WanConfig.i2v_14b()
    cases = [Case(13, 128, 128, True), Case(13, 128, 128, False)] if options.small else [
        Case(13, 832, 480, True), Case(49, 832, 480, True)
    ]  # fmt: skip
    cases = [case for case in cases if case.checkpointing or not options.swap]
    also = [ATTENTION] * options.attention + [OFFLOAD] * options.offload
    cases += [replace(case, checkpointing=how) for how in also for case in cases if case.checkpointing]
    with distributed() as world, attention_backend(options.attention_backend):
        peak = forecast.product_rate(world.device, getattr(torch, options.dtype))
        print(f"{device_name(world.device)}, torch {torch.__version__}, {options.dtype}; "
              f"matrix products alone: {peak / 1e12:.1f} TFLOP/s\n")
        print("| frames | size | checkpointing | s/step | peak GB | TFLOP/s needed | share |\n|---|---|---|---|---|---|---|")
        for case in cases:
            seconds, memory = measure(config, case, options, world.device)
            rate = needed_flops(WanI2V(SimpleNamespace(config=config), world.device), case) / seconds
            print(f"| {case.frames} | {case.width}x{case.height} | {str(case.checkpointing).lower()} | {seconds:.2f} | "
                  f"{f'{memory:.1f}' if memory else 'not counted'} | {rate / 1e12:.2f} | {rate / peak:.0%} |", flush=True)


def measure(
    config: WanConfig, case: Case, options: argparse.Namespace, device: torch.device
) -> tuple[float, float]:
    """Seconds per step and peak memory in GB of the trainer's engine on one random sample."""
    dtype, checkpoint = getattr(torch, options.dtype), SimpleNamespace(config=config)
    model = WanI2V(checkpoint, device)
    transformer = model.build_transformer()
    checkpoint.transformer_tensors = lambda: in_memory(transformer, Recurring())
    layers = transformer.layers()
    model.load_weights(layers, dtype, device, STORAGE[options.storage], options.swap)
    lora.inject(transformer, model, AdapterSettings())
    lora.initialise(layers, 0, device)
    optimizer = torch.optim.AdamW(lora.trainable(layers).values(), lr=1e-4)
    checkpoint_activations(layers, case.checkpointing, device)
    speed_up(layers, device, options.int8_matmul, options.compile)
    engine = Engine(layers, [0, len(layers)], optimizer, Objective.loss, 1, 1, dtype)
    objective = Objective(model, TimestepSampler(), 0, False)
    sample = random_sample(model, config, case)

    def step(number: int) -> None:
        engine.train_step(iter([objective.batch("bench", [sample], [number])]), case)

    step(0)
    forecast.synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    for number in range(1, options.steps + 1):
        step(number)
    forecast.synchronise(device)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return (time.perf_counter() - started) / options.steps, peak


def random_sample(model: WanI2V, config: WanConfig, case: Case) -> EncodedTriple:
    """An encoded triple of the case's size."""
    shape = model.geometry.latent_shape(case.frames, case.height, case.width)
    condition = {
        "y": torch.randn(20, *shape[1:]), "text": torch.randn(config.text_len, config.text_dim),
        "image": torch.randn(IMAGE_TOKENS, config.image_dim),
    }
    return EncodedTriple("bench", torch.randn(shape), condition)


def needed_flops(model: WanI2V, case: Case) -> float:
    """FLOPs of forward and backward pass, with nothing recomputed."""
    tokens = forecast.count_tokens(model.geometry, (case.frames, case.height, case.width))
    return forecast.with_backward(model.flops(tokens))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
