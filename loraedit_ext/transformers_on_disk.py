"""Finds a transformer's weights in what a user names, and which family they are of, without the other parts."""

from __future__ import annotations

from pathlib import Path

from common.errors import UserError
from models.checkpoint import guess_content, open_tensors
from models.hunyuan.checkpoint import TRANSFORMER_FILE as HUNYUAN_FILE
from models.hunyuan.checkpoint import TRANSFORMER_STEM as HUNYUAN_STEM
from models.hunyuan.checkpoint import HunyuanTransformerFiles
from models.parts import TRANSFORMER_STEM, has_weights
from models.wan.checkpoint import WanTransformerFiles, expert_folders

STEMS = (TRANSFORMER_STEM, HUNYUAN_STEM)
_MARKS = {
    "hunyuan-video": ("double_blocks.", "single_transformer_blocks."),
    "wan": ("cross_attn.", "condition_embedder.time_proj", "attn2.add_k_proj"),
}


def open_transformer(path: Path) -> tuple[str, WanTransformerFiles | HunyuanTransformerFiles]:
    """The family and the files of the transformer at `path`: a checkpoint's folder, its subfolder, or a file.

    Raises:
        UserError: there is none, there are two, or it is of no family known here.
    """
    where = _located(path)
    names = list(open_tensors(where, STEMS))
    for family, marks in _MARKS.items():
        if any(mark in name for name in names for mark in marks):
            if family == "wan":
                return family, WanTransformerFiles(transformer=where, config_folder=path if path.is_dir() else None)
            return family, HunyuanTransformerFiles(transformer=where)
    raise UserError(
        f"{where}: no transformer of Wan or HunyuanVideo among its {len(names)} tensors ({', '.join(names[:3])}). "
        f"{guess_content(names)}"
    )


def _located(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / HUNYUAN_FILE).is_file():
        return path / HUNYUAN_FILE
    if experts := expert_folders(path):
        raise UserError(
            f"{path}: Wan2.2, which has two transformers; name one of them: {' or '.join(map(str, experts.values()))}."
        )
    subfolder = path / "transformer"
    return subfolder if subfolder.is_dir() and has_weights(subfolder) else path
