"""A transformer's dimensions come from its weights; what is no Wan-I2V is refused by name."""

from __future__ import annotations

import pytest
from wan_parts import GOLDEN_CONFIG

from common.errors import UserError
from models.wan.config import WanConfig, transformer_shapes


def test_shapes_are_those_of_the_originals_golden_file(golden):
    weights = golden("wan_i2v_dit").weights
    assert len(weights) == 87
    assert transformer_shapes(GOLDEN_CONFIG) == {name: tuple(value.shape) for name, value in weights.items()}


def test_the_released_size():
    shapes = transformer_shapes(WanConfig.i2v_14b())
    count = 0
    for shape in shapes.values():
        size = 1
        for side in shape:
            size *= side
        count += size
    assert len(shapes) == 1303
    assert 16.3e9 < count < 16.5e9  # the release says 16.4 B with the image branches
    assert WanConfig.from_tensors(shapes) == WanConfig.i2v_14b()


@pytest.mark.parametrize("config_json", [GOLDEN_CONFIG.original_json(), GOLDEN_CONFIG.diffusers_json()])
def test_config_is_recovered_with_either_config_json(config_json):
    assert WanConfig.from_tensors(transformer_shapes(GOLDEN_CONFIG), config_json) == GOLDEN_CONFIG


def test_what_shapes_cannot_tell_comes_from_the_json():
    config = WanConfig.from_tensors(
        transformer_shapes(GOLDEN_CONFIG), {"num_heads": 6, "eps": 1e-5, "text_len": 64}
    )
    assert (config.num_heads, config.eps, config.text_len) == (6, 1e-5, 64)


def test_without_a_json_heads_must_be_128_wide():
    with pytest.raises(UserError, match="0 heads do not divide dim 96"):
        WanConfig.from_tensors(transformer_shapes(GOLDEN_CONFIG), None, "tiny.safetensors")


@pytest.mark.parametrize("changed", [{"num_heads": 7}, {"num_heads": "3"}, {"num_heads": 32}, {"eps": "x"},
                                     {"text_len": 0}, {"dim": 5120}, {"num_layers": 40}])
def test_a_json_that_does_not_fit_is_refused(changed):
    config_json = GOLDEN_CONFIG.original_json() | changed
    with pytest.raises(UserError, match=r"config\.json"):
        WanConfig.from_tensors(transformer_shapes(GOLDEN_CONFIG), config_json, "folder")


def shapes_with_channels(channels):
    return transformer_shapes(GOLDEN_CONFIG) | {"patch_embedding.weight": (96, channels, 1, 2, 2)}


def test_other_models_are_refused_by_name():
    t2v = {name: shape for name, shape in shapes_with_channels(16).items() if "img" not in name}
    expected = "file: this is Wan2.1-T2V: 16 input channels; LoRA-Edit needs an I2V checkpoint with 36."
    with pytest.raises(UserError) as error:
        WanConfig.from_tensors(t2v, {"model_type": "t2v"}, "file")
    assert str(error.value) == expected
    with pytest.raises(UserError, match="FLF2V"):
        WanConfig.from_tensors(shapes_with_channels(36) | {"img_emb.emb_pos": (1, 514, 80)})
    with pytest.raises(UserError, match="48 input channels"):
        WanConfig.from_tensors(shapes_with_channels(48))
    with pytest.raises(UserError, match="HunyuanVideo"):
        WanConfig.from_tensors({"double_blocks.0.img_mod.linear.weight": (1, 1)})
    with pytest.raises(UserError, match="LoRA"):
        WanConfig.from_tensors({"diffusion_model.blocks.0.ffn.0.lora_A.weight": (1, 1)})


def test_an_incomplete_transformer_is_refused():
    shapes = transformer_shapes(GOLDEN_CONFIG)
    gap = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.0.")}
    with pytest.raises(UserError, match="blocks 0 are missing"):
        WanConfig.from_tensors(gap, GOLDEN_CONFIG.original_json())
    with pytest.raises(UserError, match=r"blocks 2, 3, 4, 5, 6 \.\.\. are missing"):
        WanConfig.from_tensors(shapes | {"blocks.900000000.norm3.bias": (96,)})
    del shapes["head.head.weight"]
    with pytest.raises(UserError, match=r"head\.head\.weight"):
        WanConfig.from_tensors(shapes, GOLDEN_CONFIG.original_json())
