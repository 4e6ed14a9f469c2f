"""Encoded triples on disk, found by content: what went in decides the key, never a file's name or date."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from common.files import hash_json, write_atomic
from dataset.triple import EncodedTriple

CACHE_FORMAT = 3
"""Version of the entries; part of every key, so a change of it makes all entries misses."""
_CONDITION = "condition."
_LENGTH = 8  # bytes of a safetensors file that say how long its JSON head is
_log = logging.getLogger(__name__)


class LatentCache:
    """A folder of safetensors files, one for each encoded triple; safe for several processes at once.

    An identity is a JSON-able dict of all that determines the latents: hashes of the media, the job's
    fields, the encoders' identity. Its hash names the entry, and the entry holds the whole of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, identity: dict[str, Any]) -> Path:
        """Where the entry of an identity is or would be."""
        return self.folder / f"{hash_json(_full(identity))}.safetensors"

    def __contains__(self, identity: dict[str, Any]) -> bool:
        """Whether there is an entry; reads its head only, `get` may still find it damaged."""
        try:
            with self.path(identity).open("rb") as file:
                return _matches(_metadata(file), identity)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return False

    def get(self, identity: dict[str, Any]) -> EncodedTriple | None:
        """The entry of an identity, or None; a damaged one is removed with a warning and is None too."""
        path = self.path(identity)
        try:
            # One descriptor for head and tensors: another process may replace the entry at any moment.
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                metadata = _metadata(file)
                file.seek(0)
                tensors = load(file.read())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (SafetensorError, ValueError) as error:
            return _discard(path, found, f"is truncated or damaged ({error})")
        if not _matches(metadata, identity):
            return _discard(path, found, "belongs to another identity")
        if metadata.get("sha256") != _checksum(tensors):
            return _discard(path, found, "is damaged (checksum)")
        condition = {
            name.removeprefix(_CONDITION): tensor
            for name, tensor in tensors.items() if name.startswith(_CONDITION)
        }
        return EncodedTriple(metadata["name"], tensors.get("target"), condition)

    def put(self, identity: dict[str, Any], triple: EncodedTriple) -> None:
        """Write an entry; it appears whole or not at all.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        tensors = {_CONDITION + name: tensor for name, tensor in triple.condition.items()}
        if triple.target is not None:
            tensors["target"] = triple.target
        # Copies, because safetensors refuses tensors that share memory.
        tensors = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        metadata = {"identity": _text(identity), "name": triple.name, "sha256": _checksum(tensors)}
        data = save(tensors, metadata)
        write_atomic(self.path(identity), lambda partial: partial.write_bytes(data) and None)


def _full(identity: dict[str, Any]) -> dict[str, Any]:
    return {"cache_format": CACHE_FORMAT, "identity": identity}


def _text(identity: dict[str, Any]) -> str:
    return json.dumps(_full(identity), sort_keys=True, default=str)


def _metadata(file: BinaryIO) -> dict[str, str]:
    """The metadata of an open safetensors file, {} if it has none; ValueError if there is no such head."""
    size = int.from_bytes(file.read(_LENGTH), "little")
    if size > os.fstat(file.fileno()).st_size:
        raise ValueError("no safetensors head")
    head = json.loads(file.read(size))
    metadata = head.get("__metadata__") if isinstance(head, dict) else None
    return metadata if isinstance(metadata, dict) else {}


def _matches(metadata: dict[str, str], identity: dict[str, Any]) -> bool:
    return metadata.get("identity") == _text(identity)


def _checksum(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes: safetensors itself notices a cut, not a flipped bit."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _discard(path: Path, found: os.stat_result, problem: str) -> None:
    """Remove a useless entry, unless another process has just replaced it by a new one."""
    _log.warning("%s: %s; removed, it will be encoded again.", path, problem)
    try:
        if path.stat().st_ino == found.st_ino:
            path.unlink()
    except FileNotFoundError:
        _log.info("%s: already removed by another process.", path)
