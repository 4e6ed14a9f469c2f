"""Finds and opens the parts of a HunyuanVideo-I2V checkpoint: original folder, diffusers folder, single files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from common.errors import ErrorCollector, UserError
from models.checkpoint import Tensors, open_tensors, read_config, slots, stored_dtype
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.encoders import HunyuanTextEncoder, HunyuanVAE
from models.hunyuan.keys import from_diffusers
from models.hunyuan.transformer import HunyuanTransformer
from models.parts import TRANSFORMER_STEM, config_of, file_identity, find_part, listing, part_identity, within
from models.scaled_fp8 import dequantised

RELEASE = "hunyuan-video-i2v-720p"
TRANSFORMER_FILE = f"{RELEASE}/transformers/mp_rank_00_model_states.pt"
VAE_FILE = f"{RELEASE}/vae/pytorch_model.pt"
LLAVA_FOLDER = "text_encoder_i2v"
CLIP_FOLDER = "text_encoder_2"

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
_DIFFUSERS_MARKER = "x_embedder.proj.weight"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_PROCESSOR_FILES = ("preprocessor_config.json",)


@dataclass(frozen=True)
class HunyuanTransformerFiles:
    """Where a transformer's weights lie: a file, or a folder with weights and perhaps a config.json."""

    transformer: Path

    @cached_property
    def _transformer(self) -> Tensors:
        tensors = open_tensors(self.transformer, (TRANSFORMER_STEM,)).stripped(*_PREFIXES)
        return dequantised(tensors)

    @property
    def layout(self) -> Literal["original", "diffusers"]:
        """Naming scheme of the transformer's file."""
        return "diffusers" if _DIFFUSERS_MARKER in self._transformer else "original"

    @cached_property
    def _in_original_names(self) -> Tensors:
        return from_diffusers(self._transformer) if self.layout == "diffusers" else self._transformer

    def transformer_tensors(self) -> Tensors:
        """The transformer's weights in the original names, checked for completeness against `config`.

        Raises:
            UserError: names or shapes are not those of the model.
        """
        with torch.device("meta"):
            expected = slots(HunyuanTransformer(self.config))
        self._in_original_names.check(expected)
        return self._in_original_names

    @cached_property
    def config(self) -> HunyuanConfig:
        """The transformer's dimensions and variant, from its weights."""
        own = self.transformer if self.transformer.is_dir() else self.transformer.parent
        path = own / "config.json"
        values = read_config(path) if path.is_file() else None
        return HunyuanConfig.from_shapes(self._in_original_names.shapes, values, self.transformer)


@dataclass(frozen=True)
class HunyuanCheckpoint(HunyuanTransformerFiles):
    """Where the parts of a checkpoint lie; opens and loads each when asked.

    `transformer` and `vae` are files or folders with weights; the others are folders in transformers' layout.
    """

    vae: Path
    llava: Path
    llava_tokenizer: Path
    image_processor: Path
    clip: Path
    clip_tokenizer: Path

    @classmethod
    def open(
        cls, ckpt_path: Path | None, transformer_path: Path | None = None, vae_path: Path | None = None,
        llm_path: Path | None = None, clip_path: Path | None = None,
    ) -> HunyuanCheckpoint:
        """Find the parts in `ckpt_path` (original or diffusers layout); a part's own path takes precedence.

        Args:
            llm_path: folder of LLaVA-LLaMA-3 with its tokenizer and image processor.
            clip_path: folder of CLIP-L with its tokenizer.

        Raises:
            UserError: parts that cannot be found, all in one message with what was looked for and is there.
        """
        root = ckpt_path
        if root is not None and not root.is_dir():
            raise UserError(f"{root}: no such folder. ckpt_path must be that of a HunyuanVideo-I2V checkpoint.")
        problems = ErrorCollector()
        transformers, vaes = within(root, TRANSFORMER_FILE, "transformer"), within(root, VAE_FILE, "vae")
        found: dict[str, Path | None] = {
            "transformer": find_part("transformer_path", transformer_path, transformers, problems),
            "vae": find_part("vae_path", vae_path, vaes, problems),
            "llava": find_part("llm_path", llm_path, within(root, LLAVA_FOLDER, "text_encoder"), problems),
            "clip": find_part("clip_path", clip_path, within(root, CLIP_FOLDER), problems),
        }
        for part, owner, names, folder in (
            ("llava_tokenizer", found["llava"], _TOKENIZER_FILES, "tokenizer"),
            ("image_processor", found["llava"], _PROCESSOR_FILES, "image_processor"),
            ("clip_tokenizer", found["clip"], _TOKENIZER_FILES, "tokenizer_2"),
        ):
            if owner is not None:
                found[part] = _beside(owner, part, names, folder, problems)
        if problems.messages:
            there = f"\n{root} holds: {listing(root)}" if root else ""
            raise UserError("HunyuanVideo checkpoint incomplete:\n  - " + "\n  - ".join(problems.messages) + there)
        return cls(**{part: path for part, path in found.items() if path is not None})

    def describe_layout(self) -> str:
        """Naming scheme and stored dtype of the transformer and the VAE, in one line; reads headers only."""
        return (
            f"transformer {self.layout} ({stored_dtype(self._transformer)}), "
            f"vae ({stored_dtype(open_tensors(self.vae))})"
        )

    def load_vae(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> HunyuanVAE:
        beside = self.vae if self.vae.is_dir() else self.vae.parent
        return HunyuanVAE.load(open_tensors(self.vae), config_of(beside), device, dtype)

    def load_text_encoder(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16
    ) -> HunyuanTextEncoder:
        return HunyuanTextEncoder.load(
            self.llava, self.llava_tokenizer, self.image_processor, self.clip, self.clip_tokenizer,
            self.config.image_interleave, device, dtype,
        )

    def identity(self) -> dict[str, list[dict[str, Any]]]:
        """What the encoders' outputs depend on, as JSON values for a cache key: per part its files."""
        return {
            "vae": part_identity(self.vae), "llava": part_identity(self.llava), "clip": part_identity(self.clip),
            "llava_tokenizer": _small_files(self.llava_tokenizer, _TOKENIZER_FILES),
            "image_processor": _small_files(self.image_processor, _PROCESSOR_FILES),
            "clip_tokenizer": _small_files(self.clip_tokenizer, _TOKENIZER_FILES),
        }


def _beside(
    part: Path, what: str, names: tuple[str, ...], folder: str, problems: ErrorCollector
) -> Path | None:
    """The folder with one of the files `names`: the part's own, or its neighbour of that name."""
    candidates = [part, part.parent / folder]
    for candidate in candidates:
        if any((candidate / name).is_file() for name in names):
            return candidate
    looked = " or ".join(str(path) for path in candidates)
    problems.add(f"{what}: looked for {' or '.join(names)} in {looked}; not there.")
    return None


def _small_files(folder: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [file_identity(folder / name, whole=True) for name in names if (folder / name).is_file()]
