"""What travels between pipeline stages, and what a GPU's autocast makes of the norms; no GPU is needed for either."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.hunyuan import random_weights as hunyuan
from models.hunyuan.transformer import HunyuanTransformer
from models.layers import RMSNorm, _plain_is_faster, attention, freeze, thaw
from models.wan import random_weights as wan
from models.wan.transformer import WanTransformer

NCCL = {
    torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
}
"""What NCCL can send (torch/csrc/distributed/c10d/NCCLUtils.hpp); gloo, which the tests run on, takes int16 as well."""


def wan_chain():
    config = wan.tiny_config()
    text, image = torch.randn(1, config.text_len, config.text_dim), torch.randn(1, 5, config.image_dim)
    latents = torch.randn(1, 16, 2, 4, 4), torch.tensor([500.0]), torch.randn(1, 20, 2, 4, 4)
    return WanTransformer(config), (*latents, text, image)


def hunyuan_chain(variant):
    config = hunyuan.tiny_config(variant)
    latents, preserved = torch.randn(1, config.in_channels, 2, 4, 4), torch.ones(1, 1, 2, 4, 4)
    text = torch.randn(1, 6, config.text_dim), torch.tensor([4]), torch.randn(1, config.pooled_dim)
    return HunyuanTransformer(config), (latents, torch.tensor([500.0]), *text, torch.tensor([6000.0]), preserved)


CHAINS = {
    "wan": wan_chain, "token_replace": lambda: hunyuan_chain("token_replace"),
    "latent_concat": lambda: hunyuan_chain("latent_concat"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", CHAINS)
@torch.no_grad()
def test_nccl_and_deepspeed_know_every_dtype_that_crosses_a_boundary(family, dtype):
    from deepspeed.runtime.pipe.engine import PipelineEngine

    transformer, stream = CHAINS[family]()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for layer in transformer.layers()[:-1]:
            stream = layer(stream)
            sent = [tensor.dtype for tensor in stream]
            assert set(sent) <= NCCL & set(PipelineEngine.ID_TO_DTYPE)
            assert all(tensor.is_contiguous() for tensor in stream)  # as NCCL wants them
            assert [dtype.is_floating_point for dtype in sent] == [True] + [False] * (len(sent) - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 4, 1)])
def test_constants_survive_transit_bit_for_bit(dtype, shape):
    x = torch.randn(shape).to(dtype)
    sent = freeze(x.transpose(0, 1))
    arrived = torch.empty(sent.shape, dtype=sent.dtype).copy_(sent)
    assert thaw(arrived).dtype == dtype
    assert torch.equal(thaw(arrived), x.transpose(0, 1))


def test_an_integer_that_travels_as_it_is_cannot_be_thawed_by_mistake():
    for dtype in (torch.uint8, torch.int64):
        with pytest.raises(KeyError):
            thaw(torch.zeros(2, 2, dtype=dtype))


@pytest.fixture
def cuda_autocast():
    """CUDA's autocast for tensors without memory: `torch.autocast` alone would switch it off where there is no GPU."""
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    with FakeTensorMode(), torch.no_grad():
        yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.usefixtures("cuda_autocast")
def test_the_rms_norm_keeps_bf16_under_a_gpus_autocast():
    with torch.device("cuda"):
        norm, x = RMSNorm(8, 1e-6), torch.empty(2, 3, 8, dtype=torch.bfloat16)
    assert torch.nn.functional.rms_norm(x, (8,)).dtype == torch.float32  # the autocast is on
    assert norm(x).dtype == torch.bfloat16


@pytest.mark.parametrize("keys", [9, 4])
def test_plain_attention_is_torchs_and_so_are_its_gradients(keys):
    """bf16 on a CPU goes another way; against fp32 through torch's own. Bounds: bf16's rounding, 2^-8 of a value."""
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, count, 3, 8, generator=random) for count in (9, keys, keys)]
    upstream = torch.randn(2, 9, 24, generator=random)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (part.to(dtype).detach().requires_grad_() for part in inputs)
        out = attention(q, k, v)
        assert (out.dtype, out.shape) == (dtype, (2, 9, 24))
        out.backward(upstream.to(dtype))
        results.append([out, q.grad, k.grad, v.grad])
    for exact, rounded in zip(*results, strict=True):
        assert (rounded.float() - exact).abs().max() < 0.02 * exact.abs().max()


def test_long_sequences_do_not_keep_their_attention_weights():
    """40 heads and 32,760 tokens, as Wan-14B has at 480p: plain attention would keep 80 GiB a layer."""
    number = torch.zeros((), dtype=torch.bfloat16)
    clip, tile = number.expand(1, 40, 32760, 128), number.expand(4, 6, 576, 32)
    assert not _plain_is_faster(clip, clip)
    assert _plain_is_faster(tile, tile)
