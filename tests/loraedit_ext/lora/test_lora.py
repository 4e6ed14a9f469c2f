"""LoRA: what is trained, how it starts, how it is exported and read back."""

from __future__ import annotations

import math

import pytest
import torch

from common.errors import UserError
from loraedit_ext import lora
from loraedit_ext.config import AdapterSettings
from loraedit_ext.wan import MaskedWan
from models.wan.checkpoint import WanCheckpoint

CPU = torch.device("cpu")
LINEARS = [f"self_attn.{x}" for x in "qkvo"] + [f"cross_attn.{x}" for x in "qkvo"] + ["ffn.0", "ffn.2"]


@pytest.fixture
def model(tiny_wan):
    return MaskedWan(WanCheckpoint.open(tiny_wan), CPU)


def build(model, settings=None, seed=0):
    transformer = model.build_transformer()
    layers = transformer.layers()
    model.load_weights(layers, torch.float32, CPU)
    if settings:
        lora.inject(transformer, model, settings)
        lora.initialise(layers, seed, CPU)
    return transformer, layers


def inputs(model):
    config = model.checkpoint.config
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 16, 2, 4, 4), (1, 20, 2, 4, 4), (1, 8, config.text_dim), (1, 5, config.image_dim)]
    noisy, y, text, image = (torch.randn(shape, generator=g) for shape in shapes)
    return noisy, torch.tensor([400.0]), y, text, image


def test_exactly_the_block_linears_without_image_keys_are_trained(model):
    transformer, layers = build(model, AdapterSettings(rank=4))
    expected = {f"blocks.{i}.{linear}.lora_{ab}.weight" for i in range(4) for linear in LINEARS for ab in "AB"}
    assert lora.trainable(layers).keys() == expected
    trained = {id(p) for p in lora.trainable(layers).values()}
    assert all(p.requires_grad == (id(p) in trained) for p in transformer.parameters())
    assert all(p.dtype == torch.float32 for p in lora.trainable(layers).values())


def test_a_fresh_lora_changes_nothing(model):
    bare, _ = build(model)
    adapted, _ = build(model, AdapterSettings(rank=4))
    with torch.no_grad():
        assert torch.equal(bare(*inputs(model)), adapted(*inputs(model)))


def test_the_start_does_not_depend_on_the_split_but_on_the_seed(model):
    _, whole = build(model, AdapterSettings(rank=4), seed=3)
    transformer = model.build_transformer()
    layers = transformer.layers()
    lora.inject(transformer, model, AdapterSettings(rank=4))
    lora.initialise(layers[3:], 3, CPU)
    for name, weight in lora.trainable(layers[3:]).items():
        assert torch.equal(weight, lora.trainable(whole)[name])
    _, other = build(model, AdapterSettings(rank=4), seed=4)
    name = "blocks.0.self_attn.q.lora_A.weight"
    assert not torch.equal(lora.trainable(whole)[name], lora.trainable(other)[name])


def test_the_start_is_kaiming_uniform_like_pefts(model):
    _, layers = build(model, AdapterSettings(rank=16))
    a = lora.trainable(layers)["blocks.1.ffn.2.lora_A.weight"].detach()
    bound = 1 / math.sqrt(a.shape[1])
    assert a.abs().max() <= bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def with_loras(model, stack):
    transformer, layers = build(model)
    lora.attach(transformer, layers, lora.combine(stack), CPU)
    with torch.no_grad():
        return transformer(*inputs(model))


def randomise(layers):
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for weight in lora.trainable(layers).values():
            weight.copy_(torch.randn(weight.shape, generator=g) * 0.1)


@pytest.mark.parametrize("alpha", [None, 1.0, 12.0])
def test_export_and_import_give_the_same_model_whatever_alpha_is(model, tmp_path, alpha):
    settings = AdapterSettings(rank=4, alpha=alpha)
    trained, layers = build(model, settings)
    randomise(layers)
    path = tmp_path / "adapter_model.safetensors"
    scale = (alpha or 4) / 4
    lora.save(path, lora.trainable(layers), model, {"rank": 4}, scale, torch.float32)
    again, fresh = build(model, settings, seed=1)
    lora.load(lora.trainable(fresh), lora.read(path, model), scale)
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs(model)), trained(*inputs(model)), atol=1e-5, rtol=0)


def test_the_exported_keys_are_comfyuis_and_the_strength_is_right_in_diffusers(model, tmp_path, tmp_path_factory):
    """diffusers assumes alpha = rank; with our alpha of 1 the scale must already be in the file."""
    from diffusers import WanTransformer3DModel
    from safetensors import safe_open

    from models.wan.random_weights import write_random_checkpoint

    trained, layers = build(model, AdapterSettings(rank=4, alpha=1.0))
    randomise(layers)
    path = tmp_path / "adapter_model.safetensors"
    lora.save(path, lora.trainable(layers), model, {"rank": 4}, 0.25, torch.float32)
    with safe_open(path, "pt") as file:
        names = set(file.keys())
    assert names == {f"diffusion_model.{name}" for name in lora.trainable(layers)}

    folder = tmp_path_factory.mktemp("diffusers")
    write_random_checkpoint(folder, layout="diffusers")
    theirs = WanTransformer3DModel.from_pretrained(folder / "transformer")
    from diffusers.loaders import WanLoraLoaderMixin

    theirs.load_lora_adapter(WanLoraLoaderMixin.lora_state_dict(str(path)), prefix="transformer")
    noisy, t, y, text, image = inputs(model)
    text = torch.nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
    image = torch.randn(1, 257, image.shape[2], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = trained(noisy, t, y, text, image)
        reference = theirs(torch.cat([noisy, y], 1), t, text, image, return_dict=False)[0]
        bare, _ = build(model)
        effect = (ours - bare(noisy, t, y, text, image)).abs().max()
    assert effect > 0.1
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


def test_strength_scales_the_effect(model, tmp_path):
    _, layers = build(model, AdapterSettings(rank=4))
    randomise(layers)
    path = tmp_path / "a.safetensors"
    lora.save(path, lora.trainable(layers), model, {}, 1.0, torch.float32)
    bare, _ = build(model)
    outputs = {}
    for strength in (0.0, 0.5):
        outputs[strength] = with_loras(model, [(lora.read(path, model), strength)])
    for name, weight in lora.trainable(layers).items():
        if ".lora_B." in name:
            weight.data.mul_(0.5)
    lora.save(path, lora.trainable(layers), model, {}, 1.0, torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(outputs[0.0], bare(*inputs(model)), atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs[0.5], with_loras(model, [(lora.read(path, model), 1.0)]), atol=1e-6, rtol=0)
    assert (outputs[0.5] - outputs[0.0]).abs().max() > 0.01


def test_excluded_linears_stay_bare_and_a_misspelled_one_is_told(model):
    _, layers = build(model, AdapterSettings(rank=4, exclude_modules=["ffn.0", "cross_attn.q"]))
    assert not any("ffn.0" in n or "cross_attn.q." in n for n in lora.trainable(layers))
    with pytest.raises(UserError, match=r"`ffn\.9` ends the name of no LoRA target.*self_attn\.q"):
        build(model, AdapterSettings(rank=4, exclude_modules=["ffn.9"]))


def test_foreign_and_broken_files_are_refused(model, tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="no such LoRA"):
        lora.read(tmp_path / "nothing.safetensors", model)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        lora.read(tmp_path / "cut.safetensors", model)
    save_file({"unet.to_q.lora_down.weight": torch.zeros(1)}, tmp_path / "sd.safetensors")
    with pytest.raises(UserError, match=r"not a LoRA for wan.*unet\.to_q"):
        lora.read(tmp_path / "sd.safetensors", model)


def test_a_lora_of_another_model_or_rank_is_refused(model, tmp_path):
    _, layers = build(model, AdapterSettings(rank=4))
    path = tmp_path / "a.safetensors"
    metadata = {"model": {**model.describe(), "dim": 5120}}
    lora.save(path, lora.trainable(layers), model, metadata, 1.0, torch.float32)
    with pytest.raises(UserError, match=r"another model.*dim: LoRA 5120, checkpoint 96"):
        lora.check_model(lora.read(path, model), model)
    _, wider = build(model, AdapterSettings(rank=8))
    with pytest.raises(UserError, match=r"80 of another shape.*file \(4, 96\), model \(8, 96\)"):
        lora.load(lora.trainable(wider), lora.read(path, model))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_over_8_bit_storage_are_those_over_the_same_weights_in_fp32(model, autocast, recompute):
    """The LoRA itself stays fp32; its gradients differ from full storage by nothing but the rounding of the base."""
    gradients, losses = [], []
    for storage in (torch.float8_e4m3fn, None):
        transformer = model.build_transformer()
        layers = transformer.layers()
        model.load_weights(layers, torch.float32, CPU, storage)
        if storage is None:
            for name, p in transformer.named_parameters():
                if model.dtype_of(name, torch.float32, torch.float8_e4m3fn) != torch.float32:
                    scale = p.data.abs().amax(1, keepdim=True) / 448
                    p.data = (p.data / scale).to(torch.float8_e4m3fn).float() * scale
        lora.inject(transformer, model, AdapterSettings(rank=4))
        lora.initialise(layers, 0, CPU)
        randomise(layers)
        for layer in layers:
            layer.recompute = recompute
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = transformer(*inputs(model)).square().mean()
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in lora.trainable(layers).items()})
    assert {g.dtype for g in gradients[0].values()} == {torch.float32}
    assert losses[0] == losses[1]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-7, rtol=1e-5)
    assert max(g.abs().max() for g in gradients[0].values()) > 1e-3
