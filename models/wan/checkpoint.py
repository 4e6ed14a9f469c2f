"""Finds and opens the parts of a Wan-I2V checkpoint: original folder, diffusers folder, single files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from common.errors import ErrorCollector, UserError
from models.checkpoint import Tensors, open_tensors, read_config, stored_dtype
from models.parts import TRANSFORMER_STEM, config_of, file_identity, find_part, listing, part_identity, within
from models.scaled_fp8 import dequantised
from models.wan.config import Expert, WanConfig, has_image_branch, transformer_shapes
from models.wan.encoders import VAE_PREFIXES, WanImageEncoder, WanTextEncoder, WanVAE
from models.wan.keys import TRANSFORMER
from models.wan.tokenizer import EMBEDDED, WanTokenizer, tokenizer_file

VAE_FILE = "Wan2.1_VAE.pth"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_FOLDER = "google/umt5-xxl"
EXPERT_FOLDERS: dict[Expert, tuple[str, str]] = {
    "high": ("high_noise_model", "transformer"), "low": ("low_noise_model", "transformer_2")
}
"""Where Wan2.2's transformers for high and for low noise lie, in the original layout and in diffusers'."""

_WHICH_EXPERT = (
    "{}: Wan2.2-I2V-A14B, which has two experts, a transformer for high noise and one for low. Choose one with "
    'model.expert = "high" or "low".'
)
_NOT_OF_WAN21 = (
    'model.expert = "{}" chooses a transformer of Wan2.2-I2V-A14B; Wan2.1 has one for all noise levels: for it remove the key.'
)
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.")
_DIFFUSERS_MARKER = "condition_embedder.time_proj.weight"


def to_original(name: str) -> str:
    """Original name of a transformer parameter that diffusers calls `name`."""
    return TRANSFORMER.to_left(name)


def to_diffusers(name: str) -> str:
    """diffusers' name of a transformer parameter that the original release calls `name`."""
    return TRANSFORMER.to_right(name)


@dataclass(frozen=True, kw_only=True)
class WanTransformerFiles:
    """Where a transformer's weights lie: a file, or a folder with weights and perhaps a config.json."""

    transformer: Path
    config_folder: Path | None = None
    """Where a config.json is looked for when there is none beside the transformer."""

    @cached_property
    def _transformer(self) -> Tensors:
        tensors = open_tensors(self.transformer, (TRANSFORMER_STEM,)).stripped(*_PREFIXES)
        return dequantised(tensors)

    @property
    def layout(self) -> Literal["original", "diffusers"]:
        """Naming scheme of the transformer's file."""
        return "diffusers" if _DIFFUSERS_MARKER in self._transformer else "original"

    def transformer_tensors(self) -> Tensors:
        """The transformer's weights in the original names, checked for completeness against `config`.

        Raises:
            UserError: names or shapes are not those of the model.
        """
        tensors = self._in_original_names
        tensors.check(transformer_shapes(self.config))
        return tensors

    @cached_property
    def _in_original_names(self) -> Tensors:
        tensors = self._transformer
        return tensors.renamed(to_original, to_diffusers) if self.layout == "diffusers" else tensors

    @property
    def reads_image(self) -> bool:
        """Whether the transformer needs an image encoder; tells by names alone, whatever else is wrong with the file."""
        return has_image_branch(self._in_original_names)

    @cached_property
    def config(self) -> WanConfig:
        """The transformer's dimensions, from its weights and config.json."""
        tensors = self._in_original_names
        return WanConfig.from_tensors(tensors.shapes, self._transformer_json(tensors), self.transformer)

    def _transformer_json(self, tensors: Tensors) -> Mapping[str, Any] | None:
        """The config.json beside the weights, else the checkpoint folder's where it is of the same width."""
        own = self.transformer if self.transformer.is_dir() else self.transformer.parent
        if (path := own / "config.json").is_file():
            return read_config(path)
        for folder in (self.config_folder, self.config_folder and self.config_folder / "transformer"):
            if folder and (path := folder / "config.json").is_file():
                values = read_config(path)
                heads, size = values.get("num_attention_heads", 0), values.get("attention_head_dim", 0)
                patch = tensors.shapes.get("patch_embedding.weight")
                return values if patch and patch[0] in (values.get("dim"), heads * size) else None
        return None


@dataclass(frozen=True, kw_only=True)
class WanCheckpoint(WanTransformerFiles):
    """Where the parts of a checkpoint lie; opens and loads each when asked.

    Every part is a file, or a folder with weights and perhaps a config.json. Wan2.2 has no image encoder, and two transformers,
    the experts: this is a checkpoint with one of them.
    """

    vae: Path
    text_encoder: Path
    tokenizer: Path
    image_encoder: Path | None = None
    expert: Expert | None = None

    @classmethod
    def open(
        cls, ckpt_path: Path | None, transformer_path: Path | None = None, vae_path: Path | None = None,
        llm_path: Path | None = None, clip_path: Path | None = None, expert: Expert | None = None,
    ) -> WanCheckpoint:
        """Find the parts in `ckpt_path` (original or diffusers layout); a part's own path takes precedence.

        Args:
            expert: which transformer of Wan2.2.

        Raises:
            UserError: parts that cannot be found, all in one message with what was looked for and is there; an expert of
                Wan2.1, or none of a folder that has them.
        """
        root = ckpt_path
        if root is not None and not root.is_dir():
            raise UserError(f"{root}: no such folder. ckpt_path must be that of a Wan-I2V checkpoint.")
        problems = ErrorCollector()
        transformers = _transformer_folders(root, transformer_path, expert)
        texts = within(root, TEXT_ENCODER_FILE, "text_encoder")
        images = within(root, IMAGE_ENCODER_FILE, "image_encoder")
        found = {
            "transformer": find_part(
                "transformer_path", transformer_path, transformers, problems, f"{TRANSFORMER_STEM}*.safetensors"
            ),
            "vae": find_part("vae_path", vae_path, within(root, VAE_FILE, "vae"), problems),
            "text_encoder": find_part("llm_path", llm_path, texts, problems),
            "tokenizer": _find_tokenizer(root, llm_path, problems),
        }
        place = found["transformer"]
        if place is None or WanTransformerFiles(transformer=place).reads_image:
            found["image_encoder"] = find_part("clip_path", clip_path, images, problems)
        if place is None and expert:
            problems.add(_NOT_OF_WAN21.format(expert))
        if problems.messages:
            there = f"\n{root} holds: {listing(root)}" if root else ""
            raise UserError("Wan checkpoint incomplete:\n  - " + "\n  - ".join(problems.messages) + there)
        parts = {part: path for part, path in found.items() if path is not None}
        checkpoint = cls(**parts, config_folder=root, expert=expert)
        checkpoint._check_expert(needed=transformer_path is None)
        return checkpoint

    def _check_expert(self, needed: bool) -> None:
        if self.expert and self.reads_image:
            raise UserError(f"{self.transformer}: this is Wan2.1. {_NOT_OF_WAN21.format(self.expert)}")
        if needed and not self.expert and not self.config.reads_image:
            raise UserError(_WHICH_EXPERT.format(self.transformer))

    def describe_layout(self) -> str:
        """Naming scheme and stored dtype of each part, in one line; reads headers only."""
        vae = open_tensors(self.vae).stripped(*VAE_PREFIXES)
        text = open_tensors(self.text_encoder)
        original_vae = "encoder.downsamples.0.residual.2.weight" in vae
        parts = {
            "transformer": (self.layout, self._transformer),
            "vae": ("original" if original_vae else "diffusers", vae),
            "text encoder": ("original" if "token_embedding.weight" in text else "transformers", text),
        }
        if self.image_encoder:
            image = open_tensors(self.image_encoder)
            original_image = any(name.removeprefix("visual.") == "cls_embedding" for name in image)
            parts["image encoder"] = ("original" if original_image else "transformers", image)
        return ", ".join(f"{part} {names} ({stored_dtype(tensors)})" for part, (names, tensors) in parts.items())

    def load_vae(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> WanVAE:
        return WanVAE.load(open_tensors(self.vae), config_of(self.vae), device, dtype)

    def load_tokenizer(self) -> WanTokenizer:
        return WanTokenizer(self.tokenizer, self.config.text_len)

    def load_text_encoder(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> WanTextEncoder:
        tensors, config = open_tensors(self.text_encoder), config_of(self.text_encoder)
        return WanTextEncoder.load(tensors, self.load_tokenizer(), config, device, dtype)

    def load_image_encoder(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> WanImageEncoder:
        tensors, config = open_tensors(self.image_encoder), config_of(self.image_encoder)
        return WanImageEncoder.load(tensors, config, device, dtype)

    def identity(self) -> dict[str, list[dict[str, Any]]]:
        """What the encoders' outputs depend on, as JSON values for a cache key: per part its files.

        Of each file the name, the size, and a hash of size, header, first and last MB (a torch file's last MB
        holds the checksums of all its tensors); small files are hashed whole. Folders do not matter.
        """
        tokenizer = tokenizer_file(self.tokenizer)
        return {
            "vae": part_identity(self.vae), "text_encoder": part_identity(self.text_encoder),
            **({"image_encoder": part_identity(self.image_encoder)} if self.image_encoder else {}),
            "tokenizer": [file_identity(tokenizer, whole=self.tokenizer.is_dir())] if tokenizer else [],
        }


def expert_folders(root: Path) -> dict[Expert, Path]:
    """The transformers of a Wan2.2 checkpoint's folder that are there; empty for any other folder."""
    if not any((root / name).is_dir() for name in (*EXPERT_FOLDERS["low"], EXPERT_FOLDERS["high"][0])):
        return {}
    places = {expert: within(root, *names) for expert, names in EXPERT_FOLDERS.items()}
    return {expert: path for expert, paths in places.items() for path in paths if path.is_dir()}


def expert_of(transformer: Path) -> Expert | None:
    """Which expert of a Wan2.2 checkpoint a folder, or a file in it, is; None where the folder does not tell."""
    folder = (transformer if transformer.is_dir() else transformer.parent).resolve()
    return next((expert for expert, place in expert_folders(folder.parent).items() if place == folder), None)


def _transformer_folders(root: Path | None, given: Path | None, expert: Expert | None) -> list[Path]:
    """Where the checkpoint's transformer may lie."""
    if expert:
        return within(root, *EXPERT_FOLDERS[expert])
    if root and not given and expert_folders(root):
        raise UserError(_WHICH_EXPERT.format(root))
    return within(root, "transformer", ".")


def _find_tokenizer(root: Path | None, llm_path: Path | None, problems: ErrorCollector) -> Path | None:
    candidates = within(root, TOKENIZER_FOLDER, "tokenizer")
    if llm_path is not None:
        near = llm_path if llm_path.is_dir() else llm_path.parent
        beside = [near, near / TOKENIZER_FOLDER, near / "tokenizer", near.parent / "tokenizer"]
        candidates = [*beside, *candidates]
    for path in candidates:
        if tokenizer_file(path):
            return path
    if llm_path is not None and llm_path.is_file() and EMBEDDED in open_tensors(llm_path):
        return llm_path
    looked = ", ".join(str(path) for path in candidates) or "no folder (ckpt_path and llm_path are not set)"
    problems.add(f"tokenizer: looked for tokenizer.json or spiece.model in {looked}; not there. "
                 "Add umt5-xxl's, or use a text encoder file that carries it (ComfyUI's do).")
    return None
