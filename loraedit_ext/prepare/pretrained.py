"""Models of transformers that prepare.py takes from a folder on disk, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from common.errors import UserError, first_line


def load(kind: Any, folder: Path, flag: str, what: str, dtype: torch.dtype | str) -> Any:
    """A frozen model; a weight that is missing is no weight at random. Never the network.

    Args:
        kind: class of transformers with `from_pretrained`.
        folder: of the checkpoint, with weights in safetensors.
        flag: by which the user gave it, e.g. "--sam".
        what: the model is, for people, e.g. "SAM 2".
        dtype: of the weights; "auto": the one they were saved in.

    Raises:
        UserError: the folder cannot be read as that model, or lacks weights.
    """
    try:
        model, info = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{flag} {folder}: cannot be read as {what} ({first_line(error)}). Download the folder "
                        "again.") from error  # fmt: skip
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{flag} {folder}: {len(missing)} weights are missing ({', '.join(missing[:3])}). Download the folder "
                        "again.")  # fmt: skip
    return model.eval().requires_grad_(False)
