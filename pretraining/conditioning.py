"""Text and image features of the tiny model, through the project's own encoder classes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import open_tensors
from models.wan.encoders import WanImageEncoder, WanTextEncoder
from models.wan.save import write_tokenizer
from models.wan.tokenizer import WanTokenizer
from pretraining import encoders


class Conditioner:
    """Builds the fixed encoders once; features are those that the exported checkpoint gives."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            tokenizer = encoders.build_tokenizer()
            write_tokenizer(folder, tokenizer)
            torch.save(encoders.text_encoder(encoders.vocabulary_rows(tokenizer)), folder / "text.pth")
            visual = {f"visual.{name}": value for name, value in encoders.image_encoder().items()}
            torch.save(visual, folder / "image.pth")
            words = WanTokenizer(folder, encoders.TEXT_LEN)
            self._text = WanTextEncoder.load(open_tensors(folder / "text.pth"), words)
            self._image = WanImageEncoder.load(open_tensors(folder / "image.pth"))

    def text(self, prompt: str) -> Tensor:
        """(TEXT_LEN, text width), zero-padded."""
        features = self._text.encode(prompt)
        return torch.nn.functional.pad(features, (0, 0, 0, encoders.TEXT_LEN - len(features)))

    def image(self, frames: Tensor) -> Tensor:
        """(batch, tokens, image width) of frames (batch, 3, height, width) in [-1, 1]."""
        return torch.stack([self._image.encode(frame) for frame in frames])
