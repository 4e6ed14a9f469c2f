"""Finds and opens the parts of a HunyuanVideo-I2V checkpoint: original folder, diffusers folder, single files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from common.errors import ErrorCollector, UserError
from models.checkpoint import Tensors, open_tensors, read_config, slots, stored_dtype
from models.hunyuan.config import HunyuanConfig
from models.hunyuan.encoders import HunyuanTextEncoder, HunyuanVAE, vae_layout
from models.hunyuan.keys import from_comfyui, from_diffusers
from models.hunyuan.single_files import STEMS, find_vision, is_whole_llava, missing_vision, needs_config
from models.hunyuan.transformer import HunyuanTransformer
from models.parts import TRANSFORMER_STEM as DIFFUSERS_STEM
from models.parts import config_of, file_identity, find_part, listing, part_identity, within
from models.scaled_fp8 import dequantised

RELEASE = "hunyuan-video-i2v-720p"
TRANSFORMER_STEM = "mp_rank_00_model_states"
TRANSFORMER_FILE = f"{RELEASE}/transformers/{TRANSFORMER_STEM}.pt"
VAE_FILE = f"{RELEASE}/vae/pytorch_model.pt"
LLAVA_FOLDER = "text_encoder_i2v"
CLIP_FOLDER = "text_encoder_2"

_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "model.")
_DIFFUSERS_MARKER = "x_embedder.proj.weight"
_COMFYUI_MARKER = "double_blocks.0.img_attn.qkv.weight"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_CLIP_TOKENIZER_FILES = ("vocab.json",)
_TEXT_TO_VIDEO = re.compile(r"t2v|text_?to_?video|cfgdistill", re.IGNORECASE)
_IMAGE_TO_VIDEO = re.compile(r"i2v|image_?to_?video", re.IGNORECASE)
Layout = Literal["original", "diffusers", "comfyui"]
_PROCESSOR_FILES = ("preprocessor_config.json",)


@dataclass(frozen=True)
class HunyuanTransformerFiles:
    """Where a transformer's weights lie: a file, or a folder with weights and perhaps a config.json."""

    transformer: Path

    @cached_property
    def _transformer(self) -> Tensors:
        tensors = open_tensors(self.transformer, (DIFFUSERS_STEM, TRANSFORMER_STEM)).stripped(*_PREFIXES)
        return dequantised(tensors)

    @property
    def layout(self) -> Layout:
        """Naming scheme of the transformer's file; Kijai's files have the original one."""
        if _DIFFUSERS_MARKER in self._transformer:
            return "diffusers"
        return "comfyui" if _COMFYUI_MARKER in self._transformer else "original"

    @cached_property
    def _in_original_names(self) -> Tensors:
        rename = {"diffusers": from_diffusers, "comfyui": from_comfyui}.get(self.layout)
        return rename(self._transformer) if rename else self._transformer

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
        tensors = self._in_original_names
        config = HunyuanConfig.from_shapes(tensors.shapes, values, self.transformer, tensors.spell)
        if config.variant == "token_replace":
            _refuse_text_to_video(self.transformer)
        return config


def _refuse_text_to_video(path: Path) -> None:
    """Text-to-video has the tensors of token replace, name by name and shape by shape: only the file's name can tell."""
    official = any(part.startswith("hunyuan-video-t2v") for part in path.parts[-3:])
    if official or (_TEXT_TO_VIDEO.search(path.name) and not _IMAGE_TO_VIDEO.search(path.name)):
        raise UserError(
            f"{path}: by its name this is a text-to-video HunyuanVideo, whose tensors are the same as those of image-to-video. "
            "LoRA-Edit needs an I2V checkpoint, e.g. hunyuan-video-i2v-720p or "
            "hunyuan_video_v2_replace_image_to_video_720p_bf16.safetensors. If it is one, give it another name."
        )


@dataclass(frozen=True)
class HunyuanCheckpoint(HunyuanTransformerFiles):
    """Where the parts of a checkpoint lie; opens and loads each when asked.

    Every part is a file, or a folder with weights; the tokenizers and the image processor are folders.
    """

    vae: Path
    llava: Path
    llava_tokenizer: Path
    image_processor: Path | None
    clip: Path
    clip_tokenizer: Path
    llava_vision: Path | None = None
    """The file with LLaVA's vision tower, where `llava` is the language model alone."""

    @classmethod
    def open(
        cls, ckpt_path: Path | None, transformer_path: Path | None = None, vae_path: Path | None = None,
        llm_path: Path | None = None, clip_path: Path | None = None,
    ) -> HunyuanCheckpoint:
        """Find the parts in `ckpt_path` (original or diffusers layout); a part's own path takes precedence.

        Args:
            llm_path: folder of LLaVA-LLaMA-3 with its tokenizer and image processor; or the file of its language model,
                with that of the vision tower beside it or in the neighbouring folder `clip_vision`.
            clip_path: folder of CLIP-L with its tokenizer, or its file.

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
        if (llava := found["llava"]) is not None and llava.exists():
            llavas = _around(llava, "tokenizer", within(root, LLAVA_FOLDER))
            found["llava_tokenizer"] = _first(
                "llava_tokenizer", llavas, _TOKENIZER_FILES, problems, "xtuner/llava-llama-3-8b-v1_1-transformers"
            )
            found |= _llava_parts(llava, root, problems)
        if (clip := found["clip"]) is not None and clip.exists():
            # A file's folder may hold LLaVA's tokenizer.json; CLIP's is told by its vocab.json.
            names = _TOKENIZER_FILES if clip.is_dir() else _CLIP_TOKENIZER_FILES
            clips = _around(clip, "tokenizer_2", within(root, CLIP_FOLDER))
            found["clip_tokenizer"] = _first("clip_tokenizer", clips, names, problems, "openai/clip-vit-large-patch14")
        if problems.messages:
            there = f"\n{root} holds: {listing(root)}" if root else ""
            raise UserError("HunyuanVideo checkpoint incomplete:\n  - " + "\n  - ".join(problems.messages) + there)
        return cls(**found)  # type: ignore[arg-type]

    def describe_layout(self) -> str:
        """Naming scheme and stored dtype of each part, in one line; reads headers only."""
        vae, clip = open_tensors(self.vae), open_tensors(self.clip, STEMS)
        llava = open_tensors(self.llava, STEMS)
        apart = self.llava_vision is not None and self.llava_vision != self.llava
        parts = {
            "transformer": (self.layout, self._transformer), "vae": (vae_layout(vae), vae),
            "llava": ("in two files" if apart else "transformers" if is_whole_llava(self.llava) else "single file", llava),
            "clip": ("single file" if needs_config(self.clip) else "transformers", clip),
        }
        return ", ".join(f"{part} {names} ({stored_dtype(tensors)})" for part, (names, tensors) in parts.items())

    def load_vae(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> HunyuanVAE:
        beside = self.vae if self.vae.is_dir() else self.vae.parent
        return HunyuanVAE.load(open_tensors(self.vae), config_of(beside), device, dtype)

    def load_text_encoder(
        self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> HunyuanTextEncoder:
        """LLaVA and CLIP, in float16 as released; on a CPU, where that is many times slower, in bfloat16."""
        dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cpu" else torch.float16)
        return HunyuanTextEncoder.load(
            self.llava, self.llava_tokenizer, self.image_processor, self.clip, self.clip_tokenizer,
            self.config.image_interleave, device, dtype, self.llava_vision,
        )

    def identity(self) -> dict[str, list[dict[str, Any]]]:
        """What the encoders' outputs depend on, as JSON values for a cache key: per part its files."""
        apart = self.llava_vision is not None and self.llava_vision != self.llava
        vision = part_identity(self.llava_vision) if apart else []
        processor = _small_files(self.image_processor, _PROCESSOR_FILES) if self.image_processor else []
        return {
            "vae": part_identity(self.vae), "llava": part_identity(self.llava) + vision,
            "clip": part_identity(self.clip),
            "llava_tokenizer": _small_files(self.llava_tokenizer, _TOKENIZER_FILES),
            "image_processor": processor,
            "clip_tokenizer": _small_files(self.clip_tokenizer, _TOKENIZER_FILES),
        }


def _llava_parts(llava: Path, root: Path | None, problems: ErrorCollector) -> dict[str, Path | None]:
    """Where LLaVA's image processor is, and its vision tower if it is a file of its own.

    A whole folder must have its image processor; for single files the released one stands in.
    """
    processors = _around(llava, "image_processor", within(root, LLAVA_FOLDER))
    if is_whole_llava(llava):
        processor = _first(
            "image_processor", processors, _PROCESSOR_FILES, problems, "xtuner/llava-llama-3-8b-v1_1-transformers"
        )
        return {"image_processor": processor}
    with problems.catch():
        vision = find_vision(llava)
        if vision is None:
            problems.add(missing_vision(llava))
        return {"image_processor": _holding(processors, _PROCESSOR_FILES), "llava_vision": vision}
    return {}


def _around(part: Path, neighbour: str, others: list[Path]) -> list[Path]:
    """Folders that may hold what belongs to a part: its own, its neighbour, and those of the checkpoint's folder."""
    near = part if part.is_dir() else part.parent
    inner = [] if part.is_dir() else [near / neighbour]
    rest = [other.parent / neighbour for other in others]
    return list(dict.fromkeys([near, *inner, near.parent / neighbour, *others, *rest]))


def _holding(folders: list[Path], names: tuple[str, ...]) -> Path | None:
    return next((folder for folder in folders if any((folder / name).is_file() for name in names)), None)


def _first(
    what: str, folders: list[Path], names: tuple[str, ...], problems: ErrorCollector, source: str
) -> Path | None:
    """The first folder with one of the files `names`; none is a problem that names where to get them."""
    found = _holding(folders, names)
    if found is None:
        looked = " or ".join(str(path) for path in folders)
        problems.add(f"{what}: looked for {' or '.join(names)} in {looked}; not there. Copy it from {source}.")
    return found


def _small_files(folder: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    return [file_identity(folder / name, whole=True) for name in names if (folder / name).is_file()]
