"""Outlines of an object through a clip by SAM 2, from a checkpoint on disk; all that knows transformers' SAM 2.

Needs torch and transformers, not torchvision, and never the network. transformers' processor needs torchvision, so pictures and
prompts are brought to the model's square here. Axes: F frames, H W pixels, S the model's side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession, Sam2VideoModel

from common.errors import UserError
from common.progress import progress
from loraedit_ext.prepare.pretrained import load
from loraedit_ext.prepare.prompts import Prompt
from models.checkpoint import read_config

EXAMPLE = "e.g. `hf download facebook/sam2.1-hiera-large --local-dir /models/sam2.1-hiera-large`"
_KIND = "sam2_video"
_LOOK = "preprocessor_config.json"
_OBJECT = 1
"""The session's name of the one object."""
_ON, _OFF, _BOX = 1, 0, (2, 3)
"""SAM's labels of points: on the object, not on it, a box's corners."""


class Sam2:
    """A SAM 2 checkpoint in transformers' layout, on the GPU if there is one.

    Args:
        folder: with config.json, preprocessor_config.json and model.safetensors.

    Raises:
        UserError: the folder is none, or not whole, or of another model.
    """

    def __init__(self, folder: Path) -> None:
        _check(folder)
        look = read_config(folder / _LOOK)
        try:
            self.mean, self.std = (torch.tensor(look[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{folder / _LOOK}: lacks image_mean and image_std of three colours. Download the folder "
                            "again.") from error  # fmt: skip
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load(Sam2VideoModel, folder, "--sam", "SAM 2", torch.float32).to(self.device)
        self.side = int(self.model.config.image_size)

    def outlines(self, frames: np.ndarray, prompts: Mapping[int, Prompt]) -> np.ndarray:
        """The object in every frame, bool (F, H, W); frames with a painted shape have that.

        All prompts are understood first, each by its own frame; then the object is followed from the first of them to the
        end, and back to the beginning, with all of them in memory.

        Args:
            frames: uint8 (F, H, W, 3).
            prompts: at least one; frame index -> prompt.

        Raises:
            UserError: no object is found where a prompt says.
        """
        session, found = self._session(frames), np.zeros(frames.shape[:3], bool)
        for frame in sorted(prompts):
            self._tell(session, frame, prompts[frame])
            _check_found(frame, self.model(session, frame_idx=frame).pred_masks)
        with progress(len(frames), "SAM 2", "frame") as bar:
            for frame, logits in self._propagated(session, min(prompts)):
                found[frame] = _at_size(logits, frames.shape[1:3])
                bar.update()
        for frame, prompt in prompts.items():
            if prompt.shape is not None:
                found[frame] = prompt.shape
        return found

    def outline(self, frames: np.ndarray, frame: int, prompt: Prompt) -> np.ndarray:
        """The object in one of the frames by its prompt alone, bool (H, W), as `outlines` has it there.

        Raises:
            UserError: no object is found where the prompt says.
        """
        session = self._session(frames)
        self._tell(session, frame, prompt)
        logits = self.model(session, frame_idx=frame).pred_masks
        _check_found(frame, logits)
        return _at_size(logits, frames.shape[1:3])

    def _session(self, frames: np.ndarray) -> Sam2VideoInferenceSession:
        """A clip of which the GPU holds a frame at a time, and its memory."""
        session = Sam2VideoInferenceSession(
            video_height=frames.shape[1], video_width=frames.shape[2], inference_device=self.device,
            inference_state_device="cpu", video_storage_device="cpu", dtype=torch.float32,
        )  # fmt: skip
        session.processed_frames = _Pictures(frames, self.side, self.mean, self.std)
        return session

    def _tell(self, session: Sam2VideoInferenceSession, frame: int, prompt: Prompt) -> None:
        """Add a prompt; the model must see its frame before the next prompt is added."""
        index = session.obj_id_to_idx(_OBJECT)
        if prompt.shape is not None:
            session.add_mask_inputs(index, frame, shape_input(prompt.shape, self.side))
        else:
            size = (session.video_height, session.video_width)
            session.add_point_inputs(index, frame, point_inputs(prompt, size, self.side))
        session.obj_with_new_inputs = [_OBJECT]

    def _propagated(self, session: Sam2VideoInferenceSession, first: int) -> Iterator[tuple[int, Tensor]]:
        """Every frame once, with its logits (1, 1, h, w)."""
        for reverse in (False, True):
            for output in self.model.propagate_in_video_iterator(session, start_frame_idx=first, reverse=reverse):
                if not (reverse and output.frame_idx == first):
                    yield output.frame_idx, output.pred_masks


class _Pictures:
    """The clip's frames as the model takes them, float32 (3, S, S), made when they are asked for."""

    def __init__(self, frames: np.ndarray, side: int, mean: Tensor, std: Tensor) -> None:
        self.frames, self.side, self.mean, self.std = frames, side, mean, std

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Tensor:
        return (_squared(torch.tensor(self.frames[index]).movedim(-1, 0) / 255, self.side) - self.mean) / self.std


def point_inputs(prompt: Prompt, size: tuple[int, int], side: int) -> dict[str, Tensor]:
    """A box's corners, then the clicks, as the session keeps them: coordinates float32 (1, 1, N, 2), labels int32 (1, 1, N).

    Args:
        prompt: one without a shape, in a picture of (height, width) `size`.
    """
    points, labels = [*prompt.clicks, *prompt.background], [_ON] * len(prompt.clicks) + [_OFF] * len(prompt.background)
    if prompt.box is not None:
        left, top, width, height = prompt.box
        points = [(left, top), (left + width - 1, top + height - 1), *points]
        labels = [*_BOX, *labels]
    scale = torch.tensor([side / size[1], side / size[0]])
    coordinates = torch.tensor(points, dtype=torch.float32) * scale
    return {"point_coords": coordinates[None, None], "point_labels": torch.tensor(labels, dtype=torch.int32)[None, None]}


def shape_input(shape: np.ndarray, side: int) -> Tensor:
    """A shape, bool (H, W), as the session keeps it: float32 (1, 1, S, S), 0 or 1."""
    return (_squared(torch.from_numpy(shape)[None].float(), side)[None] >= 0.5).float()


def _squared(picture: Tensor, side: int) -> Tensor:
    """(C, H, W) -> (C, S, S): SAM 2 takes pictures out of proportion, whole."""
    return interpolate(picture[None], (side, side), mode="bilinear", align_corners=False, antialias=True)[0]


def _at_size(logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    return (interpolate(logits, size, mode="bilinear", align_corners=False)[0, 0] > 0).cpu().numpy()


def _check_found(frame: int, logits: Tensor) -> None:
    if not (logits > 0).any():
        raise UserError(f"frame {frame}: SAM 2 finds no object where the region or the clicks are. Give --click {frame}:X,Y "
                        "with a pixel on the object that the edit belongs to, or leave out --sam.")  # fmt: skip


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"--sam {folder}: no such folder; expected a SAM 2 checkpoint in transformers' layout. Nothing is "
                        f"downloaded here: get one once, {EXAMPLE}.")  # fmt: skip
    if missing := [name for name in ("config.json", _LOOK) if not (folder / name).is_file()]:
        raise UserError(f"--sam {folder}: lacks {', '.join(missing)}; expected a whole SAM 2 checkpoint in transformers' "
                        f"layout, {EXAMPLE}.")  # fmt: skip
    kind = read_config(folder / "config.json").get("model_type")
    if kind != _KIND:
        raise UserError(f"--sam {folder}: config.json has model_type {kind!r}, expected {_KIND!r}, a SAM 2 for videos, "
                        f"{EXAMPLE}.")  # fmt: skip
