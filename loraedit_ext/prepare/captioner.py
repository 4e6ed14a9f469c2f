"""Captions of pictures by a vision-language model, from a checkpoint on disk; all that knows transformers' models of the kind.

Any model that transformers can chat with about a picture, or Florence-2, which the released code of the paper uses. Never the
network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from common.errors import UserError, first_line
from loraedit_ext.prepare.pretrained import load
from models.checkpoint import read_config

EXAMPLE = "e.g. `hf download HuggingFaceTB/SmolVLM-Instruct --local-dir /models/SmolVLM-Instruct`"
QUESTION = (
    "Describe this picture in one sentence: who or what is seen, doing what, and where. Answer with the sentence alone."
)
EDITED_QUESTION = (
    'This picture is an edited one. Before the edit it was described as: "{caption}" Describe it as it is now in one sentence, '
    "in the same words as far as they still hold. Answer with the sentence alone."
)
_FLORENCE, _TASK = "florence2", "<DETAILED_CAPTION>"
_LONGEST_SIDE = 1024  # pixels; more make many models slow and tell a caption nothing
_MOST_TOKENS = 120


class Captioner:
    """A vision-language model, on the GPU if there is one.

    Args:
        folder: a checkpoint in transformers' layout.

    Raises:
        UserError: the folder is none, or not whole, or its model cannot be asked about pictures here.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise UserError(f"--captioner {folder}: no such folder, or no config.json in it; expected a vision-language model "
                            f"in transformers' layout. Nothing is downloaded here: get one once, {EXAMPLE}.")  # fmt: skip
        self.florence = read_config(folder / "config.json").get("model_type") == _FLORENCE
        self.processor = _processor(folder)
        if not (self.florence or getattr(self.processor, "chat_template", None)):
            raise UserError(f"--captioner {folder}: has no chat template, so it cannot be asked for a caption; expected a "
                            f"model that follows instructions, {EXAMPLE}, or Florence-2.")  # fmt: skip
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        kind = AutoModelForImageTextToText
        self.model = load(kind, folder, "--captioner", "a vision-language model", "auto").to(self.device)

    def caption(self, picture: np.ndarray, before: str | None = None) -> str:
        """What a picture, uint8 (H, W, 3), shows, in a sentence.

        Args:
            picture: what to describe.
            before: caption of what it was before an edit. A model that is told it says the rest alike, so that the prompts of
                training and edit differ in the edit; Florence-2 cannot be told.
        """
        image = Image.fromarray(picture)
        image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
        question = QUESTION if before is None else EDITED_QUESTION.format(caption=before)
        inputs = self._inputs(image, question).to(self.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=_MOST_TOKENS)
        asked = 0 if self.florence else inputs["input_ids"].shape[1]
        return sentence(self.processor.batch_decode(tokens[:, asked:], skip_special_tokens=True)[0])

    def _inputs(self, image: Image.Image, question: str) -> Any:
        if self.florence:
            return self.processor(text=_TASK, images=image, return_tensors="pt")
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )


def sentence(answer: str) -> str:
    """The first paragraph of an answer on one line, without quotation marks around it."""
    first = next((line for line in answer.strip().splitlines() if line.strip()), "")
    words = " ".join(first.split())
    return words[1:-1].strip() if len(words) > 1 and words[0] == words[-1] and words[0] in "\"'" else words


def _processor(folder: Path) -> Any:
    try:
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError as error:
        raise UserError(f"--captioner {folder}: its processor needs a package that is not here ({first_line(error)}). Install "
                        f"it, or take another model, {EXAMPLE}.") from error  # fmt: skip
    except Exception as error:  # transformers raises whatever the model's own code does
        raise UserError(f"--captioner {folder}: its processor cannot be read ({first_line(error)}). Download the folder "
                        "again; a model that reads clips as well may need `pip install torchvision`.") from error  # fmt: skip
