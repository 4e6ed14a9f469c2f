"""The cache: found by content alone, whole or not there."""

from __future__ import annotations

import dataclasses
import logging
import multiprocessing
import os

import pytest
import torch
from media_makers import write_picture

from common.errors import UserError
from dataset import cache as cache_module
from dataset.cache import LatentCache
from dataset.triple import EncodedTriple
from dataset.video import hash_media


def sample(value: float = 1.0) -> EncodedTriple:
    context = torch.arange(12.0).reshape(3, 4)
    condition = {"context": context, "first_row": context[:1], "mask": torch.ones(2, 2, dtype=torch.bool),
                 "clip": torch.full((3,), value, dtype=torch.bfloat16), "scale": torch.tensor(value)}
    return EncodedTriple("motion@0", torch.full((16, 3, 4, 4), value), condition)


IDENTITY = {"clip": {"source": "abc", "frames": 9}, "encoder": {"vae": "sha1"}}


def test_what_went_in_comes_out(tmp_path):
    cache = LatentCache(tmp_path / "cache")
    assert cache.get(IDENTITY) is None
    assert IDENTITY not in cache
    cache.put(IDENTITY, sample())
    assert IDENTITY in cache
    got = LatentCache(tmp_path / "cache").get(dict(reversed(IDENTITY.items())))
    assert got.name == "motion@0"
    assert torch.equal(got.target, sample().target)
    assert got.condition.keys() == sample().condition.keys()
    for name, tensor in sample().condition.items():
        assert got.condition[name].dtype == tensor.dtype
        assert torch.equal(got.condition[name], tensor)


def test_a_triple_without_target_stays_one(tmp_path):
    cache = LatentCache(tmp_path)
    cache.put(IDENTITY, dataclasses.replace(sample(), target=None))
    assert cache.get(IDENTITY).target is None


@pytest.mark.parametrize(
    "change", [{"encoder": {"vae": "sha2"}}, {"more": 1}, {"clip": {"source": "abc", "frames": 13}}]
)
def test_another_identity_is_a_miss(tmp_path, change):
    cache = LatentCache(tmp_path)
    cache.put(IDENTITY, sample())
    assert cache.get(IDENTITY | change) is None


def test_changed_bytes_under_the_same_name_are_a_miss(tmp_path):
    cache, path = LatentCache(tmp_path / "cache"), tmp_path / "a.png"
    zeros = torch.zeros(8, 8, 3, dtype=torch.uint8).numpy()
    write_picture(path, zeros)
    stat = path.stat()
    cache.put({"source": hash_media(path)}, sample())
    assert cache.get({"source": hash_media(path)}) is not None
    write_picture(path, zeros + 1)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert cache.get({"source": hash_media(path)}) is None


def test_another_format_version_is_a_miss(tmp_path, monkeypatch):
    cache = LatentCache(tmp_path)
    cache.put(IDENTITY, sample())
    monkeypatch.setattr(cache_module, "CACHE_FORMAT", cache_module.CACHE_FORMAT + 1)
    assert cache.get(IDENTITY) is None


def test_an_entry_under_a_foreign_key_is_no_hit(tmp_path, caplog):
    """As a hash collision or a file renamed by hand would be."""
    cache = LatentCache(tmp_path)
    other = IDENTITY | {"encoder": {"vae": "sha2"}}
    cache.put(IDENTITY, sample())
    cache.path(IDENTITY).rename(cache.path(other))
    assert other not in cache
    with caplog.at_level(logging.WARNING):
        assert cache.get(other) is None
    assert "another identity" in caplog.text


def _cut(data: bytes) -> bytes:
    return data[:-100]


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("damage", [_cut, _flip, lambda data: b"", lambda data: b"rubbish" * 50])
def test_a_damaged_entry_is_a_miss_that_is_told_and_removed(tmp_path, caplog, damage):
    cache = LatentCache(tmp_path)
    cache.put(IDENTITY, sample())
    path = cache.path(IDENTITY)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert cache.get(IDENTITY) is None
    assert path.name in caplog.text
    assert not path.exists()
    cache.put(IDENTITY, sample())
    assert cache.get(IDENTITY) is not None


def test_an_interrupted_write_is_never_visible(tmp_path, monkeypatch):
    cache = LatentCache(tmp_path)
    monkeypatch.setattr(os, "replace", _out_of_space)
    with pytest.raises(UserError, match="No space left"):
        cache.put(IDENTITY, sample())
    assert cache.get(IDENTITY) is None
    assert not list(tmp_path.iterdir())


def _out_of_space(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_the_partial_file_of_a_killed_process_is_no_entry(tmp_path):
    cache = LatentCache(tmp_path)
    (tmp_path / f".{cache.path(IDENTITY).name}.123.partial").write_bytes(b"half")
    assert IDENTITY not in cache
    assert cache.get(IDENTITY) is None


def test_an_entry_replaced_while_it_is_read_is_whole(tmp_path, monkeypatch):
    """Head and tensors come from one open file: what another process puts in its place belongs to the next reader."""
    cache = LatentCache(tmp_path)
    cache.put(IDENTITY, sample(1.0))
    read_metadata = cache_module._metadata

    def replaced_behind_the_head(file):
        metadata = read_metadata(file)
        cache.put(IDENTITY, sample(2.0))
        return metadata

    monkeypatch.setattr(cache_module, "_metadata", replaced_behind_the_head)
    assert cache.get(IDENTITY).condition["scale"].item() == 1.0
    monkeypatch.undo()
    assert cache.get(IDENTITY).condition["scale"].item() == 2.0


def _write_and_read(folder: object, value: float, rounds: int, answers: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)
    cache = LatentCache(folder)
    bad = 0
    for _ in range(rounds):
        cache.put(IDENTITY, sample(value))
        got = cache.get(IDENTITY)
        whole = got is not None and len({*got.target.flatten().tolist(), got.condition["scale"].item()}) == 1
        bad += not whole
    answers.put(bad)


def test_two_processes_write_and_read_one_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [
        context.Process(target=_write_and_read, args=(tmp_path, value, 30, answers)) for value in (1.0, 2.0)
    ]
    for worker in workers:
        worker.start()
    assert [answers.get(timeout=300) for _ in workers] == [0, 0]
    for worker in workers:
        worker.join()
    assert len(list(tmp_path.iterdir())) == 1
