"""Wan2.2-I2V-A14B: the transformer without the image branch, and the two experts of a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from wan_parts import GOLDEN_CONFIG

from common.errors import UserError
from models.layers import freeze
from models.wan.checkpoint import IMAGE_ENCODER_FILE, WanCheckpoint, to_diffusers
from models.wan.config import WanConfig, transformer_shapes
from models.wan.random_weights import main, random_transformer, tiny_config, write_random_checkpoint
from models.wan.transformer import WanTransformer
from models.wan.wrapper import WanI2V

CONFIG = replace(GOLDEN_CONFIG, image_dim=None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same random weights in both layouts."""
    made = {}
    for layout in ("original", "diffusers"):
        made[layout] = tmp_path_factory.mktemp("wan22") / layout
        write_random_checkpoint(made[layout], tiny_config("wan2.2"), layout=layout)
    return made


@pytest.fixture
def weights():
    return random_transformer(CONFIG, torch.Generator().manual_seed(0))


@pytest.fixture
def inputs():
    shapes = (1, 16, 3, 8, 8), (1, 20, 3, 8, 8), (1, 512, 64)
    noisy, y, text = (torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))) for shape in shapes)
    return noisy, torch.tensor([950.0]), y, text


def test_its_shapes_are_wan21s_without_the_image_branch():
    ours, wan21 = transformer_shapes(CONFIG), transformer_shapes(GOLDEN_CONFIG)
    assert ours == {name: shape for name, shape in wan21.items() if "img" not in name}
    released = replace(WanConfig.i2v_14b(), image_dim=None)
    assert len(transformer_shapes(released)) == 1095  # 40 blocks of 27, 15 beside them
    assert WanConfig.from_tensors(transformer_shapes(released)) == released


@pytest.mark.parametrize("config_json", [CONFIG.original_json(), CONFIG.diffusers_json()])
def test_config_is_recovered_with_either_config_json(config_json):
    assert WanConfig.from_tensors(transformer_shapes(CONFIG), config_json) == CONFIG


def test_a_config_json_with_an_image_branch_is_refused():
    with pytest.raises(UserError, match=r"image_dim = None, the config\.json says 80"):
        WanConfig.from_tensors(transformer_shapes(CONFIG), GOLDEN_CONFIG.diffusers_json(), "folder")


@pytest.mark.parametrize("absent", ["img_emb.", ".k_img."])
def test_half_an_image_branch_is_wan21_with_tensors_missing(absent):
    shapes = {name: shape for name, shape in transformer_shapes(GOLDEN_CONFIG).items() if absent not in name}
    if absent == "img_emb.":
        with pytest.raises(UserError, match=r"incomplete Wan transformer, 'img_emb\.proj\.0\.weight' is missing"):
            WanConfig.from_tensors(shapes, GOLDEN_CONFIG.original_json())
    else:
        assert WanConfig.from_tensors(shapes, GOLDEN_CONFIG.original_json()) == GOLDEN_CONFIG


@pytest.mark.parametrize("recompute", [False, True])
def test_output_and_input_gradient_equal_diffusers(weights, inputs, recompute):
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        num_attention_heads=3, attention_head_dim=32, in_channels=36, text_dim=64, freq_dim=64, ffn_dim=160,
        num_layers=2, image_dim=None, added_kv_proj_dim=None,
    )  # fmt: skip
    theirs.load_state_dict({to_diffusers(name): value for name, value in weights.items()}, strict=True)
    ours = WanTransformer(CONFIG)
    ours.load_state_dict(weights, strict=True)
    for model in (ours, theirs):
        model.requires_grad_(False)
    noisy, t, y, text = inputs
    ours_x, theirs_x = noisy.clone().requires_grad_(), noisy.clone().requires_grad_()
    stream = (ours_x, t, y, text)
    for layer in ours.layers():
        layer.recompute = recompute
        stream = layer(stream)
    reference = theirs(torch.cat([theirs_x, y], 1), t, text, return_dict=False)[0]
    torch.testing.assert_close(stream, reference, atol=1e-4, rtol=0)
    weight = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(0))
    (stream * weight).sum().backward()
    (reference * weight).sum().backward()
    torch.testing.assert_close(ours_x.grad, theirs_x.grad, atol=1e-4, rtol=0)


def test_the_image_is_left_out_of_the_stream_and_text_is_padded(weights, inputs):
    model = WanTransformer(CONFIG)
    model.load_state_dict(weights, strict=True)
    noisy, t, y, text = inputs
    with torch.no_grad():
        hidden, *constants = model.layers()[0](inputs)
        assert len(constants) == 5  # modulation, time, text, rope, grid
        assert hidden.is_floating_point()
        assert not any(c.is_floating_point() for c in constants)
        assert torch.equal(constants[2], freeze(model.text_embedding(text)))
        short = text[:, :40]
        zeros = torch.cat([short, torch.zeros(1, 472, 64)], dim=1)
        assert torch.equal(model(noisy, t, y, short), model(noisy, t, y, zeros))


@pytest.mark.parametrize("expert", ["high", "low"])
def test_both_layouts_give_an_expert_the_same_tensors(folders, expert):
    original, diffusers = (WanCheckpoint.open(folder, expert=expert) for folder in folders.values())
    assert (original.layout, diffusers.layout) == ("original", "diffusers")
    assert original.config == diffusers.config == tiny_config("wan2.2")
    ours, theirs = original.transformer_tensors(), diffusers.transformer_tensors()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_experts_differ_and_share_the_encoders(folders):
    high, low = (WanCheckpoint.open(folders["original"], expert=expert) for expert in ("high", "low"))
    assert not torch.equal(high.transformer_tensors()["head.head.weight"], low.transformer_tensors()["head.head.weight"])
    assert high.identity() == low.identity()
    assert "image_encoder" not in high.identity()


def test_the_folders_are_the_releases(folders):
    names = {path.name for path in folders["original"].iterdir()}
    assert names == {"high_noise_model", "low_noise_model", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google"}
    names = {path.name for path in folders["diffusers"].iterdir()}
    assert names == {"transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "model_index.json"}


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_without_a_choice_of_the_expert_it_is_refused(folders, layout):
    with pytest.raises(UserError, match=r"two experts.*model\.expert = \"high\" or \"low\""):
        WanCheckpoint.open(folders[layout])


def test_a_transformer_of_its_own_needs_no_expert(folders):
    low = folders["original"] / "low_noise_model"
    checkpoint = WanCheckpoint.open(folders["original"], transformer_path=low)
    assert checkpoint.transformer == low
    assert checkpoint.expert is None
    assert WanCheckpoint.open(folders["original"], transformer_path=low, expert="low").expert == "low"


def test_one_downloaded_expert_is_enough_and_the_other_is_asked_for_by_name(folders, tmp_path):
    for layout, (high, low) in {"original": ("high_noise_model", "low_noise_model"),
                                "diffusers": ("transformer", "transformer_2")}.items():
        folder = shutil.copytree(folders[layout], tmp_path / layout, ignore=shutil.ignore_patterns(low))
        assert WanCheckpoint.open(folder, expert="high").transformer == folder / high
        with pytest.raises(UserError, match=rf"{low}.*not there"):
            WanCheckpoint.open(folder, expert="low")


@pytest.mark.parametrize("expert", ["high", "low"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_an_expert_of_wan21_is_refused(tmp_path, layout, expert):
    write_random_checkpoint(tmp_path / layout, layout=layout)
    with pytest.raises(UserError, match=r"model\.expert = \"(high|low)\".*Wan2\.1.*remove"):
        WanCheckpoint.open(tmp_path / layout, expert=expert)


def test_wan21_still_needs_its_image_encoder(tmp_path):
    write_random_checkpoint(tmp_path / "wan")
    (tmp_path / "wan" / IMAGE_ENCODER_FILE).unlink()
    with pytest.raises(UserError, match="clip_path"):
        WanCheckpoint.open(tmp_path / "wan")


def test_the_model_is_told_no_image_and_loads_no_clip(folders):
    model = WanI2V(WanCheckpoint.open(folders["original"], expert="high"), torch.device("cpu"))
    video = torch.rand(3, 5, 32, 32) * 2 - 1
    condition = model.encode_condition(video, torch.ones(5, 32, 32, dtype=torch.bool), video[:, 0], "a cat")
    assert set(condition) == set(model.condition_names) == {"y", "text"}
    assert set(model.loaders) == {"vae", "text"}
    assert model.describe()["variant"] == "wan2.2-i2v"
    assert model.describe()["expert"] == "high"
    assert "image encoder" not in model.checkpoint.describe_layout()
    inputs = model.model_inputs(torch.zeros(1, 16, 2, 4, 4), torch.tensor([0.9]), {k: v[None] for k, v in condition.items()})
    assert len(inputs) == 4


def test_the_command_writes_it(tmp_path, capsys):
    main([str(tmp_path / "tiny"), "--variant", "wan2.2", "--num-layers", "2"])
    assert WanCheckpoint.open(tmp_path / "tiny", expert="low").config.num_layers == 2
    assert "Wan2.2-I2V" in capsys.readouterr().out
