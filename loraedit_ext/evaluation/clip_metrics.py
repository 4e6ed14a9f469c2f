"""The paper's CLIP score and input similarity (section 4.2), from a CLIP folder on disk, or with Wan's own CLIP.

Needs torch and transformers, not torchvision, and never the network. Videos are uint8 (F, H, W, 3) RGB.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from common.errors import UserError
from common.files import hash_file
from common.progress import progress
from models.checkpoint import open_tensors
from models.wan.checkpoint import IMAGE_ENCODER_FILE
from models.wan.encoders import load_clip_image_model

if TYPE_CHECKING:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

BATCH = 8
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
NEEDED = ("config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class ClipScores:
    """Cosine similarities, -1 to 1, of one way to fit pictures into CLIP's square."""

    clip_score: float
    """Mean over all edited frames of cos(edited frame, edited first frame)."""
    clip_score_later: float
    """The same without frame 0, which most editors copy from their input."""
    input_similarity: float
    """Mean over all frames of cos(edited frame, source frame of the same time)."""
    ceiling: float
    """cos(edited first frame, source first frame): the input similarity of a perfect edit's first frame."""
    frame_clip_score: tuple[float, ...]
    frame_input_similarity: tuple[float, ...]


@dataclass(frozen=True)
class ClipResult:
    """Scores with the name of what made them; numbers of different variants never share a table."""

    variant: str
    """Folder name, tower and sizes, e.g. `clip-vit-large-patch14: 24 layers of 1024, 224 pixels, patch 14`."""
    sha256: str
    """Of the weight file."""
    crop: ClipScores
    """CLIP's own preprocessing: shorter side resized, centre square cut out. Wide videos lose their sides."""
    letterbox: ClipScores | None
    """The whole picture on a black square; None for square videos, where it is the same."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_weights(path: Path) -> Path | None:
    """The weight file of a CLIP folder or of a Wan checkpoint, or None where there is none; a file is itself."""
    if path.is_file():
        return path
    return next((path / name for name in (*WEIGHTS, IMAGE_ENCODER_FILE) if (path / name).is_file()), None)


class ClipImages:
    """The image tower of a CLIP model in Hugging Face layout, or of a Wan2.1-I2V checkpoint.

    Args:
        path: folder with config.json, preprocessor_config.json and model.safetensors (or pytorch_model.bin); or a Wan
            checkpoint's folder in the original layout; or its models_clip file.
        device: where it runs.
        num_heads: of a models_clip file, which does not tell; default: heads 80 wide, as in the released one.

    Raises:
        UserError: files are missing, or this is no CLIP model.
    """

    def __init__(self, path: Path, device: torch.device, num_heads: int | None = None) -> None:
        weights = find_weights(path)
        self.device = device
        if weights is not None and weights.name not in WEIGHTS:
            self.processor, self.model, name = *_open_wan(weights, num_heads), f"Wan's CLIP ({weights.name})"
        else:
            self.processor, self.model, name = *_open_folder(path, weights), path.resolve().name
        assert weights is not None, "the folder was opened"
        self.model = self.model.eval().to(device)
        self.sha256 = hash_file(weights)
        config = self.model.config
        self.variant = (
            f"{name}: {config.num_hidden_layers} layers of {config.hidden_size}, "
            f"{config.image_size} pixels, patch {config.patch_size}"
        )

    @torch.no_grad()
    def embed(self, frames: np.ndarray) -> Tensor:
        """Unit vectors, float32 (F, projection), of frames preprocessed as the folder says."""
        parts = []
        with progress(len(frames), "CLIP", unit="frame") as bar:
            for start in range(0, len(frames), BATCH):
                batch = list(frames[start : start + BATCH])
                inputs = self.processor(batch, return_tensors="pt", input_data_format="channels_last")
                embedded = self.model(inputs["pixel_values"].to(self.device)).image_embeds
                parts.append(torch.nn.functional.normalize(embedded.float(), dim=-1).cpu())
                bar.update(len(batch))
        return torch.cat(parts)


def _open_folder(
    folder: Path, weights: Path | None
) -> tuple[CLIPImageProcessorPil, CLIPVisionModelWithProjection]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    missing = [name for name in NEEDED if not (folder / name).is_file()]
    if weights is None or missing:
        raise UserError(
            f"{folder}: not a whole CLIP folder, without {', '.join(missing) or ' or '.join(WEIGHTS)}. "
            "Expected the Hugging Face layout, e.g. a download of openai/clip-vit-large-patch14, or a Wan2.1-I2V "
            f"checkpoint with {IMAGE_ENCODER_FILE}."
        )
    processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    return processor, _load(_vision_config(folder / "config.json"), weights)


def _open_wan(
    weights: Path, num_heads: int | None
) -> tuple[CLIPImageProcessorPil, CLIPVisionModelWithProjection]:
    """Wan's tower with CLIP's own preprocessing; Wan squashes pictures into the square instead."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model = load_clip_image_model(open_tensors(weights), num_heads=num_heads)
    side = model.config.image_size
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}), model


def _vision_config(path: Path) -> CLIPVisionConfig:
    """The image tower's config; full CLIP folders keep the projection's size at the top level."""
    from transformers import CLIPConfig, CLIPVisionConfig

    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}). Download it again.") from error
    kind = raw.get("model_type")
    if kind == "clip_vision_model":
        return CLIPVisionConfig.from_dict(raw)
    if kind != "clip":
        raise UserError(f"{path}: model_type is {kind!r}, expected `clip` or `clip_vision_model`.")
    config = CLIPConfig.from_dict(raw)
    config.vision_config.projection_dim = config.projection_dim
    return config.vision_config


def _load(config: CLIPVisionConfig, weights: Path) -> CLIPVisionModelWithProjection:
    """The image tower with its weights; a full CLIP file brings a text tower too, which is left where it is.

    Not by `from_pretrained`, which fills what is missing with random numbers and lists what is left over.
    """
    from transformers import CLIPVisionModelWithProjection

    model = CLIPVisionModelWithProjection(config)
    wanted = model.state_dict().keys()
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            state = {name: file.get_tensor(name) for name in wanted & set(file.keys())}
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
        state = {name: state[name] for name in wanted & state.keys()}
    if missing := sorted(wanted - state.keys()):
        raise UserError(f"{weights}: lacks {', '.join(missing[:3])}. Download the folder again.")
    try:
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    except RuntimeError as error:
        raise UserError(f"{weights}: does not fit its config.json ({error}). Download the folder again.") from error
    return model


def letterbox(frames: np.ndarray) -> np.ndarray:
    """Frames in the middle of black squares: (F, H, W, 3) -> (F, S, S, 3), S the longer side."""
    height, width = frames.shape[1:3]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(frames, ((0, 0), (top, side - height - top), (left, side - width - left), (0, 0)))


def clip_scores(clip: ClipImages, edited: np.ndarray, source: np.ndarray, reference: np.ndarray) -> ClipResult:
    """CLIP score and input similarity of one edit.

    Args:
        clip: the image tower.
        edited, source: uint8 (F, H, W, 3).
        reference: uint8 (H, W, 3), the edited first frame.

    Raises:
        ValueError: shapes differ.
    """
    if edited.shape != source.shape or reference.shape != edited.shape[1:]:
        raise ValueError(f"shapes do not fit: {edited.shape}, {source.shape}, {reference.shape}")
    square = edited.shape[1] == edited.shape[2]
    videos = edited, source, reference[None]
    crop = _scores(*(clip.embed(video) for video in videos))
    boxed = None if square else _scores(*(clip.embed(letterbox(video)) for video in videos))
    return ClipResult(clip.variant, clip.sha256, crop, boxed)


def _scores(edited: Tensor, source: Tensor, reference: Tensor) -> ClipScores:
    """From unit vectors (F, D), (F, D), (1, D)."""
    to_reference = (edited @ reference[0]).tolist()
    to_source = (edited * source).sum(-1).tolist()
    later = to_reference[1:] or to_reference
    return ClipScores(
        clip_score=sum(to_reference) / len(to_reference),
        clip_score_later=sum(later) / len(later),
        input_similarity=sum(to_source) / len(to_source),
        ceiling=float(reference[0] @ source[0]),
        frame_clip_score=tuple(to_reference),
        frame_input_similarity=tuple(to_source),
    )
