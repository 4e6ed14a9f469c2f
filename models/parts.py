"""Where the parts of a checkpoint lie, and their identity for a cache key; the same for every model family."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import ErrorCollector
from common.files import hash_file
from models.checkpoint import read_config, weight_files

TRANSFORMER_STEM = "diffusion_pytorch_model"
_WEIGHT_STEMS = (TRANSFORMER_STEM, "model.", "model-")
_EDGE = 1 << 20


def within(root: Path | None, *names: str) -> list[Path]:
    """These names in the checkpoint's folder; none without a folder."""
    return [root / name for name in names] if root else []


def find_part(
    key: str, given: Path | None, candidates: Sequence[Path], problems: ErrorCollector, what: str = ""
) -> Path | None:
    """The given path, or the first candidate that is a file or a folder with weights.

    Args:
        key: of the configuration, for messages, e.g. `vae_path`.
        what: file names that are looked for in folders, for messages.
    """
    if given is not None:
        if not given.exists():
            problems.add(f"{key} = {given}: no such file or folder.")
        return given
    for path in candidates:
        if path.is_file() or (path.is_dir() and has_weights(path)):
            return path
    if candidates:
        looked = " or ".join(str(path) for path in candidates)
        looked = f"{what} in {looked}" if what else looked
        problems.add(f"{key.removesuffix('_path')}: looked for {looked}; not there. Add it, or set {key}.")
    else:
        problems.add(f"{key}: not set, and there is no ckpt_path to find it in.")
    return None


def has_weights(folder: Path) -> bool:
    return any(any(folder.glob(f"{stem}*")) for stem in _WEIGHT_STEMS)


def listing(folder: Path) -> str:
    """What is in a folder, for messages."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    more = f", ... ({len(names) - 20} more)" if len(names) > 20 else ""
    return (", ".join(names[:20]) or "nothing") + more


def config_of(part: Path) -> dict[str, Any] | None:
    """The config.json of a part that is a folder."""
    path = part / "config.json"
    return read_config(path) if part.is_dir() and path.is_file() else None


def part_identity(part: Path) -> list[dict[str, Any]]:
    """Its weight files and config.json, as JSON values for a cache key."""
    files = [file_identity(file) for file in weight_files(part)]
    config = part / "config.json"
    return [*files, file_identity(config, whole=True)] if part.is_dir() and config.is_file() else files


def file_identity(path: Path, whole: bool = False) -> dict[str, Any]:
    """Name, size, and a hash of size, header, first and last MB (a torch file's last MB holds all checksums).

    Small files are hashed whole, and any file if `whole`. The folder does not matter.
    """
    size = path.stat().st_size
    digest = hash_file(path) if whole or size <= 4 * _EDGE else _edges_hash(path, size)
    return {"file": path.name, "size": size, "sha256": digest}


def _edges_hash(path: Path, size: int) -> str:
    """SHA-256 of a large file's size, its safetensors header, its first and its last MB."""
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        head = _EDGE
        if path.suffix == ".safetensors":
            head = max(head, 8 + int.from_bytes(file.read(8), "little"))
            file.seek(0)
        digest.update(file.read(min(head, size)))
        file.seek(-_EDGE, 2)
        digest.update(file.read())
    return digest.hexdigest()
