"""The kernel that is asked for computes attention, in training and editing, and only while it is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import attention as of_torch

from benchmarks import attention as benchmark
from common.errors import UserError
from loraedit_ext import launch
from loraedit_ext.config import load_config
from models import attention_backend as backend
from models import layers
from models.attention_backend import attention_backend


def order():
    """Kernels in the order of preference, those that are switched off left out."""
    return of_torch._cur_sdpa_kernel_backends(with_priority=True)


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
def test_the_kernel_comes_first_and_others_stay(name):
    before = order()
    with attention_backend(name):
        assert order()[0] == backend._KERNELS[name]
        assert set(order()) == set(before)
    assert order() == before
    with attention_backend("torch"):
        assert order() == before


def test_strictly_there_is_no_other():
    q = torch.randn(1, 2, 8, 16)
    with attention_backend("cudnn", strict=True), pytest.raises(RuntimeError, match="No viable backend"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    with attention_backend("cudnn"):
        torch.nn.functional.scaled_dot_product_attention(q, q, q)


@pytest.fixture
def package(monkeypatch):
    """A package that torch knows, in place of FlashAttention 3's."""
    handle, name = SimpleNamespace(remove=lambda: None), "FA3"
    monkeypatch.setitem(of_torch._registry._FLASH_ATTENTION_IMPLS, name, lambda: handle)
    return name


def test_a_package_is_there_only_meanwhile(package):
    with attention_backend(package):
        assert of_torch.current_flash_attention_impl() == package
        assert order()[0] == of_torch.SDPBackend.FLASH_ATTENTION
    assert of_torch.current_flash_attention_impl() is None
    with pytest.raises(ValueError, match="halfway"), attention_backend(package):
        raise ValueError("halfway")
    assert of_torch.current_flash_attention_impl() is None


def test_a_run_without_the_package_ends_before_it_begins(edit_folder):
    config = load_config(edit_folder.config, ["attention_backend=FA4"])
    before = order()
    for verb in (lambda: launch.train(config, dry_run=True), lambda: launch.edit(config, None, None)):
        with pytest.raises(UserError, match=r"attention_backend = 'FA4' does not work here: .*needs the package flash-attn-4"):
            verb()
    assert order() == before


def test_training_and_sampling_ask_for_it(edit_folder, monkeypatch):
    """And what it computes is what the other kernel does, to its rounding."""
    seen, real = set(), layers.attention

    def noted(*qkv):
        seen.add(order()[0])
        return real(*qkv)

    for module in ("models.wan.transformer", "models.hunyuan.transformer"):
        monkeypatch.setattr(f"{module}.attention", noted)
    launch.train(load_config(edit_folder.config))
    assert seen == {of_torch.SDPBackend.FLASH_ATTENTION}
    for verb in (launch.train, lambda config: launch.edit(config, None, None)):
        seen.clear()
        verb(load_config(edit_folder.config, ["attention_backend=efficient", "edit.steps=2"]))
        assert seen == {of_torch.SDPBackend.EFFICIENT_ATTENTION}
    assert edit_folder.losses(1) == pytest.approx(edit_folder.losses(0), rel=1e-5)


def test_the_benchmark_measures_what_there_is():
    q, k, v, slope = (torch.randn(1, 2100, 2, 16, dtype=torch.bfloat16) for _ in range(4))
    here = benchmark.row("flash", 2, (q, k, v), slope, torch.device("cpu")).split(" | ")
    assert all(float(cell) > 0 for cell in here[:2])
    assert 0 < float(here[2]) < 0.01
    assert "No viable backend" in benchmark.row("cudnn", 1, (q, k, v), slope, torch.device("cpu"))
