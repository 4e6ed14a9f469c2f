"""The job's folder: what prepare.py wrote there, so that a later call never replaces a person's work."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.files import hash_file, make_folder, write_json_atomic, write_text_atomic
from dataset.images import write_png

RECORD = ".prepare.json"
"""SHA-256 of each file as prepare.py wrote it last."""


class JobFolder:
    """Files by their names in the folder, e.g. `mask/00000.png`.

    A file is a person's if it differs from what was written last, or was never written. Such a picture is kept unless it may be
    overwritten; what becomes of such a TOML is for the caller to say.
    """

    def __init__(self, path: Path, overwrite: bool = False, inputs: Collection[Path] = ()) -> None:
        """
        Args:
            path: need not exist yet.
            overwrite: pictures of a person's may be replaced.
            inputs: files that the call reads, which are never replaced where they are a person's.

        Raises:
            UserError: the record is damaged.
        """
        self.path = path
        self.kept: list[str] = []
        """Pictures of a person's that were to be written and were not."""
        self._overwrite = overwrite
        self._inputs = {path.resolve() for path in inputs}
        self._hashes = _read_record(path / RECORD)

    def make(self, *names: str) -> None:
        """The folder, and folders in it.

        Raises:
            UserError: the path cannot be made.
        """
        for path in (self.path, *(self.path / name for name in names)):
            make_folder(path, cure="Choose another --out.")

    def is_ours(self, name: str) -> bool:
        """Whether the file is there, as prepare.py wrote it last."""
        path = self.path / name
        return path.is_file() and hash_file(path) == self._hashes.get(name)

    def keeps(self, name: str) -> bool:
        """Whether a picture is there that must not be replaced."""
        path = self.path / name
        may = self._overwrite and path.resolve() not in self._inputs
        return path.exists() and not may and not self.is_ours(name)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around all writing: the record is brought up to date however the block ends."""
        try:
            yield
        finally:
            write_json_atomic(self.path / RECORD, self._hashes)

    def write_png(self, name: str, image: np.ndarray) -> None:
        """A picture, uint8 (H, W, 3) or (H, W), unless it must be kept."""
        if self.keeps(name):
            self.kept.append(name)
            return
        write_png(self.path / name, image)
        self._hashes[name] = hash_file(self.path / name)

    def write_text(self, name: str, text: str) -> None:
        """A text file, whatever is there."""
        write_text_atomic(self.path / name, text)
        self._hashes[name] = hash_file(self.path / name)

    def remove(self, name: str) -> None:
        """A file that is not wanted any more."""
        (self.path / name).unlink()
        del self._hashes[name]


def _read_record(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: could not be read ({error}), expected what prepare.py noted there. Remove it; then all files "
                        "of the job count as made by hand.") from error  # fmt: skip
