"""Wan's prompt cleaning and umT5's tokenizer, read verbatim from its files."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Callable
from pathlib import Path

import ftfy

from common.errors import UserError
from models.checkpoint import open_tensors

logger = logging.getLogger(__name__)

EMBEDDED = "spiece_model"
"""Tensor (bytes of spiece.model) in which ComfyUI's text encoder files carry the tokenizer."""
EOS = 1  # umT5's ids: pad 0, eos 1, bos 2, unk 3


def clean_prompt(text: str) -> str:
    """Repair, unescape, collapse blanks: upstream `wan/modules/tokenizers.py`, clean="whitespace"."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class WanTokenizer:
    """umT5's tokenizer without a model library in between.

    transformers 5 rebuilds this tokenizer under the class that its config names, with other ids for unknown
    characters; the tokenizers library takes tokenizer.json as it is. A folder with only spiece.model is read
    by sentencepiece.

    Args:
        folder: with `tokenizer.json` or `spiece.model`; or a text encoder file that carries the latter as a tensor.
        text_len: the most tokens a prompt may have, end token included.

    Raises:
        UserError: no usable tokenizer in the folder.
    """

    def __init__(self, folder: Path, text_len: int = 512) -> None:
        self.folder = folder
        self.text_len = text_len
        self._ids = _id_function(folder)
        if self._ids("a")[-1:] != [EOS]:
            raise UserError(f"{folder}: texts do not end with id {EOS}; expected umT5's tokenizer.")

    def __call__(self, prompt: str) -> list[int]:
        """Token ids of the cleaned prompt, end token last, at most `text_len`; truncation is logged."""
        ids = self._ids(clean_prompt(prompt))
        if len(ids) > self.text_len:
            logger.warning(
                "The prompt has %d tokens, Wan reads %d: the last %d are cut off. It begins: %.60s",
                len(ids), self.text_len, len(ids) - self.text_len, prompt,
            )
            ids = [*ids[: self.text_len - 1], EOS]
        return ids


def tokenizer_file(folder: Path) -> Path | None:
    """The file that the tokenizer is read from: of a folder, or the given one."""
    if folder.is_file():
        return folder
    files = (folder / "tokenizer.json", folder / "spiece.model")
    return next((file for file in files if file.is_file()), None)


def _id_function(folder: Path) -> Callable[[str], list[int]]:
    file = tokenizer_file(folder)
    if file is None:
        raise UserError(f"{folder}: no tokenizer; expected tokenizer.json or spiece.model of umt5-xxl.")
    try:
        if file == folder:
            return _from_sentencepiece(_embedded(file))
        return _from_json(file) if file.suffix == ".json" else _from_sentencepiece(file.read_bytes())
    except Exception as error:  # the parsers meet arbitrary bytes here
        raise UserError(f"{file}: not a readable tokenizer ({error}). Download the file again.") from error


def _from_json(file: Path) -> Callable[[str], list[int]]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: tokenizer.encode(text).ids


def _embedded(file: Path) -> bytes:
    return bytes(open_tensors(file)[EMBEDDED].contiguous().view(-1).numpy())


def _from_sentencepiece(model: bytes) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    return lambda text: [*processor.encode(text), EOS]
