"""The tiny HunyuanVideo learns exactly the released first-frame input, through the project's own transformer."""

from __future__ import annotations

from dataclasses import replace

import torch

from loraedit_ext import masks
from models.hunyuan.checkpoint import HunyuanCheckpoint, HunyuanTransformerFiles
from models.hunyuan.wrapper import HunyuanI2V
from pretraining import encoders, hunyuan


def test_the_training_forward_equals_the_models_and_reaches_every_parameter() -> None:
    model = hunyuan.build(replace(hunyuan.tiny_config(), num_double=1, num_single=1))
    for weight in model.final_layer.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    noise = torch.Generator().manual_seed(0)
    latents, timestep = torch.randn(2, 33, 2, 4, 4, generator=noise), torch.tensor([300.0, 700.0])
    text = torch.randn(2, encoders.TEXT_LEN, encoders.TEXT_DIM, generator=noise)
    text[:, 9:] = 0
    output = hunyuan.velocity(model, latents, timestep, text)
    unused = torch.zeros(2)
    torch.testing.assert_close(output, model(latents, timestep, *hunyuan.text_inputs(text), unused, unused))
    output.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in model.parameters())


def test_pooled_text_is_the_mean_of_the_words_without_padding() -> None:
    text = torch.zeros(1, 6, 4)
    text[0, :2] = torch.tensor([[1.0, 2, 3, 4], [3, 4, 5, 6]])
    states, lengths, pooled = hunyuan.text_inputs(text)
    assert states is text
    assert lengths.tolist() == [6]
    assert pooled.tolist() == [[2, 3, 4, 5]]


def test_its_conditioning_is_the_released_models_own(tiny_hunyuan) -> None:
    released = HunyuanI2V(HunyuanCheckpoint.open(tiny_hunyuan["latent_concat"]), torch.device("cpu"))
    video = torch.rand(3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    condition = released.encode_condition(video, masks.first_frame_only(9, 32, 48), video[:, 0], "a cat")
    noisy = torch.randn(1, 16, 3, 4, 6)
    batched = {name: tensor[None] for name, tensor in condition.items()}
    expected = released.model_inputs(noisy, torch.tensor([0.5]), batched)[0]
    known = released.encode_video(video)  # what it holds behind frame 0 must not matter
    known[:, :1] = released.encode_video(video[:, :1])
    assert torch.equal(torch.cat([noisy, hunyuan.conditioning(known[None])], dim=1), expected)


def test_its_weights_are_read_like_any_hunyuans(tmp_path) -> None:
    model = hunyuan.build(hunyuan.tiny_config())
    torch.save(model.state_dict(), tmp_path / "transformer.pt")
    files = HunyuanTransformerFiles(tmp_path / "transformer.pt")
    assert files.config == hunyuan.tiny_config()
    tensors = files.transformer_tensors()
    assert all(torch.equal(tensors[name], value) for name, value in model.state_dict().items())
