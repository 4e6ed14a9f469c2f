"""The shipped loaders give the original encoders' numbers, from the original layout and from diffusers folders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from wan_parts import CLIP_HEADS, assert_close, golden_weights, with_statistics

from common.errors import UserError
from models.checkpoint import open_tensors
from models.wan import encoders
from models.wan.checkpoint import IMAGE_ENCODER_FILE, VAE_FILE, WanCheckpoint
from models.wan.encoders import WanImageEncoder, WanTextEncoder, WanVAE
from models.wan.keys import vae_keys
from models.wan.save import write_checkpoint


@pytest.fixture(scope="module", params=["original", "diffusers"])
def checkpoint(request, golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_checkpoint(folder, golden_weights(golden), request.param)
    return WanCheckpoint.open(folder)


@pytest.fixture(scope="module")
def vae(checkpoint):
    return checkpoint.load_vae()


@pytest.fixture(scope="module")
def image_encoder(checkpoint):
    config = {"num_attention_heads": CLIP_HEADS} if checkpoint.image_encoder.is_file() else None
    if config is None:
        return checkpoint.load_image_encoder()
    return WanImageEncoder.load(open_tensors(checkpoint.image_encoder), num_heads=CLIP_HEADS)


@pytest.mark.parametrize("whole", [encoders.WHOLE_CLIP, 0])
def test_vae_encodes_like_the_original(golden, vae, monkeypatch, whole):
    monkeypatch.setattr(encoders, "WHOLE_CLIP", whole)
    vectors = golden("wan_vae")
    tolerance, video = vectors.info["tolerance"], vectors.inputs["video"]
    condition = torch.zeros_like(video)
    condition[:, :, 0] = video[:, :, 0]
    latents = vae.encode(video)
    assert latents.dtype == torch.float32
    assert_close(latents, vectors.outputs["latents"], tolerance)
    assert_close(latents * vae.std + vae.mean, vectors.outputs["latents_raw"], tolerance)
    assert_close(vae.encode(video[:, :, :1]), vectors.outputs["latents_1frame"], tolerance)
    assert_close(vae.encode(condition), vectors.outputs["cond_latents"], tolerance)


@pytest.mark.parametrize("whole", [encoders.WHOLE_CLIP, 0])
def test_vae_decodes_like_the_original(golden, vae, monkeypatch, whole):
    monkeypatch.setattr(encoders, "WHOLE_CLIP", whole)
    vectors = golden("wan_vae")
    tolerance, expected = vectors.info["tolerance"], vectors.outputs["decoded_raw"].clamp(-1, 1)
    assert_close(vae.decode(vectors.outputs["latents"]), expected, tolerance)
    one = vectors.outputs["decoded_raw_1frame"].clamp(-1, 1)
    assert_close(vae.decode(vectors.outputs["latents_1frame"]), one, tolerance)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_a_short_clip_in_one_piece_equals_the_librarys_loop(vae, monkeypatch, frames):
    video = torch.rand(2, 3, frames, 32, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole = vae.encode(video)
    picture = vae.decode(whole)
    monkeypatch.setattr(encoders, "WHOLE_CLIP", 0)
    torch.testing.assert_close(vae.encode(video), whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(vae.decode(whole), picture, atol=1e-4, rtol=1e-4)


def test_a_short_clip_makes_one_call_and_a_long_one_a_call_for_every_four_frames(vae, monkeypatch):
    calls = []
    hook = vae.model.encoder.conv_out.register_forward_hook(lambda *_: calls.append("encoder"))
    vae.encode(torch.zeros(1, 3, 13, 16, 16))
    assert len(calls) == 1
    monkeypatch.setattr(encoders, "WHOLE_CLIP", 0)
    vae.encode(torch.zeros(1, 3, 13, 16, 16))
    hook.remove()
    assert len(calls) == 1 + 4


def test_vae_statistics_are_the_released_ones(golden, vae):
    inputs = golden("wan_vae").inputs
    assert torch.equal(vae.mean.flatten(), inputs["latents_mean"])
    assert torch.equal(vae.std.flatten(), inputs["latents_std"])


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_vae_with_statistics_of_its_own(golden, tmp_path, layout):
    mean, std = torch.linspace(-1, 1, 16), torch.linspace(0.5, 2, 16)
    write_checkpoint(tmp_path, with_statistics(golden_weights(golden), mean, std), layout)
    vae = WanCheckpoint.open(tmp_path).load_vae()
    vectors = golden("wan_vae")
    expected = (vectors.outputs["latents_raw"] - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)
    assert_close(vae.encode(vectors.inputs["video"]), expected, vectors.info["tolerance"])
    assert_close(vae.decode(expected), vectors.outputs["decoded_raw"].clamp(-1, 1), vectors.info["tolerance"])


@pytest.mark.parametrize("shape", [(7, 48, 32), (8, 48, 32), (9, 44, 32), (9, 48, 30)])
def test_vae_refuses_what_does_not_fit_its_grid(vae, shape):
    with pytest.raises(UserError, match="4n\\+1"):
        vae.encode(torch.zeros(1, 3, *shape))


def test_a_prefixed_vae_loads(golden, tmp_path):
    path = tmp_path / "vae.pth"
    torch.save({"model." + name: value for name, value in golden("wan_vae").weights.items()}, path)
    vectors = golden("wan_vae")
    latents = WanVAE.load(open_tensors(path)).encode(vectors.inputs["video"])
    assert_close(latents, vectors.outputs["latents"], vectors.info["tolerance"])


def test_text_encoder_matches_the_original_at_valid_tokens(golden, checkpoint):
    vectors = golden("umt5_encoder")
    encoder = checkpoint.load_text_encoder(dtype=torch.float32)
    for row, length in enumerate(vectors.inputs["seq_lens"].tolist()):
        features = encoder.embed(vectors.inputs["ids"][row, :length].tolist())
        assert_close(features, vectors.outputs["embeddings"][row, :length], vectors.info["tolerance"])


def test_text_features_have_one_row_per_token(golden, checkpoint):
    def tokenizer(prompt: str) -> list[int]:
        return [*(2 + len(word) for word in prompt.split()), 1]

    encoder = WanTextEncoder.load(open_tensors(checkpoint.text_encoder), tokenizer)
    features = encoder.encode("three short words")
    assert features.shape == (4, 64)
    assert features.dtype == torch.float32
    assert encoder.dtype == torch.bfloat16


def test_text_encoder_refuses_another_tokenizers_ids(checkpoint):
    encoder = checkpoint.load_text_encoder()
    with pytest.raises(UserError, match="token id 320 is beyond the text encoder's vocabulary of 320"):
        encoder.embed([320, 1])


def test_text_embedding_is_held_once(checkpoint):
    model = checkpoint.load_text_encoder().model
    assert model.encoder.embed_tokens.weight is model.shared.weight


def test_images_are_preprocessed_by_the_originals_rule(golden, image_encoder):
    vectors = golden("clip_visual")
    tolerance = vectors.info["tolerance"]
    assert_close(image_encoder.preprocess(vectors.inputs["image"]), vectors.outputs["pixel_values"], tolerance)
    large = image_encoder.preprocess(_large_image(vectors))
    assert_close(large[:, :, ::16], vectors.outputs["pixel_values_large_rows"], tolerance)


def test_image_features_are_the_originals(golden, image_encoder):
    vectors = golden("clip_visual")
    tolerance = vectors.info["tolerance"]
    assert_close(image_encoder.encode(vectors.inputs["image"])[None], vectors.outputs["features"], tolerance)
    features = image_encoder.encode(_large_image(vectors))
    assert_close(features[None], vectors.outputs["features_large"], tolerance)


def _large_image(vectors) -> torch.Tensor:
    return (vectors.inputs["image_large_uint8"].permute(2, 0, 1) / 255 - 0.5) / 0.5


def test_the_towers_last_block_is_not_loaded(image_encoder):
    assert len(image_encoder.model.encoder.layers) == 3


def test_encoders_are_frozen(vae, image_encoder, checkpoint):
    for model in (vae.model, image_encoder.model, checkpoint.load_text_encoder().model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize(("encoder", "file", "means"), [
    (WanVAE, IMAGE_ENCODER_FILE, "Wan's CLIP file"), (WanImageEncoder, VAE_FILE, "Wan's VAE"),
])
def test_a_wrong_file_is_told_from_its_names(golden, tmp_path, encoder, file, means):
    write_checkpoint(tmp_path, golden_weights(golden))
    with pytest.raises(UserError, match=means):
        encoder.load(open_tensors(tmp_path / file))


@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_vae_of_another_depth(golden, tmp_path, monkeypatch, layout):
    """One residual block per level: the decoder's numbering differs from the released one's."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=6, num_res_blocks=1).eval()
    keys = vae_keys(4, 1)
    state = {keys.to_left(name): value for name, value in model.state_dict().items()}
    write_checkpoint(tmp_path, replace(golden_weights(golden), vae=state), layout)
    vae = WanCheckpoint.open(tmp_path).load_vae()
    video = golden("wan_vae").inputs["video"]
    with torch.no_grad():
        expected = model.encode(video).latent_dist.mode()
    monkeypatch.setattr(encoders, "WHOLE_CLIP", 0)  # as the library does it, to the bit
    assert torch.equal(vae.encode(video), (expected - vae.mean) / vae.std)


@pytest.mark.parametrize("name", ["encoder.downsamples.900000000.resample.1.weight", "decoder.up_blocks.9.x"])
def test_hostile_names_do_not_hang(golden, tmp_path, name):
    state = golden("wan_vae").weights | {name: torch.ones(1)}
    torch.save(state, tmp_path / VAE_FILE)
    with pytest.raises(UserError):
        WanVAE.load(open_tensors(tmp_path / VAE_FILE))


def test_hostile_layer_numbers_do_not_hang(golden, tmp_path, checkpoint):
    weights = golden("umt5_encoder").weights | {"blocks.900000000.norm1.weight": torch.ones(64)}
    torch.save(weights, tmp_path / "t5.pth")
    with pytest.raises(UserError, match="900000000"):
        WanTextEncoder.load(open_tensors(tmp_path / "t5.pth"), checkpoint.load_tokenizer())


def test_a_vae_that_lacks_a_tensor_is_refused_in_its_own_names(golden, tmp_path):
    weights = golden("wan_vae").weights
    del weights["decoder.upsamples.4.shortcut.bias"]
    torch.save(weights, tmp_path / VAE_FILE)
    with pytest.raises(UserError, match=r"1 missing: decoder\.upsamples\.4\.shortcut\.bias\."):
        WanVAE.load(open_tensors(tmp_path / VAE_FILE))
