"""8-bit storage: which weights it takes, what it computes, what it keeps for backward, how scales survive."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from wan_parts import GOLDEN_CONFIG, golden_weights, velocity

from common.errors import UserError
from models.checkpoint import open_tensors
from models.eight_bit import EightBitLinear, multiply_integers, quantised, replace_linears
from models.linears import dequantise
from models.wan.checkpoint import WanCheckpoint
from models.wan.save import write_checkpoint
from models.wan.wrapper import WanI2V

CPU = torch.device("cpu")
E4M3 = torch.float8_e4m3fn
INT8 = torch.int8
LINEARS = [*(f"self_attn.{x}" for x in "qkvo"), *(f"cross_attn.{x}" for x in ("q", "k", "v", "o", "k_img", "v_img")),
           "ffn.0", "ffn.2"]
LARGE = {f"blocks.{i}.{name}.weight" for i in range(2) for name in LINEARS}


def linear(rows=24, columns=16, scale=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    module = EightBitLinear(columns, rows, bias=True)
    module.weight = nn.Parameter(torch.randn(rows, columns, generator=g).to(E4M3), requires_grad=False)
    module.bias = nn.Parameter(torch.randn(rows, generator=g), requires_grad=False)
    module.scale = scale
    return module


@pytest.mark.parametrize("scale", [None, torch.tensor(0.25), torch.rand(24, 1) + 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradient_are_those_of_the_upcast_weight(scale, dtype):
    module = linear(scale=scale)
    weight = module.weight.float() * (1.0 if scale is None else scale)
    ours, theirs = (torch.randn(3, 16, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    ours.requires_grad_(), theirs.requires_grad_()
    out = module(ours)
    reference = nn.functional.linear(theirs, weight.to(dtype), module.bias.to(dtype))
    assert torch.equal(out, reference)
    out.square().sum().backward()
    reference.square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)


SCALES = [torch.tensor(0.3), torch.tensor([0.3]), torch.tensor([[0.3]]), torch.rand(24) + 0.1, torch.rand(24, 1) + 0.1]


@pytest.mark.parametrize("scale", SCALES, ids=lambda scale: str(tuple(scale.shape)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [E4M3, torch.float8_e5m2, INT8])
def test_a_weight_is_scaled_in_fp32_and_rounded_once(stored, dtype, scale):
    weight = (torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) * 50).to(stored)
    rows = scale if scale.numel() == 1 else scale.view(-1, 1)
    assert torch.equal(dequantise(weight, scale, dtype), (weight.float() * rows).to(dtype))


class Largest(TorchDispatchMode):
    """The most bytes that one operation has returned."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.nbytes = max(self.nbytes, found.nbytes)
        return found


def test_upcasting_makes_no_fp32_copy_on_the_way():
    with Largest() as largest:
        dequantise(torch.zeros(24, 16, dtype=E4M3), torch.rand(24, 1), torch.bfloat16)
    assert largest.nbytes == 24 * 16 * 2


def test_it_computes_in_the_autocast_dtype():
    module, x = linear(), torch.randn(3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, module(x.bfloat16()))


def test_backward_keeps_the_8_bit_weight_and_no_copy():
    module, kept = linear(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        module(torch.randn(3, 16, requires_grad=True))
    assert [(tensor.dtype, tensor.data_ptr()) for tensor in kept] == [(E4M3, module.weight.data_ptr())]


def test_only_named_plain_linears_are_replaced():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Sequential(nn.Linear(2, 3, bias=False)), "c": nn.Linear(2, 2)})
    assert set(replace_linears(module, "blocks.0", r"blocks\.\d+\.(a|b\.0)")) == {"a", "b.0"}
    assert type(module["c"]) is nn.Linear
    assert module["b"][0].bias is None


def rounded(weight, stored=E4M3):
    """What 8 bits with one scale per row make of a weight."""
    scale = weight.float().abs().amax(1, keepdim=True) / (127 if stored == INT8 else 448)
    values = weight.float() / scale
    return (values.round() if stored == INT8 else values.to(E4M3).float()) * scale


@pytest.mark.parametrize("deviation", [1.0, 0.02, 0.001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("stored", "error"), [(E4M3, 0.03), (INT8, 0.009)])
def test_the_rounding_is_small_whatever_the_weights_size(tmp_path, dtype, deviation, stored, error):
    weight = (torch.randn(1100, 40, generator=torch.Generator().manual_seed(0)) * deviation).to(dtype)
    weight[7] = 0
    save_file({"w": weight}, tmp_path / "w.safetensors")
    entry, scale = quantised(open_tensors(tmp_path / "w.safetensors").entries["w"], stored, CPU)
    back = dequantise(entry.read(), scale, torch.float32)
    assert entry.read().dtype == stored
    assert (back - weight.float()).norm() < error * weight.float().norm()
    assert not back[7].any()
    assert scale.shape == (1100, 1)


def loaded(checkpoint, dtype=torch.float32, linears=None):
    model = WanI2V(checkpoint, CPU)
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), dtype, CPU, linears)
    return transformer


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("golden")
    write_checkpoint(path, golden_weights(golden))
    return path


@pytest.mark.parametrize("stored", [E4M3, INT8])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_only_the_blocks_linears_are_stored_in_8_bits(folder, base, stored):
    transformer = loaded(WanCheckpoint.open(folder), base, stored)
    dtypes = {name: parameter.dtype for name, parameter in transformer.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == stored} == LARGE
    others = {name: dtype for name, dtype in dtypes.items() if name not in LARGE}
    assert {dtype for name, dtype in others.items() if "norm" in name or "modulation" in name} == {torch.float32}
    assert {dtype for name, dtype in others.items() if "norm" not in name and "modulation" not in name} == {base}


@pytest.mark.parametrize(("dtype", "error"), [(E4M3, 0.05), (INT8, 0.015)])
def test_the_output_is_that_of_rounded_weights(folder, golden, dtype, error):
    """Nothing but the rounding of these weights: the model with the same weights rounded by hand is equal."""
    stored = velocity(loaded(WanCheckpoint.open(folder), linears=dtype), golden)
    by_hand = loaded(WanCheckpoint.open(folder))
    state = {n: rounded(w, dtype) if n in LARGE else w for n, w in by_hand.state_dict().items()}
    by_hand.load_state_dict(state, assign=True)
    assert torch.equal(stored, velocity(by_hand, golden))
    exact = golden("wan_i2v_dit").outputs["velocity"]
    assert 0 < (stored - exact).norm() / exact.norm() < error


@pytest.mark.parametrize("per_row", [False, True])
def test_a_scaled_file_keeps_its_bytes_and_scales(folder, golden, tmp_path, per_row):
    """Stored in 8 bits it computes exactly what the dequantised file computes, and nothing is rounded twice."""
    state = golden("wan_i2v_dit").weights
    for name in LARGE:
        scale = state[name].abs().amax(1, keepdim=True) / 448 if per_row else state[name].abs().max() / 448
        state[name] = (state[name] / scale).to(E4M3)
        state[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(state, tmp_path / "scaled.safetensors")
    checkpoint = WanCheckpoint.open(folder, transformer_path=tmp_path / "scaled.safetensors")
    assert checkpoint.config == GOLDEN_CONFIG
    kept, dequantised = loaded(checkpoint, linears=E4M3), loaded(checkpoint)
    name = "blocks.1.ffn.0.weight"
    assert torch.equal(kept.state_dict()[name].view(torch.uint8), state[name].view(torch.uint8))
    assert dequantised.state_dict()[name].dtype == torch.float32
    assert torch.equal(velocity(kept, golden), velocity(dequantised, golden))


def test_a_plain_8_bit_file_keeps_its_bytes_whatever_its_kind(folder, golden, tmp_path):
    state = golden("wan_i2v_dit").weights
    state |= {name: state[name].to(torch.float8_e5m2) for name in LARGE}
    save_file(state, tmp_path / "plain.safetensors")
    checkpoint = WanCheckpoint.open(folder, transformer_path=tmp_path / "plain.safetensors")
    kept = loaded(checkpoint, linears=E4M3)
    assert {kept.state_dict()[name].dtype for name in LARGE} == {torch.float8_e5m2}
    assert torch.equal(velocity(kept, golden), velocity(loaded(checkpoint), golden))


def test_an_8_bit_file_goes_to_integers_from_the_weights_that_it_means(folder, golden, tmp_path):
    state = golden("wan_i2v_dit").weights
    for name in LARGE:
        scale = state[name].abs().max() / 448
        state[name] = (state[name] / scale).to(E4M3)
        state[name.removesuffix("weight") + "scale_weight"] = scale
    save_file(state, tmp_path / "scaled.safetensors")
    checkpoint = WanCheckpoint.open(folder, transformer_path=tmp_path / "scaled.safetensors")
    integers, exact = velocity(loaded(checkpoint, linears=INT8), golden), velocity(loaded(checkpoint), golden)
    assert 0 < (integers - exact).norm() / exact.norm() < 0.015


@pytest.mark.parametrize("stored", [E4M3, INT8])
def test_integers_of_another_tool_are_refused(folder, golden, tmp_path, stored):
    """Without their scales they mean nothing; they are not taken for weights."""
    name = "blocks.1.ffn.0.weight"
    state = golden("wan_i2v_dit").weights
    state[name] = (state[name] * 100).to(INT8)
    save_file(state, tmp_path / "integers.safetensors")
    with pytest.raises(UserError, match=r"blocks\.1\.ffn\.0\.weight has dtype int8; expected floating point"):
        loaded(WanCheckpoint.open(folder, transformer_path=tmp_path / "integers.safetensors"), linears=stored)


def integer_linear(rows=24, columns=16):
    module = linear(rows, columns, torch.rand(rows, 1, generator=torch.Generator().manual_seed(2)) * 0.01 + 0.001)
    values = torch.randint(-127, 128, (rows, columns), dtype=INT8, generator=torch.Generator().manual_seed(3))
    module.weight = nn.Parameter(values, requires_grad=False)
    multiply_integers([module], CPU)
    assert module.integers
    return module


def by_tokens(x):
    """Each row rounded to 127 steps of its largest value."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0)


@pytest.mark.parametrize("shape", [(2, 40, 16), (3, 16), (1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_integers_are_those_of_rounded_numbers(dtype, shape):
    """Forward and backward against the same rounding in plain arithmetic; a token of zeros and one a thousand times larger."""
    module = integer_linear()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    x[..., 0, :] *= 1000
    if x.shape[-2] > 1:
        x[..., 1, :] = 0
    weight = module.weight.double() * module.scale
    given = x.clone().requires_grad_()
    out = module(given)
    expected = by_tokens(x.double()) @ weight.t() + module.bias
    tolerance = 1e-5 if dtype == torch.float32 else 0.004
    assert out.dtype == dtype
    assert (out - expected).norm() <= tolerance * expected.norm()
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    out.backward(slope)
    folded = by_tokens(slope.double() * module.scale.view(-1)) @ module.weight.double()
    assert (given.grad - folded).norm() <= tolerance * folded.norm()
    true = slope.double() @ weight
    assert 0 < (given.grad - true).norm() <= 0.02 * true.norm()


def test_wrong_products_of_a_device_are_found(monkeypatch):
    """As with cuBLAS of CUDA 12.1, for some numbers of rows (pytorch issue 107671)."""
    real = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: real(a, b) + (len(a) == 37))
    with pytest.raises(UserError, match="cpu multiplies 8-bit integers wrongly with torch"):
        multiply_integers([], CPU)


def test_a_device_without_such_products_is_told_of(monkeypatch):
    def unsupported(_a, _b):
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nand more")

    monkeypatch.setattr(torch, "_int_mm", unsupported)
    with pytest.raises(UserError, match=r"cpu cannot multiply 8-bit integers: CUBLAS_STATUS_NOT_SUPPORTED\. Leave the key out"):
        multiply_integers([], CPU)


def test_other_storage_is_left_alone():
    module = linear(scale=torch.rand(24, 1))
    multiply_integers([module], CPU)
    assert not module.integers
