"""Writes large checkpoints as safetensors shards, tensor by tensor: no more than one tensor is in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.errors import UserError
from common.files import write_atomic, write_json_atomic
from common.progress import brief
from models.checkpoint import SAFETENSORS_DTYPES, Shape

SHARD_BYTES = 5_000_000_000
_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `make()` is called when its turn comes, and its result is not kept."""

    name: str
    shape: Shape
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(folder: Path, stem: str, planned: Sequence[Planned], shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write `stem-00001-of-0000N.safetensors` and their index; each file atomically.

    Raises:
        UserError: a tensor is not what was planned, or the disk is full.
    """
    shards = _grouped(planned, shard_bytes)
    files = [folder / f"{stem}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    with brief(sum(each.nbytes for each in planned), "writing weights", unit="B", unit_scale=True) as bar:
        for file, shard in zip(files, shards, strict=True):
            write_atomic(file, _writer(shard, bar))
    weight_map = {each.name: file.name for file, shard in zip(files, shards, strict=True) for each in shard}
    index = {"metadata": {"total_size": sum(each.nbytes for each in planned)}, "weight_map": weight_map}
    write_json_atomic(folder / f"{stem}.safetensors.index.json", index)
    return files


def _grouped(planned: Iterable[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    size = 0
    for each in planned:
        if shards[-1] and size + each.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(each)
        size += each.nbytes
    return shards


def _writer(shard: Sequence[Planned], bar: tqdm) -> Callable[[Path], None]:
    """The safetensors format: length of the header, header padded to 8 bytes, the tensors' bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for each in shard:
        start, end = end, end + each.nbytes
        header[each.name] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for each in shard:
                tensor = each.make()
                if tuple(tensor.shape) != each.shape or tensor.dtype != each.dtype:
                    raise UserError(f"{path}: {each.name} is {tensor.dtype} {tuple(tensor.shape)}, not as planned.")
                file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
                bar.update(each.nbytes)

    return write
