"""Trainer step against the bare step of the same model: `python -m benchmarks.trainer_overhead`.

Both run n and then 2n steps; the difference is n steps without start, export or checkpoint. CPU seconds of the process
are compared, the least of several alternating rounds, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from loraedit_ext import launch, lora, plan
from loraedit_ext.config import load_config
from loraedit_ext.encode import encode_all
from loraedit_ext.evaluation.scenes import random_edit, random_scene
from loraedit_ext.evaluation.tasks import write_task
from loraedit_ext.flow import TimestepSampler
from loraedit_ext.objective import Objective
from loraedit_ext.pipeline import distributed
from loraedit_ext.training.trainer import Trainer, group_names
from models.wan.config import WanConfig
from models.wan.random_weights import write_random_checkpoint

CONFIG = """
output_dir = "runs"
dataset = "job.toml"
activation_checkpointing = false
[model]
type = "wan"
ckpt_path = "wan"
dtype = "float32"
[[stage]]
name = "motion"
steps = 1
mix = { motion = 1 }
"""


def main() -> None:
    """Print a markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4, help="the least of as many measurements counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _prepare(folder, options.dim, options.layers)
        rounds = [
            [_per_step(lambda n, run=run: run(folder, n), options.steps) for run in (_bare, _trainer)]
            for _ in range(options.rounds)
        ]
    bare, full = (min(column) for column in zip(*rounds, strict=True))
    print("| | CPU s/step |\n|---|---|")
    print(f"| bare forward + backward + AdamW | {bare:.3f} |\n| trainer | {full:.3f} |\n| ratio | {full / bare:.3f} |")


def _prepare(folder: Path, dim: int, layers: int) -> None:
    config = WanConfig(dim=dim, ffn_dim=dim * 27 // 10, num_heads=dim // 128, num_layers=layers, text_dim=64, image_dim=80)
    write_random_checkpoint(folder / "wan", config)
    scene = random_scene(1, objects=1)
    write_task(folder, "bench", scene, random_edit(scene, 1), frames=13, size=(128, 128))
    (folder / "edit.toml").write_text(CONFIG)


def _per_step(run: Callable[[int], float], steps: int) -> float:
    return (run(2 * steps) - run(steps)) / steps


def _trainer(folder: Path, steps: int) -> float:
    config = load_config(folder / "edit.toml", [f"stage.0.steps={steps}"])
    with distributed() as world:
        prepared = launch.prepare(config, world)
        triples = [t for group in prepared.triples.values() for t in group]
        samples = encode_all(prepared.model, triples, launch.cache_of(config), config.mask_rule, world)
        trainer = Trainer(config, prepared.job, prepared.model, samples, group_names(prepared.triples), prepared.stages,
                          world, None)
        started = time.process_time()
        trainer.train()
        return time.process_time() - started


def _bare(folder: Path, steps: int) -> float:
    """The same layers, sample and optimizer in the shortest loop there is."""
    config = load_config(folder / "edit.toml")
    cpu = torch.device("cpu")
    model = launch.build_model(config, cpu)
    job = launch.open_job(config, model)
    with distributed() as world:
        triples = plan.triples(job, config.stage)["motion"]
        sample = encode_all(model, triples, launch.cache_of(config), config.mask_rule, world)["motion"]
    transformer = model.build_transformer()
    layers = transformer.layers()
    model.load_weights(layers, torch.float32, cpu)
    lora.inject(transformer, model, config.adapter)
    lora.initialise(layers, 0, cpu)
    optimizer = torch.optim.AdamW(lora.trainable(layers).values(), lr=1e-4)
    objective = Objective(model, TimestepSampler(), 0, False)
    stream, labels = objective.batch("motion", [sample], [0])
    started = time.process_time()
    for _ in range(steps):
        hidden = stream
        for layer in layers:
            hidden = layer(hidden)
        objective.loss(hidden, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.process_time() - started


if __name__ == "__main__":
    main()
