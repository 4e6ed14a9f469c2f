"""Nothing half-written ever carries its final name."""

from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import ErrorCollector, UserError, UserErrors
from common.files import atomic_path, check_writable, hash_json, write_atomic, write_json_atomic, write_text_atomic
from dataset.images import write_png


def test_a_failing_write_leaves_the_old_file_and_no_debris(tmp_path):
    target = tmp_path / "lora.safetensors"
    target.write_text("old")

    def write_half(partial: Path) -> None:
        partial.write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_atomic(target, write_half)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_final_name_appears_only_when_the_content_is_whole(tmp_path):
    target = tmp_path / "state.json"
    with atomic_path(target) as partial:
        partial.write_text("half")
        assert not target.exists()
        partial.write_text("whole")
    assert target.read_text() == "whole"


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path):
    """safetensors itself writes for the owner alone."""
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            write_atomic(tmp_path / f"{mode}.safetensors", lambda partial: save_file({"a": torch.zeros(2)}, partial))
        finally:
            os.umask(before)
        assert (tmp_path / f"{mode}.safetensors").stat().st_mode & 0o777 == mode


@pytest.mark.parametrize("write", [
    lambda path: write_atomic(path, lambda partial: save_file({"a": torch.zeros(2000)}, partial)),
    lambda path: write_png(path, np.random.default_rng(0).integers(0, 255, (99, 99), np.uint8)),
], ids=["weights", "picture"])
def test_what_a_library_says_of_a_full_disk_is_that_message_too(tmp_path, write):
    """safetensors raises an error of its own; numpy one that says nothing of the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"x\.bin: could not be written \(.*File too large"):
            write(tmp_path / "x.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not any(tmp_path.iterdir())


def test_the_same_problem_of_many_is_told_once():
    """A sweep checks a configuration for each of its trials."""
    errors = ErrorCollector()
    for message in ("a.toml: x", "a.toml: x"):
        errors.add(message)
    with pytest.raises(UserError, match=r"^a\.toml: x$"):
        errors.raise_if_any()
    errors.add("a.toml: y")
    with pytest.raises(UserErrors, match=r"2 problems found:\n  - a\.toml: x\n  - a\.toml: y$"):
        errors.raise_if_any()


def test_a_full_disk_is_one_message_with_the_file(tmp_path):
    target = tmp_path / "x.bin"

    def fill(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"x\.bin: could not be written \(No space left on device\)"):
        write_atomic(target, fill)
    assert not target.exists()


def test_a_real_full_device_is_reported(tmp_path):
    """/dev/full answers every write with ENOSPC; a file linked to it is the smallest full disk there is."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    def write_to_full_device(partial: Path) -> None:
        partial.unlink()
        partial.symlink_to("/dev/full")
        partial.write_text("data")

    with pytest.raises(UserError, match="No space left"):
        write_atomic(tmp_path / "y", write_to_full_device)


def test_json_and_text_round_trip(tmp_path):
    write_json_atomic(tmp_path / "a" / "b.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a" / "b.json").read_text().startswith('{\n  "a"')
    write_text_atomic(tmp_path / "t", "")
    assert (tmp_path / "t").read_text() == ""


def test_json_hash_ignores_key_order_and_nothing_else():
    assert hash_json({"a": 1, "b": 2}) == hash_json({"b": 2, "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": 2})


def test_collected_errors_come_as_one_or_as_a_list():
    errors = ErrorCollector()
    errors.raise_if_any()
    with errors.catch():
        raise UserError("first")
    with pytest.raises(UserError, match=r"^first$"):
        errors.raise_if_any()
    with errors.catch():
        raise UserErrors(["second", "third"])
    with pytest.raises(UserErrors, match="3 problems found"):
        errors.raise_if_any()


def test_a_folder_that_cannot_be_is_told_of(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="this folder cannot be made"):
        write_text_atomic(tmp_path / "file" / "below" / "a.txt", "")
    with pytest.raises(UserError, match="file is a file"):
        check_writable(tmp_path / "file" / "below")
    check_writable(tmp_path / "new" / "below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
