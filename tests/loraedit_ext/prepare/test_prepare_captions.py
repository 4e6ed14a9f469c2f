"""prepare.py asks a vision-language model for the captions that are not given; random weights alone."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    pipeline,
)

import prepare as verb
from common.errors import UserError
from dataset.images import write_png
from loraedit_ext.prepare.captioner import EDITED_QUESTION, QUESTION, Captioner, sentence
from loraedit_ext.prepare.draft import Draft, Drawn
from tests.loraedit_ext.prepare.test_page import NOTHING

SPECIAL = ("<s>", "</s>", "<pad>", "[UNK]", "<image>")
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
FLORENCE_QUESTION = "Describe in detail what is shown in the image."
WORDS = sorted(set(f"{QUESTION} {EDITED_QUESTION} {FLORENCE_QUESTION}".replace('"', " ").replace(":", " ").split()))


def tokenizer() -> PreTrainedTokenizerFast:
    """Knows the words of the questions, and others to answer with."""
    words = (*SPECIAL, *WORDS, *(f"word{index}" for index in range(40)))
    made = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="[UNK]",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip


def save(folder: Path, model: torch.nn.Module, processor) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory) -> Path:
    """Random weights of a model that is asked by its chat template."""
    words, images = tokenizer(), CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
        chat_template=TEMPLATE, num_additional_image_tokens=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1)
    return save(tmp_path_factory.mktemp("vlm") / "llava", LlavaForConditionalGeneration(config), processor)


@pytest.fixture(scope="session")
def tiny_florence(tmp_path_factory) -> Path:
    """Random weights of Florence-2, which is asked by its task."""
    words = tokenizer()
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, resample=3, image_seq_length=5)
    text = BartConfig(
        vocab_size=len(words), d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32,
        encoder_attention_heads=2, decoder_attention_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        decoder_start_token_id=1, forced_eos_token_id=1, max_position_embeddings=160,
    )  # fmt: skip
    vision = {
        "embed_dim": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1], "num_groups": [1, 1, 1, 1],
        "window_size": 2, "projection_dim": 32, "max_temporal_embeddings": 4, "max_position_embeddings": 8,
    }  # fmt: skip
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=4)
    processor = Florence2Processor(images, words, num_additional_image_tokens=1)
    return save(tmp_path_factory.mktemp("vlm") / "florence", Florence2ForConditionalGeneration(config), processor)


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (60, 80, 3), np.uint8)


@pytest.fixture
def job(tmp_path) -> list[str]:
    """A clip of five frames, its first one edited, and the call that makes a job of them."""
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (64, 64, 3), np.uint8)
    for index in range(5):
        write_png(tmp_path / "clip" / f"{index:05d}.png", frame)
    edited = frame.copy()
    edited[20:40, 20:40] = (255, 0, 0)
    write_png(tmp_path / "edited.png", edited)
    return ["--source", str(tmp_path / "clip"), "--out", str(tmp_path / "job"), "--edited", str(tmp_path / "edited.png")]


def written(call: list[str]) -> dict[str, str]:
    """The captions of the job that a call made."""
    values = tomllib.loads((Path(call[3]) / "job.toml").read_text())
    return {key: values[key] for key in ("caption", "edited_caption") if key in values}


def test_a_caption_is_what_transformers_own_pipeline_says(tiny_llava):
    model, library = Captioner(tiny_llava), pipeline("image-text-to-text", model=str(tiny_llava))
    said = []
    for seed in (0, 1):
        content = [{"type": "image", "image": Image.fromarray(picture(seed))}, {"type": "text", "text": QUESTION}]
        answer = library(
            text=[{"role": "user", "content": content}], max_new_tokens=120, do_sample=False, return_full_text=False
        )
        said.append(model.caption(picture(seed)))
        assert said[-1] == sentence(answer[0]["generated_text"])
    assert said[0] != said[1]
    assert said[0]


def test_the_edited_picture_is_asked_about_with_the_sources_caption(tiny_llava, monkeypatch):
    model, asked = Captioner(tiny_llava), []
    inputs = model._inputs
    monkeypatch.setattr(model, "_inputs", lambda image, question: asked.append(question) or inputs(image, question))
    plain, told = model.caption(picture(0)), model.caption(picture(0), before="a red word3")
    assert asked == [QUESTION, EDITED_QUESTION.format(caption="a red word3")]
    assert plain != told


def test_florence_is_asked_by_its_task_and_answers_with_the_caption_alone(tiny_florence):
    model = Captioner(tiny_florence)
    inputs = model.processor(text="<DETAILED_CAPTION>", images=Image.fromarray(picture(0)), return_tensors="pt")
    asked = model.processor.batch_decode(inputs["input_ids"], skip_special_tokens=True)[0]
    assert asked == FLORENCE_QUESTION
    tokens = model.model.generate(**inputs, do_sample=False, max_new_tokens=120)
    assert model.caption(picture(0)) == sentence(model.processor.batch_decode(tokens, skip_special_tokens=True)[0]) != ""


def test_a_large_picture_is_shown_smaller(tiny_llava, monkeypatch):
    model, seen = Captioner(tiny_llava), []
    inputs = model._inputs
    monkeypatch.setattr(model, "_inputs", lambda image, question: seen.append(image.size) or inputs(image, question))
    model.caption(np.zeros((1080, 1920, 3), np.uint8))
    model.caption(np.zeros((480, 832, 3), np.uint8))
    assert seen == [(1024, 576), (832, 480)]


@pytest.mark.parametrize(("answer", "said"), [
    ("  A man runs. \n\nHe is old.", "A man runs."), ('"A man\truns."', "A man runs."), ("A man's hat", "A man's hat"),
    ("\n\n", ""), ('"', '"'),
])  # fmt: skip
def test_of_an_answer_the_first_paragraph_counts(answer, said):
    assert sentence(answer) == said


def test_both_captions_are_written_and_told(job, tiny_llava, capsys):
    assert verb.main([*job, "--captioner", str(tiny_llava)]) == 0
    captions, printed = written(job), capsys.readouterr().out
    assert captions.keys() == {"caption", "edited_caption"}
    assert captions["caption"] != captions["edited_caption"]
    assert f"caption   {captions['caption']}\n" in printed
    assert f"caption   edited: {captions['edited_caption']}\n" in printed
    assert "no caption" not in printed


def test_captions_that_are_given_stay(job, tiny_llava):
    call = [*job, "--captioner", str(tiny_llava), "--caption", "a plate"]
    assert verb.main(call) == 0
    assert written(job)["caption"] == "a plate"
    assert written(job)["edited_caption"]
    assert verb.main([*call, "--edited_caption", "a red plate"]) == 0
    assert written(job) == {"caption": "a plate", "edited_caption": "a red plate"}


def test_a_job_that_was_edited_by_hand_is_not_captioned(job, tiny_llava):
    call = [*job, "--captioner", str(tiny_llava)]
    assert verb.main(call) == 0
    toml = Path(job[3]) / "job.toml"
    toml.write_text(toml.read_text().replace(written(job)["caption"], "a plate of mine"))
    by_hand = toml.read_text()
    assert verb.main(call) == 0
    assert toml.read_text() == by_hand


def test_on_the_page_a_caption_is_asked_for_once(job, tiny_llava):
    """Then it stands there to be read and mended."""
    draft = Draft(verb._request(verb._parser().parse_args([*job, "--captioner", str(tiny_llava)])))
    draft.prepare(Drawn(**NOTHING))
    shown = {name: draft.facts()[name] for name in ("caption", "edited_caption")}
    assert shown == written(job)
    lines = draft.prepare(Drawn(**(NOTHING | shown | {"caption": "a plate"})))
    assert not any(line.startswith("caption") for line in lines)
    assert written(job) == shown | {"caption": "a plate"}


def no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def no_processor(folder: Path) -> None:
    for path in (*folder.glob("*processor*"), *folder.glob("tokenizer*")):
        path.unlink()


def half_the_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(list(tensors.items())[::2]), folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("spoil", "message"), [
    (shutil.rmtree, "no such folder"), (no_template, "no chat template"), (no_processor, "processor cannot be read"),
    (half_the_weights, "weights are missing"),
    (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read as a vision-language model"),
    (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "no chat template|cannot be read"),
])  # fmt: skip
def test_a_folder_that_cannot_caption_is_refused_before_anything_is_written(job, tiny_llava, tmp_path, spoil, message):
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "copied"))
    spoil(folder)
    with pytest.raises(UserError, match=message):
        Captioner(folder)
    assert verb.main([*job, "--captioner", str(folder)]) == 2
    assert not (Path(job[3]) / "mask").exists()
