"""What the plan predicts for the released models: `python -m benchmarks.memory_plan` prints the tables of docs/memory.md.

Arithmetic alone; no weights are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from loraedit_ext import forecast, lora, plan
from loraedit_ext.config import ATTENTION, OFFLOAD, RunConfig, load_config
from models.base import I2VModel
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.wrapper import HunyuanI2V
from models.wan.config import WanConfig
from models.wan.wrapper import WanI2V

CPU = torch.device("cpu")
CONFIG = Path(__file__).parents[1] / "examples" / "wan" / "edit.toml"
SIZE = (480, 832)
MODELS: dict[str, tuple[I2VModel, tuple[int, ...]]] = {
    "Wan 14B": (WanI2V(SimpleNamespace(config=WanConfig.i2v_14b()), CPU), (13, 49, 81)),
    "HunyuanVideo": (HunyuanI2V(SimpleNamespace(config=HunyuanConfig.i2v_13b("token_replace")), CPU), (13, 49)),
}
"""With the numbers of frames that are shown."""
STORAGE = {"bf16": None, "float8, int8": "float8"}


def main() -> None:
    """Print markdown tables."""
    for way in (True, ATTENTION, OFFLOAD):
        print(f"\n`activation_checkpointing = {str(way).lower() if way is True else repr(way)}`:\n")
        print("| frames that train at once | storage | `blocks_to_swap = 0` | half | all but two |\n|---|---|---|---|---|")
        for row in rows(way):
            print(row)


def rows(way: bool | str) -> Iterator[str]:
    """Rows of the table for a way of `activation_checkpointing`: GB on the GPU, in brackets those on the host."""
    config = load_config(CONFIG, [])
    for name, (model, frames) in MODELS.items():
        transformer = model.build_transformer()
        lora.inject(transformer, model, config.adapter)
        blocks = len(transformer.layers()) - 2
        for count in frames:
            tokens = forecast.count_tokens(model.geometry, (count, *SIZE))
            for storage, dtype in STORAGE.items():
                cells = (
                    _cell(plan.predict_memory(_with(config, way, dtype, swapped), model, transformer, tokens,
                                              transformer.config.dim, blocks))
                    for swapped in (0, blocks // 2, blocks - 2)
                )  # fmt: skip
                yield f"| {name}, {count} | {storage} | {' | '.join(cells)} |"


def _with(config: RunConfig, way: bool | str, dtype: str | None, swapped: int) -> RunConfig:
    model = config.model.model_copy(update={"transformer_dtype": dtype})
    return config.model_copy(update={"activation_checkpointing": way, "blocks_to_swap": swapped, "model": model})


def _cell(memory: plan.Memory) -> str:
    return f"{memory.total / 1e9:.1f}" + (f" ({memory.on_host / 1e9:.1f})" if memory.on_host else "")


if __name__ == "__main__":
    main()
