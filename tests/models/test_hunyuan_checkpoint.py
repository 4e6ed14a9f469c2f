"""HunyuanVideo-I2V checkpoints: both layouts, against diffusers' own classes; what is refused and how."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from models.hunyuan.checkpoint import TRANSFORMER_FILE, VAE_FILE, HunyuanCheckpoint, HunyuanTransformerFiles
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.random_weights import main, tiny_config
from models.hunyuan.transformer import HunyuanTransformer
from models.hunyuan.wrapper import HunyuanI2V

CPU = torch.device("cpu")
VARIANTS = ("token_replace", "latent_concat")


def loaded(checkpoint: HunyuanCheckpoint, dtype=torch.float32) -> HunyuanTransformer:
    model = HunyuanI2V(checkpoint, CPU)
    transformer = model.build_transformer()
    model.load_weights(transformer.layers(), dtype, CPU)
    return transformer


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variant_and_all_sizes_come_from_the_weights(tiny_hunyuan, variant):
    checkpoint = HunyuanCheckpoint.open(tiny_hunyuan[variant])
    assert checkpoint.layout == "original"
    assert checkpoint.config == tiny_config(variant)
    assert checkpoint.config.image_interleave == {"token_replace": 4, "latent_concat": 2}[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_released_sizes(variant):
    config = HunyuanConfig.i2v_13b(variant)
    with torch.device("meta"):
        model = HunyuanTransformer(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(12.8e9, rel=0.02)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert HunyuanConfig.from_shapes(shapes) == config


def test_weights_in_bf16_keep_the_norms_in_fp32(tiny_hunyuan):
    transformer = loaded(HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]), torch.bfloat16)
    dtypes = {name: p.dtype for name, p in transformer.named_parameters()}
    assert {t for n, t in dtypes.items() if "norm" in n} == {torch.float32}
    assert {t for n, t in dtypes.items() if "norm" not in n} == {torch.bfloat16}


def library_transformer(variant: str):
    """diffusers' class with random weights, and inputs for it."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=16 if variant == "token_replace" else 33, num_attention_heads=2, attention_head_dim=32,
        num_layers=2, num_single_layers=2, num_refiner_layers=2, mlp_ratio=2.0, text_embed_dim=24,
        guidance_embeds=variant == "token_replace", pooled_projection_dim=20, rope_axes_dim=(8, 12, 12),
        image_condition_type=variant,
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 1 else None
    mask = torch.arange(10) < torch.tensor([[7], [10]])
    inputs = {
        "hidden_states": torch.randn(2, model.config.in_channels, 3, 8, 6), "timestep": torch.tensor([870.0, 12.0]),
        "encoder_hidden_states": torch.randn(2, 10, 24), "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(2, 20),
        "guidance": torch.tensor([6000.0, 1000.0]) if variant == "token_replace" else None,
    }
    return model, inputs


def ours_of(inputs, latents):
    preserved = torch.zeros(2, 1, 3, 8, 6)
    preserved[:, :, 0] = 1
    guidance = torch.zeros(2) if inputs["guidance"] is None else inputs["guidance"]
    return (latents, inputs["timestep"], inputs["encoder_hidden_states"], inputs["encoder_attention_mask"].sum(1),
            inputs["pooled_projections"], guidance, preserved)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_diffusers_folder_gives_diffusers_values_and_gradients(tiny_hunyuan, tmp_path, variant):
    library, inputs = library_transformer(variant)
    library.save_pretrained(tmp_path / "transformer")
    root = tiny_hunyuan[variant]
    shutil.copytree(root / "text_encoder_i2v", tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "image_processor").mkdir()
    shutil.move(tmp_path / "text_encoder" / "tokenizer.json", tmp_path / "tokenizer")
    shutil.move(tmp_path / "text_encoder" / "preprocessor_config.json", tmp_path / "image_processor")
    shutil.copytree(root / "text_encoder_2", tmp_path / "text_encoder_2")
    HunyuanI2V(HunyuanCheckpoint.open(root, transformer_path=tmp_path / "transformer"), CPU).vae.model.save_pretrained(
        tmp_path / "vae"
    )
    checkpoint = HunyuanCheckpoint.open(tmp_path)
    assert checkpoint.layout == "diffusers"
    assert checkpoint.image_processor == tmp_path / "image_processor"
    checkpoint.load_vae()
    transformer = loaded(checkpoint)
    theirs_in, ours_in = (inputs["hidden_states"].clone().requires_grad_() for _ in range(2))
    theirs = library(**{**inputs, "hidden_states": theirs_in}).sample
    ours = transformer(*ours_of(inputs, ours_in))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    weight = torch.randn_like(theirs)
    (theirs * weight).sum().backward()
    (ours * weight).sum().backward()
    assert (ours_in.grad - theirs_in.grad).abs().max() < 1e-4 * theirs_in.grad.abs().max()


@pytest.mark.parametrize("name", ["latents", "latents_1frame", "latents_long"])
def test_the_vae_encodes_as_the_original(golden, tmp_path, name):
    part = golden("hunyuan_vae")
    vae = golden_vae(part, tmp_path)
    video = part.inputs["video_long"] if name.endswith("long") else part.inputs["video"]
    video = video[:, :, :1] if name.endswith("1frame") else video
    assert (vae.encode(video) - part.outputs[name]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["", "_1frame", "_long"])
def test_the_vae_decodes_as_the_original(golden, tmp_path, name):
    part = golden("hunyuan_vae")
    decoded = golden_vae(part, tmp_path).decode(part.outputs[f"latents{name}"])
    assert (decoded - part.outputs[f"decoded{name}"].clamp(-1, 1)).abs().max() < 4e-5


def golden_vae(part, folder):
    path = folder / "vae" / "pytorch_model.pt"
    path.parent.mkdir()
    torch.save({"state_dict": {f"vae.{name}": weight for name, weight in part.weights.items()}}, path)
    (path.parent / "config.json").write_text(json.dumps({"norm_num_groups": 4, "scaling_factor": 0.476986}))
    checkpoint = HunyuanCheckpoint(*[folder] * 1, path, *[folder] * 5)
    return checkpoint.load_vae()


def test_large_frames_are_encoded_in_tiles_but_never_cut_in_time(tiny_hunyuan):
    vae = HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]).load_vae()
    assert vae.model.use_tiling
    assert not vae.model.use_framewise_encoding
    assert not vae.model.use_framewise_decoding
    assert (vae.model.tile_sample_min_width, vae.model.tile_sample_stride_width) == (256, 192)


@pytest.fixture(scope="module")
def text_encoder(tiny_hunyuan):
    return HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]).load_text_encoder(dtype=torch.float32)


@torch.no_grad()
def test_text_states_are_image_tokens_then_the_prompts_from_the_third_last_state(text_encoder):
    """Re-derived: the image token spelled out 576 times, run through LLaVA's language model by hand."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE

    image = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = text_encoder.encode("a red square jumps", image)
    pipeline = text_encoder.pipeline
    llava, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    head, _, tail = DEFAULT_PROMPT_TEMPLATE["template"].partition("{}")
    ids = tokenizer(head + "a red square jumps" + tail)["input_ids"]
    prompt = tokenizer("a red square jumps", add_special_tokens=False)["input_ids"]
    where = ids.index(llava.config.image_token_index)
    expanded = ids[:where] + [llava.config.image_token_index] * 576 + ids[where + 1:]
    pixels = pipeline.image_processor(
        ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy(), return_tensors="pt"
    ).pixel_values
    states = llava(input_ids=torch.tensor([expanded]), pixel_values=pixels, output_hidden_states=True)
    state = states.hidden_states[-3][0]
    first = 103 + 575
    last = first + len(prompt) + 4  # the prompt's end and the assistant's header are cut, the line break behind stays
    expected = torch.cat([state[5:581:4], state[first : first + len(prompt)], state[last:]])
    assert len(ids) + 575 == last + 1
    assert found["text"].shape == (144 + 252, 64)
    assert int(found["text_length"]) == len(expected)
    assert (found["text"][: len(expected)] - expected).abs().max() < 1e-5
    assert not found["text"][len(expected):].any()


def test_latent_concat_keeps_every_second_image_token(tiny_hunyuan, text_encoder):
    checkpoint = HunyuanCheckpoint.open(tiny_hunyuan["latent_concat"])
    states = checkpoint.load_text_encoder(dtype=torch.float32).encode("a red square", torch.zeros(3, 32, 32))
    assert states["text"].shape == (288 + 252, 64)
    assert states["pooled"].shape == (48,)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("meta", torch.float16)])
def test_the_text_encoders_are_in_float16_as_released_but_for_a_cpu(tiny_hunyuan, device, dtype):
    pipeline = HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]).load_text_encoder(device).pipeline
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {dtype}
    assert {p.dtype for p in pipeline.text_encoder_2.parameters()} == {dtype}


def test_bf16_text_states_are_near_those_of_fp32(tiny_hunyuan, text_encoder):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rounded = HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]).load_text_encoder().encode("a red square", image)
    exact = text_encoder.encode("a red square", image)
    for name in ("text", "pooled"):
        assert 0 < (rounded[name] - exact[name]).norm() / exact[name].norm() < 0.03
    assert rounded["text_length"] == exact["text_length"]


def test_prompt_and_picture_both_matter(text_encoder):
    grey, white = torch.zeros(3, 32, 32), torch.ones(3, 32, 32)
    base = text_encoder.encode("a red square", grey)
    other = text_encoder.encode("a blue square, rolling", grey)
    picture = text_encoder.encode("a red square", white)
    assert torch.equal(base["text"][:144], other["text"][:144])
    assert other["text_length"] > base["text_length"]
    assert not torch.allclose(base["pooled"], other["pooled"])
    assert not torch.allclose(base["text"][:144], picture["text"][:144])
    assert torch.equal(base["pooled"], picture["pooled"])


def test_a_very_long_prompt_is_cut_not_refused_and_the_cut_is_told(text_encoder, caplog):
    states = text_encoder.encode("word " * 400, torch.zeros(3, 32, 32))
    assert states["text"].shape == (144 + 252, 64)
    assert int(states["text_length"]) == 144 + 252
    count = len(text_encoder.pipeline.tokenizer("word " * 400, add_special_tokens=False)["input_ids"])
    assert f"The prompt has {count} tokens, LLaVA reads 252: the last {count - 252} are cut off. It begins: word" in caplog.text


@pytest.mark.parametrize(("length", "told"), [(252, False), (253, True)])
def test_as_many_tokens_of_a_prompt_are_read_as_the_message_says(text_encoder, caplog, length, told):
    """The tiny tokenizer has a token for each letter: whether the last one changes the states tells whether it was read."""
    prompts = ["a" * (length - 1) + last for last in "bc"]
    assert len(text_encoder.pipeline.tokenizer(prompts[0], add_special_tokens=False)["input_ids"]) == length
    first, second = (text_encoder.encode(prompt, torch.zeros(3, 32, 32))["text"] for prompt in prompts)
    assert torch.equal(first, second) == told
    assert ("LLaVA reads 252: the last 1 are cut off" in caplog.text) == told


def test_another_tokenizer_is_refused(tiny_hunyuan, tmp_path):
    shutil.copytree(tiny_hunyuan["token_replace"] / "text_encoder_i2v", tmp_path / "llava")
    path = tmp_path / "llava" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {k: v for k, v in content["model"]["vocab"].items() if k != "Describe"}
    path.write_text(json.dumps(content))
    checkpoint = HunyuanCheckpoint.open(tiny_hunyuan["token_replace"], llm_path=tmp_path / "llava")
    with pytest.raises(UserError, match=r"template has 110 tokens \(expected 103\)"):
        checkpoint.load_text_encoder()


def test_missing_weights_of_an_encoder_are_named(tiny_hunyuan, tmp_path):
    shutil.copytree(tiny_hunyuan["token_replace"] / "text_encoder_2", tmp_path / "clip")
    path = tmp_path / "clip" / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if "layers.1.self_attn.q_proj.weight" not in k}
    save_file(state, path, metadata={"format": "pt"})
    checkpoint = HunyuanCheckpoint.open(tiny_hunyuan["token_replace"], clip_path=tmp_path / "clip")
    with pytest.raises(UserError, match=r"clip: 1 weights of CLIPTextModel are missing .*q_proj"):
        checkpoint.load_text_encoder()


def test_missing_parts_are_told_together(tmp_path):
    (tmp_path / "hunyuan-video-t2v-720p").mkdir()
    with pytest.raises(UserError) as error:
        HunyuanCheckpoint.open(tmp_path)
    text = str(error.value)
    assert all(part in text for part in (TRANSFORMER_FILE, VAE_FILE, "text_encoder_i2v", "text_encoder_2"))
    assert "holds: hunyuan-video-t2v-720p/" in text


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("double_blocks.1.txt_attn_proj.weight"), r"1 missing: double_blocks\.1\.txt_attn_proj\.weight"),
    (lambda s: s.update({"img_in.proj.weight": torch.zeros(96, 20, 1, 2, 2)}), "20 input channels"),
    (lambda s: s.pop("img_in.proj.weight"), "no HunyuanVideo transformer"),
    (lambda s: s.pop("vector_in.in_layer.weight"), "incomplete HunyuanVideo transformer"),
])
def test_a_wrong_transformer_is_refused(tiny_hunyuan, tmp_path, change, message):
    root = tiny_hunyuan["token_replace"]
    state = dict(torch.load(root / TRANSFORMER_FILE, weights_only=True)["module"])
    change(state)
    torch.save({"module": state}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        HunyuanCheckpoint.open(root, transformer_path=tmp_path / "other.pt").transformer_tensors()


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.update({"img_in.proj.weight": torch.zeros(96, 32, 1, 2, 2)}), "32 input channels. This is SkyReels-V1-I2V"),
    (lambda s: s.update({"clean_x_embedder.proj.weight": torch.zeros(2)}), "this is FramePack"),
    (lambda s: s.update({"byt5_in.fc1.weight": torch.zeros(2)}), r"HunyuanVideo 1\.5 or HunyuanImage"),
    (lambda s: s.update({"img_in.weight": torch.zeros(2, 2)}), "this is a Flux transformer"),
    (lambda s: [s.pop(n) for n in list(s) if n.startswith("single_blocks")], r"single_blocks\.0 is missing"),
    (lambda s: s.update({"double_blocks.99999999999999999999.x": torch.zeros(2)}), "the weights do not fit the model"),
])
def test_relatives_are_called_by_their_names(tiny_hunyuan, tmp_path, change, message):
    state = dict(torch.load(tiny_hunyuan["token_replace"] / TRANSFORMER_FILE, weights_only=True)["module"])
    change(state)
    torch.save({"module": state}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=message):
        HunyuanTransformerFiles(tmp_path / "other.pt").transformer_tensors()


@pytest.mark.parametrize(("variant", "name", "refused"), [
    ("token_replace", "hunyuan_video_t2v_720p_bf16.pt", True),
    ("token_replace", "hunyuan_video_720_cfgdistill_bf16.pt", True),
    ("token_replace", "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt", True),
    ("token_replace", "hunyuan_video_v2_replace_image_to_video_720p_bf16.pt", False),
    ("token_replace", "my_i2v_from_t2v.pt", False),
    ("latent_concat", "t2v.pt", False),
])
def test_text_to_video_can_only_be_told_by_its_name(tiny_hunyuan, tmp_path, variant, name, refused):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(tiny_hunyuan[variant] / TRANSFORMER_FILE, path)
    files = HunyuanTransformerFiles(path)
    if refused:
        with pytest.raises(UserError, match=r"text-to-video HunyuanVideo.*needs an I2V checkpoint"):
            files.transformer_tensors()
    else:
        assert files.config.variant == variant


def test_a_missing_part_of_a_fused_linear_is_named_as_diffusers_has_it(tmp_path):
    library, _ = library_transformer("token_replace")
    library.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    save_file({n: v for n, v in state.items() if n != "transformer_blocks.1.attn.to_k.weight"}, path)
    with pytest.raises(UserError, match=r"1 of the 3 parts of a linear are missing: transformer_blocks\.1\.attn\.to_k\.weight"):
        HunyuanTransformerFiles(tmp_path).transformer_tensors()
    save_file({n: v for n, v in state.items() if not n.startswith("single_transformer_blocks.0.proj_mlp.")
               and not n.startswith("single_transformer_blocks.0.attn.to_")}, path)
    with pytest.raises(UserError, match=r"2 missing: single_transformer_blocks\.0\.attn\.to_q\.weight"):
        HunyuanTransformerFiles(tmp_path).transformer_tensors()
    save_file(state | {"transformer_blocks.0.attn.to_v.weight": torch.zeros(64, 1)}, path)
    with pytest.raises(UserError, match=r"to_v\.weight has shape \(64, 1\) beside"):
        HunyuanTransformerFiles(tmp_path).transformer_tensors()


def test_identity_follows_the_files(tiny_hunyuan, tmp_path):
    shutil.copytree(tiny_hunyuan["token_replace"], tmp_path / "copy")
    first = HunyuanCheckpoint.open(tiny_hunyuan["token_replace"]).identity()
    copy = HunyuanCheckpoint.open(tmp_path / "copy")
    assert json.loads(json.dumps(copy.identity())) == first
    path = tmp_path / "copy" / "text_encoder_i2v" / "preprocessor_config.json"
    path.write_text(path.read_text() + " ")
    assert copy.identity() != first


def test_the_script_writes_what_the_test_fixtures_hold(tiny_hunyuan, tmp_path, capsys):
    main([str(tmp_path / "out"), "--variant", "latent_concat", "--double-blocks", "1"])
    checkpoint = HunyuanCheckpoint.open(tmp_path / "out")
    assert checkpoint.config == replace(tiny_config("latent_concat"), num_double=1)
    assert "random HunyuanVideo-I2V checkpoint, latent_concat" in capsys.readouterr().out
