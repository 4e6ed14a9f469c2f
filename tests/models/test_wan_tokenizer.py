"""Prompts become the ids that the original saw."""

from __future__ import annotations

import io
import logging

import pytest
from tokenizers import Tokenizer

from common.errors import UserError
from models.wan.random_weights import build_tokenizer
from models.wan.save import write_tokenizer
from models.wan.tokenizer import WanTokenizer, clean_prompt

PROMPTS = [
    "a red ball rolls down the street", "p3rs0n, a woman with green hair", "Ünïcöde ﬁ ½ 漢字 🙂 \u200b",
    "", "  many\n\nlines\tand   blanks ", "&amp;lt;b&amp;gt; Tom &amp; Jerry", "“curly” quotes …",
    "<extra_id_0> </s> x",
]


@pytest.fixture
def folder(tmp_path):
    write_tokenizer(tmp_path, build_tokenizer()[0])
    return tmp_path


@pytest.mark.parametrize(("raw", "clean"), [
    ("  a \n\t b  ", "a b"), ("&amp;lt;b&amp;gt;", "<b>"), ("&amp;amp;", "&"), ("schÃ¶n", "schön"),
    ("ﬁne", "fine"), ("“quoted”", '"quoted"'), ("", ""),
])
def test_cleaning_repairs_unescapes_and_collapses(raw, clean):
    assert clean_prompt(raw) == clean


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_the_file_verbatim(folder, prompt):
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert WanTokenizer(folder)(prompt) == raw.encode(clean_prompt(prompt)).ids


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_are_those_of_the_verbatim_transformers_class(folder, prompt):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(str(folder))
    assert WanTokenizer(folder)(prompt) == theirs(clean_prompt(prompt))["input_ids"]


def test_every_text_has_ids_of_its_own_and_ends_with_eos(folder):
    tokenizer = WanTokenizer(folder)
    ids = [tuple(tokenizer(prompt)) for prompt in PROMPTS]
    assert len(set(ids)) == len(PROMPTS)
    assert all(row[-1] == 1 and 3 not in row for row in ids)


def test_settings_stored_in_the_file_do_not_pad_or_cut(folder):
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    stored.enable_padding(length=64)
    stored.enable_truncation(max_length=4)
    stored.save(str(folder / "tokenizer.json"))
    ids = WanTokenizer(folder)("a red ball on the green grass")
    assert len(ids) == 8
    assert 0 not in ids


def test_a_long_prompt_is_cut_with_a_warning_that_counts(folder, caplog):
    tokenizer = WanTokenizer(folder, text_len=16)
    with caplog.at_level(logging.WARNING):
        assert len(tokenizer("ball " * 15)) == 16
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        ids = tokenizer("ball " * 20)
    assert len(ids) == 16
    assert ids[-1] == 1
    assert "21 tokens, Wan reads 16: the last 5 are cut off" in caplog.text


def test_a_folder_with_only_spiece_model(tmp_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*PROMPTS, "the quick brown fox jumps over a lazy dog"] * 4), model_writer=model,
        vocab_size=320, pad_id=0, eos_id=1, bos_id=2, unk_id=3, byte_fallback=True, minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    expected = SentencePieceProcessor(model_proto=model.getvalue()).encode("a brown 漢 fox")
    assert WanTokenizer(tmp_path)("a  brown 漢\nfox") == [*expected, 1]


def test_a_tokenizer_without_end_token_is_refused(folder):
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    from tokenizers.processors import TemplateProcessing

    stored.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    stored.save(str(folder / "tokenizer.json"))
    with pytest.raises(UserError, match="do not end with id 1"):
        WanTokenizer(folder)


def test_missing_and_damaged_tokenizers_are_user_errors(folder, tmp_path_factory):
    with pytest.raises(UserError, match=r"expected tokenizer\.json or spiece\.model"):
        WanTokenizer(tmp_path_factory.mktemp("empty"))
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a readable tokenizer"):
        WanTokenizer(folder)
