"""The HunyuanVideo transformer against the original's numbers and against diffusers."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from models.hunyuan.config import HunyuanConfig, rope_axes
from models.hunyuan.random_weights import tiny_config
from models.hunyuan.transformer import Conditions, DoubleBlock, HunyuanTransformer, SingleBlock
from models.layers import PipelineLayer, rope_table

VARIANTS = ("latent_concat", "token_replace")


def build(part) -> HunyuanTransformer:
    given = part.info["config"]
    config = HunyuanConfig.from_shapes({name: tuple(w.shape) for name, w in part.weights.items()})
    config = replace(config, rope_axes=tuple(given["rope_dim_list"]))
    model = HunyuanTransformer(config)
    model.load_state_dict(part.weights)
    return model.eval()


def first_frame(x: torch.Tensor) -> torch.Tensor:
    preserved = torch.zeros_like(x[:, :1])
    preserved[:, :, 0] = 1
    return preserved


def arguments(inputs, x=None, preserved=None) -> tuple[torch.Tensor, ...]:
    x = inputs["x"] if x is None else x
    preserved = first_frame(x) if preserved is None else preserved
    lengths = inputs["text_mask"].sum(1)
    guidance = inputs.get("guidance", torch.zeros(len(x)))
    return x, inputs["t"], inputs["text_states"], lengths, inputs["text_states_2"], guidance, preserved


def agree(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 3e-5) -> None:
    """Some CPUs round otherwise: by 1e-4 of a largest value of 7 on one."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance + 3e-5 * theirs.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_every_stage_equals_the_original(golden, variant):
    part = golden(f"hunyuan_i2v_dit_{variant}")
    model, expected = build(part), part.outputs
    assert model.config.variant == variant
    stream = arguments(part.inputs)
    lengths = part.inputs["text_mask"].sum(1).tolist()
    states = []
    for layer in model.layers():
        stream = layer(stream)
        states.append(stream[0] if isinstance(stream, tuple) else stream)
    tokens = expected["img_0"].shape[1]
    doubles, singles = model.config.num_double, model.config.num_single

    def compare(state, img=None, txt=None, joint=None):
        if joint is not None:
            img, txt = joint[:, :tokens], joint[:, tokens:]
        agree(state[:, :tokens], img)
        for sample, length in enumerate(lengths):
            agree(state[sample, tokens : tokens + length], txt[sample, :length])

    compare(states[0], expected["img_0"], expected["txt_0"])
    for i in range(doubles):
        compare(states[1 + i], expected[f"img_double_{i}"], expected[f"txt_double_{i}"])
    for i in range(singles):
        compare(states[1 + doubles + i], joint=expected[f"single_{i}"])
    agree(states[-1], expected["velocity"])


@torch.no_grad()
def test_spatial_token_replacement_equals_the_golden_extension(golden):
    part = golden("hunyuan_i2v_dit_token_replace")
    model = build(part)
    mask = part.inputs["ext_spatial.token_mask"]
    preserved = mask.unsqueeze(1).repeat_interleave(2, 3).repeat_interleave(2, 4).float()
    velocity = model(*arguments(part.inputs, part.inputs["ext_spatial.x"], preserved))
    agree(velocity, part.outputs["ext_spatial.velocity"])
    released = model(*arguments(part.inputs, part.inputs["ext_spatial.x"]))
    assert (released - velocity).abs().max() > 1, "the mask must matter"


@torch.no_grad()
def test_samples_with_different_masks_and_texts_do_not_mix(golden):
    part = golden("hunyuan_i2v_dit_token_replace")
    model = build(part)
    preserved = first_frame(part.inputs["x"])
    preserved[1, :, 1:, :4] = 1
    preserved[1, :, 0, 4:] = 0
    batch = arguments(part.inputs, preserved=preserved)
    together = model(*batch)
    for sample in range(2):
        alone = model(*(x[sample : sample + 1] for x in batch))
        agree(together[sample : sample + 1], alone, 1e-5)


@torch.no_grad()
def test_padding_has_no_say(golden):
    part = golden("hunyuan_i2v_dit_latent_concat")
    model = build(part)
    plain = list(arguments(part.inputs))
    changed = plain.copy()
    changed[2] = plain[2] + 5 * (1 - part.inputs["text_mask"]).unsqueeze(-1)
    assert torch.equal(model(*plain), model(*changed))


def test_a_token_counts_as_preserved_only_with_all_its_latents(golden):
    layer = build(golden("hunyuan_i2v_dit_token_replace")).layers()[0]
    preserved = torch.ones(1, 1, 1, 4, 4)
    preserved[0, 0, 0, 0, 3] = 0
    assert layer.tokens(preserved).tolist() == [[1, 0, 1, 1]]


@pytest.mark.parametrize("variant", VARIANTS)
def test_rope_table_equals_the_original(golden, variant):
    part = golden(f"hunyuan_i2v_dit_{variant}")
    _, _, frames, height, width = part.inputs["x"].shape
    table = rope_table((frames, height // 2, width // 2), tuple(part.info["config"]["rope_dim_list"]), 256.0)
    agree(table[0].repeat_interleave(2, -1), part.outputs["rope_cos"], 1e-6)
    agree(table[1].repeat_interleave(2, -1), part.outputs["rope_sin"], 1e-6)


def test_released_rope_axes():
    assert rope_axes(128) == (16, 56, 56)


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_hidden_state_is_a_float_between_layers(golden, variant):
    part = golden(f"hunyuan_i2v_dit_{variant}")
    stream = build(part).layers()[0](arguments(part.inputs))
    assert stream[0].is_floating_point()
    assert not any(constant.is_floating_point() for constant in stream[1:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_blocks_give_the_same_gradients(golden, variant):
    part = golden(f"hunyuan_i2v_dit_{variant}")
    model = build(part)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        stream = arguments(part.inputs)
        for layer in model.layers():
            assert isinstance(layer, PipelineLayer)
            layer.recompute = recompute
            stream = layer(stream)
        stream.square().mean().backward()
        gradients.append({n: w.grad for n, w in model.named_parameters() if re.match("(double|single)_blocks", n)})
    for name, plain in gradients[0].items():
        assert plain.abs().max() > 0, name
        agree(gradients[1][name], plain, 1e-5)


@torch.no_grad()
def test_bf16_autocast_stays_close(golden):
    part = golden("hunyuan_i2v_dit_token_replace")
    model = build(part)
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(*arguments(part.inputs))
    assert velocity.dtype == torch.float32
    error = (velocity - part.outputs["velocity"]).norm() / part.outputs["velocity"].norm()
    assert error < 0.03


def kept_for_backward(variant: str, block_of) -> int:
    """Bytes that one block keeps for backward, its own weights left out."""
    config = tiny_config(variant)
    block = block_of(config).requires_grad_(False)
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, or another tensor could get its place
        return tensor

    x = torch.randn(1, 256 + 8, config.dim, requires_grad=True)
    rope = rope_table((4, 8, 8), config.rope_axes, 256.0)
    vector = torch.randn(1, config.dim)
    replaced = (vector, torch.rand(1, 256) > 0.5) if variant == "token_replace" else ()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        block(x, Conditions(vector, rope, [x.shape[1]], *replaced))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("block_of", [DoubleBlock, SingleBlock])
def test_token_replacement_keeps_no_more_for_backward(block_of):
    """Modulation vectors spread over all tokens would be kept: a third more in a double block."""
    assert kept_for_backward("token_replace", block_of) < 1.03 * kept_for_backward("latent_concat", block_of)
