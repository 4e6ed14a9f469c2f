"""Scales of 8-bit checkpoints are applied or the file is refused; never ignored."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from common.errors import UserError
from models.checkpoint import open_tensors
from models.scaled_fp8 import dequantised

FP8 = torch.float8_e4m3fn


def opened(tmp_path, state):
    save_file(state, tmp_path / "w.safetensors")
    return open_tensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("scale_name", ["q.scale_weight", "q.weight_scale"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2])
def test_weight_times_scale(tmp_path, scale_name, per_row, dtype):
    weight = torch.randn(6, 4)
    scale = weight.abs().amax(1, keepdim=True) / 8 if per_row else torch.tensor([0.125])
    state = {
        "q.weight": (weight / scale).to(dtype), scale_name: scale, "q.bias": torch.ones(6),
        "q.scale_input": torch.ones(()), "scaled_fp8": torch.zeros(2).to(FP8),
    }
    tensors = dequantised(opened(tmp_path, state))
    assert set(tensors) == {"q.weight", "q.bias"}
    assert tensors.dtypes["q.weight"] == torch.float32
    assert torch.equal(tensors["q.weight"], state["q.weight"].float() * scale)
    assert (tensors["q.weight"] - weight).abs().max() < 0.2 * weight.abs().max()
    assert torch.equal(tensors["q.weight"], tensors["q.weight"])  # pages were given back in between


def test_plain_fp8_stays_as_it_is(tmp_path):
    tensors = dequantised(opened(tmp_path, {"q.weight": torch.randn(4, 4).to(FP8)}))
    assert tensors.dtypes == {"q.weight": FP8}


@pytest.mark.parametrize("extra", ["q.comfy_quant", "q.weight_scale_inv", "q.weight_scale_2", "q.weight.absmax"])
def test_other_quantisations_are_refused(tmp_path, extra):
    state = {"q.weight": torch.zeros(4, 4).to(FP8), extra: torch.ones(1)}
    with pytest.raises(UserError, match="cannot be read here"):
        dequantised(opened(tmp_path, state))


def test_scales_that_fit_no_weight_are_refused(tmp_path):
    with pytest.raises(UserError, match="a scale without its weight"):
        dequantised(opened(tmp_path, {"q.scale_weight": torch.ones(1)}))
    state = {"q.weight": torch.zeros(4, 4).to(FP8), "q.scale_weight": torch.ones(3)}
    with pytest.raises(UserError, match=r"shape \(3,\) for a weight of \(4, 4\)"):
        dequantised(opened(tmp_path, state))
