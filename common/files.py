"""Files: atomic writes, content hashes. Nothing half-written ever carries its final name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.errors import UserError

_CHUNK = 1 << 20


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; rename it to `path` only when the block succeeds.

    An interrupted or failing write leaves `path` as it was and no debris. Whoever may read a new file of this process may
    read the result: safetensors writes for the owner alone, and a LoRA is often used by another account.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)
        _sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
        raise UserError(
            f"{path}: could not be written ({getattr(error, 'strerror', None) or error}); what was there before is untouched. "
            "Free disk space or choose another output_dir."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def placed(path: Path, folder: Path) -> Path:
    """A path that a person wrote, `~` and all, relative to `folder`.

    Raises:
        UserError: it begins with a home folder that nobody has.
    """
    try:
        return folder / path.expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: no such home folder, expected ~ or ~USER. Write the whole path.") from error


def make_folder(path: Path, cure: str = "Choose another place.") -> None:
    """Make a folder and those above it, unless they are there.

    Args:
        path: of the folder.
        cure: what a user can do if it cannot be made.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: this folder cannot be made ({error.strerror or error}). {cure}") from error


def check_writable(path: Path) -> None:
    """Check, without writing, that a folder is there to write to or could be made.

    Raises:
        UserError: the nearest part of the path that exists is no folder, or may not be written.
    """
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise UserError(f"{path}: cannot be a folder, {there} is a file. Choose another place.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {there} may not be written to. Choose another place, or change its permissions.")


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file through `write(temporary_path)`, atomically."""
    with atomic_path(path) as partial:
        write(partial)


def write_text_atomic(path: Path, text: str) -> None:
    write_atomic(path, lambda partial: partial.write_text(text, encoding="utf-8") and None)


def write_json_atomic(path: Path, value: Any) -> None:
    write_text_atomic(path, json.dumps(value, indent=2, sort_keys=True, default=str) + "\n")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
