"""The Wan transformer against the original code's numbers and against diffusers' class."""

from __future__ import annotations

import pytest
import torch

from models.layers import thaw
from models.wan.config import WanConfig
from models.wan.transformer import WanTransformer


@pytest.fixture
def case(golden):
    """The golden model, its inputs in our order, and the file."""
    g = golden("wan_i2v_dit")
    i = g.inputs
    model = WanTransformer(WanConfig(dim=96, ffn_dim=160, num_heads=3, num_layers=2, freq_dim=64, text_dim=64,
                                     image_dim=80))
    model.load_state_dict(g.weights, strict=True)
    text = torch.zeros(2, 512, 64)
    text[0, :17], text[1, :40] = i["context_0"], i["context_1"]
    return model.requires_grad_(False), (i["x"], i["t"], i["y"], text, i["clip_fea"]), g


def test_velocity_equals_the_original(case):
    model, inputs, g = case
    torch.testing.assert_close(model(*inputs), g.outputs["velocity"], atol=2e-5, rtol=0)


def test_every_intermediate_equals_the_original(case):
    model, inputs, g = case
    embed, first, second, _ = model.layers()
    stream = embed(inputs)
    hidden, modulation, time, text, image, _, _ = stream
    expected = g.outputs
    torch.testing.assert_close(hidden, expected["hidden_0"], atol=1e-5, rtol=0)
    torch.testing.assert_close(thaw(time), expected["time_emb"], atol=1e-5, rtol=0)
    torch.testing.assert_close(thaw(modulation), expected["time_proj"], atol=1e-5, rtol=0)
    torch.testing.assert_close(thaw(text)[:, :44], expected["txt_tokens"], atol=1e-5, rtol=0)
    torch.testing.assert_close(thaw(image)[:, :8], expected["img_tokens"], atol=1e-5, rtol=0)
    stream = first(stream)
    torch.testing.assert_close(stream[0], expected["hidden_1"], atol=1e-4, rtol=0)
    torch.testing.assert_close(second(stream)[0], expected["hidden_2"], atol=1e-4, rtol=0)


def test_forward_pads_short_text_itself(case):
    model, (x, t, y, text, image), g = case
    velocity = model(x, t, y, text[:, :40], image)
    torch.testing.assert_close(velocity, g.outputs["velocity"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("recompute", [False, True])
def test_output_and_input_gradient_equal_diffusers(case, recompute):
    """Gradients with respect to the latents, through our own key map, with and without checkpointing."""
    from diffusers import WanTransformer3DModel

    from models.wan.checkpoint import to_diffusers

    model, (x, t, y, text, image), g = case
    theirs = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=32, in_channels=36, text_dim=64, freq_dim=64, ffn_dim=160,
        num_layers=2, image_dim=80, added_kv_proj_dim=96,
    )  # fmt: skip
    theirs.load_state_dict({to_diffusers(name): w for name, w in g.weights.items()}, strict=True)
    theirs.requires_grad_(False)
    ours_x, theirs_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    stream = (ours_x, t, y, text, image)
    for layer in model.layers():
        layer.recompute = recompute
        stream = layer(stream)
    reference = theirs(torch.cat([theirs_x, y], 1), t, text, image, return_dict=False)[0]
    torch.testing.assert_close(stream, reference, atol=1e-4, rtol=0)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    (stream * weight).sum().backward()
    (reference * weight).sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, atol=1e-4, rtol=0)


def test_bf16_autocast_keeps_an_fp32_residual_and_a_small_error(case):
    model, inputs, g = case
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stream = inputs
        for layer in model.layers()[:-1]:
            stream = layer(stream)
            assert stream[0].dtype == torch.float32
        velocity = model(*inputs)
    expected = g.outputs["velocity"]
    assert (velocity - expected).norm() / expected.norm() < 0.01


def test_only_the_hidden_state_crosses_a_boundary_as_a_float(case):
    model, inputs, _ = case
    hidden, *constants = model.layers()[0](inputs)
    assert hidden.is_floating_point()
    assert hidden.is_contiguous()
    assert not any(c.is_floating_point() for c in constants)


def test_layers_own_every_parameter_once_under_its_original_name(case):
    model, _, g = case
    owned = [(name, p) for layer in model.layers() for name, p in layer.original_parameters()]
    assert {name for name, _ in owned} == set(g.weights)
    assert len(owned) == len(g.weights)
