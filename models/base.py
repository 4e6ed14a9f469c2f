"""What every image-to-video model offers: its latent grid, frozen encoders, a transformer in pipeline layers.

Axes: F pixel frames, H W pixels, T latent frames, h w latent cells, C latent channels, B batch.
"""

from __future__ import annotations

import gc
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.progress import stepping
from models.checkpoint import Tensors, load_into, materialise, trim_heap
from models.eight_bit import EIGHT_BIT, FLOAT8, quantised, replace_linears
from models.layers import PipelineLayer
from models.lora_names import LoraNames
from models.streaming import HostMemory, streamed_blocks

_log = logging.getLogger(__name__)
T = TypeVar("T")

TIMESTEPS = 1000.0
"""Both families embed the noise level t in [0, 1] as a timestep in [0, 1000]."""


@dataclass(frozen=True)
class Geometry:
    """How pixels map to latents and tokens."""

    temporal_stride: int = 4
    spatial_stride: int = 8
    patch: int = 2
    latent_channels: int = 16

    @property
    def size_step(self) -> int:
        """Width and height must be multiples of this many pixels."""
        return self.spatial_stride * self.patch

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, h, w) of a video.

        Raises:
            UserError: the video does not lie on the grid; the message names the nearest sizes that do.
        """
        if (frames - 1) % self.temporal_stride:
            lower = frames - 1 - (frames - 1) % self.temporal_stride + 1
            raise UserError(
                f"{frames} frames do not fit the model: it takes 4n+1 frames. "
                f"The nearest are {lower} and {lower + self.temporal_stride}."
            )
        for name, side in (("height", height), ("width", width)):
            if side % self.size_step:
                lower = side - side % self.size_step
                raise UserError(
                    f"{name} {side} does not fit the model: it takes multiples of {self.size_step}. "
                    f"The nearest are {lower} and {lower + self.size_step}."
                )
        latent_frames = (frames - 1) // self.temporal_stride + 1
        return (self.latent_channels, latent_frames, height // self.spatial_stride, width // self.spatial_stride)


class Flops(NamedTuple):
    """Floating-point operations: of linears but those at the ends of branches, of these (`OutputLinear`), of attention."""

    linears: float
    outputs: float
    attention: float


def release_memory() -> None:
    """Give back to the GPU what nothing uses any more, circles of references included."""
    gc.collect()
    torch.cuda.empty_cache()


class Checkpoint(Protocol):
    """A checkpoint of one family: finds its parts, opens and loads each when asked."""

    def identity(self) -> dict[str, Any]: ...

    def load_vae(self, device: torch.device, dtype: torch.dtype) -> Any: ...

    def load_text_encoder(self, device: torch.device) -> Any: ...

    def transformer_tensors(self) -> Tensors: ...

    def describe_layout(self) -> str: ...


class I2VModel(ABC):
    """An image-to-video model as released: conditioned on its first frame only.

    `loraedit_ext` subclasses it and overrides which part of the video the model is told, nothing else: `known_region`,
    and HunyuanVideo's `encode_known`.

    Args:
        checkpoint: where the weights are; nothing is read before it is needed.
        device: of the encoders.
        vae_dtype: what the VAE's weights are stored in and computed with.
    """

    family: ClassVar[str]
    """Name in `[model] type`."""
    lora_names: ClassVar[LoraNames]
    """How ComfyUI, diffusers and kohya's tools spell this family's linears."""
    lora_targets: ClassVar[str]
    """Regular expression of the linears that a LoRA adapts, in original names."""
    condition_names: tuple[str, ...]
    """The conditioning tensors, in the order in which the transformer's inputs have them."""
    kept_in_fp32: ClassVar[tuple[str, ...]]
    """Parts of the names of small weights that stay fp32 whatever the storage dtype."""
    large_linears: ClassVar[str]
    """Regular expression of the blocks' linears, nearly all of the weights: these alone may be stored in 8 bits."""
    trained_fps: ClassVar[int]
    """Frames per second of the videos that the released weights were trained on."""
    trained_frames: ClassVar[int]
    """Frames of the longest of them."""
    encoding_room: ClassVar[float]
    """Bytes of host memory that the encoders may take, on their way to the device or where it has no room for them."""
    geometry: Geometry

    def __init__(
        self, checkpoint: Checkpoint, device: torch.device, *, vae_dtype: torch.dtype = torch.float32
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.vae_dtype = vae_dtype
        self._encoders: dict[str, Any] = {}
        self._on_cpu: set[str] = set()

    @property
    def loaders(self) -> dict[str, Callable[[torch.device], Any]]:
        """How to load each frozen encoder, by name."""
        return {
            "vae": lambda device: self.checkpoint.load_vae(device, self.vae_dtype),
            "text": self.checkpoint.load_text_encoder,
        }

    def encoder(self, name: str) -> Any:
        """The frozen encoder of that name, loaded when first asked for."""
        if name not in self._encoders:
            self._encoders[name] = self.loaders[name](self._home(name))
        return self._encoders[name]

    def _home(self, name: str) -> torch.device:
        return torch.device("cpu") if name in self._on_cpu else self.device

    @property
    def vae(self) -> Any:
        return self.encoder("vae")

    def run_encoder(self, name: str, work: Callable[[Any], T]) -> T:
        """One pass of a frozen encoder: beside the others or, if the GPU lacks room, without them, or else on the CPU.

        Loading counts as part of the pass (umT5 takes 11 GB, LLaVA 16). What went to the CPU once stays there.

        Args:
            work: the pass, given the encoder; its result is on the CPU.
        """
        for relieve in (self._free_others, self._move_to_cpu):
            try:
                return work(self.encoder(name))
            except torch.OutOfMemoryError:
                if self._home(name).type == "cpu":
                    raise
            relieve(name)  # behind the handler: within it the error keeps alive what the pass had allocated
        return work(self.encoder(name))

    def _free_others(self, name: str) -> None:
        self._encoders = {each: self._encoders[each] for each in self._encoders if each == name or each in self._on_cpu}
        release_memory()

    def _move_to_cpu(self, name: str) -> None:
        self._encoders.pop(name, None)
        self._on_cpu.add(name)
        release_memory()
        halve = name == "vae" and self.vae_dtype == torch.float32
        _log.warning(
            "The GPU has no room for the %s encoder at work; it runs on the CPU from here on, which takes long.%s", name,
            ' model.vae_dtype = "bfloat16" halves what it needs.' if halve else "",
        )

    def free_encoders(self) -> None:
        """Drop every encoder that was loaded, before the transformer takes the memory."""
        self._encoders.clear()
        torch.cuda.empty_cache()

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Family, variant and dimensions: what a LoRA must have been trained for to fit."""

    def encoder_identity(self) -> dict[str, Any]:
        """JSON identity of everything that shapes encoded triples; part of the latent cache's key."""
        rounded = {} if self.vae_dtype == torch.float32 else {"vae_dtype": str(self.vae_dtype)}
        return self.checkpoint.identity() | rounded

    def encode_video(self, video: Tensor) -> Tensor:
        """(3, F, H, W) in [-1, 1] -> normalised latents (C, T, h, w), fp32 on the CPU."""
        self.geometry.latent_shape(*video.shape[1:])
        return self.run_encoder("vae", lambda vae: vae.encode(video[None])[0].cpu())

    def decode_video(self, latents: Tensor) -> Tensor:
        """Normalised latents (C, T, h, w) -> (3, F, H, W) in [-1, 1], fp32 on the CPU."""
        return self.run_encoder("vae", lambda vae: vae.decode(latents[None])[0].cpu())

    @abstractmethod
    def encode_prompt(self, prompt: str, reference: Tensor) -> dict[str, Tensor]:
        """The part of the conditioning that depends on the prompt; replaced for the unconditional pass."""

    def encode_negative(self, prompt: str, reference: Tensor) -> dict[str, Tensor]:
        """The same for the unconditional pass of classifier-free guidance."""
        return self.encode_prompt(prompt, reference)

    @abstractmethod
    def encode_condition(
        self, video: Tensor, mask: Tensor, reference: Tensor, prompt: str
    ) -> dict[str, Tensor]:
        """All conditioning tensors by name, without batch axis.

        Args:
            video: (3, F, H, W) in [-1, 1], the pseudo-video.
            mask: bool (F, H, W), True where the pseudo-video is to be preserved.
            reference: (3, H, W) in [-1, 1], the picture for the image encoder.
            prompt: the whole prompt, special token included.
        """

    @abstractmethod
    def known_region(self, video: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The pseudo-video to encode and the mask in the model's own latent layout.

        As released: frame 0, then mid-grey; known on frame 0 only, whatever `video` and `mask` hold behind it.
        """

    @abstractmethod
    def flops(self, tokens: int) -> Flops:
        """Of a forward pass of the transformer's blocks over so many video tokens."""

    @abstractmethod
    def build_transformer(self) -> nn.Module:
        """The transformer on the meta device; its `layers()` give the pipeline chain."""

    def dtype_of(self, name: str, dtype: torch.dtype, linears: torch.dtype | None = None) -> torch.dtype:
        """Storage dtype of a parameter (original name): the one rule on what stays in fp32 and what goes to 8 bits.

        Args:
            dtype: of all that is not an exception.
            linears: of the weights of the blocks' large linears, where it differs.
        """
        if any(part in name for part in self.kept_in_fp32):
            return torch.float32
        module, _, leaf = name.rpartition(".")
        return linears if linears and leaf == "weight" and re.fullmatch(self.large_linears, module) else dtype

    def load_weights(
        self, layers: list[PipelineLayer], dtype: torch.dtype, device: torch.device, linears: torch.dtype | None = None,
        swapped: int = 0,
    ) -> None:
        """Stream the checkpoint's weights into these layers, and read no others.

        Args:
            dtype, linears: see `dtype_of`. With `linears` in float8, weights that are 8-bit in the file stay as they are,
                with their scales if they have any; others, and all in int8, get one scale per row.
            swapped: so many blocks fewer shall be on the device (`models.streaming`); needs the whole chain of layers.
        """
        tensors, host = self.checkpoint.transformer_tensors(), HostMemory(device)
        streamed = streamed_blocks(layers, swapped)
        for layer in stepping(layers, "loading transformer", unit="layer"):
            home = torch.device("cpu") if layer in streamed else device
            for attribute, origin in layer.origin.items():
                part = getattr(layer, attribute)
                self._load_part(part, origin, tensors.under(f"{origin}."), dtype, home, linears, layer not in streamed)
            if layer in streamed:
                host.take(layer)
                trim_heap()  # or it keeps the room of two blocks
        host.serve()

    def _load_part(
        self, module: nn.Module, origin: str, tensors: Tensors, dtype: torch.dtype, device: torch.device,
        linears: torch.dtype | None, mapped: bool,
    ) -> None:
        stored = replace_linears(module, origin, self.large_linears) if linears in EIGHT_BIT else {}
        for name, linear in stored.items():
            key = f"{name}.weight"
            entry = tensors.entries.get(key)
            if entry is None or entry.shape != tuple(linear.weight.shape) or not entry.dtype.is_floating_point:
                continue  # the checks of load_into tell
            kept = linears in FLOAT8
            if kept and entry.scaled is not None:
                tensors.entries[key], scale = entry.scaled
                linear.scale = materialise(scale, torch.float32, device)
            elif not kept or entry.dtype not in FLOAT8:
                tensors.entries[key], linear.scale = quantised(entry, linears, device)
                linear.weight = nn.Parameter(linear.weight.to(linears), requires_grad=False)  # still on the meta device

        def final(name: str, example: Tensor) -> torch.dtype:
            chosen = self.dtype_of(f"{origin}.{name}", dtype, linears)
            return example.dtype if chosen in FLOAT8 and example.dtype in FLOAT8 else chosen

        load_into(module, tensors, final, device, mapped)

    def model_inputs(
        self, noisy: Tensor, t: Tensor, condition: dict[str, Tensor], guidance: float = 1.0
    ) -> tuple[Tensor, ...]:
        """Batched inputs of the first pipeline layer: noisy latents (B,C,T,h,w), timestep (B,), conditioning.

        Args:
            guidance: strength for a model with an embedding of it; others do not look at it.
        """
        return (noisy, t * TIMESTEPS, *(condition[name] for name in self.condition_names))

    def loss_weight(self, condition: dict[str, Tensor]) -> Tensor | None:
        """Weight per latent (B,1,T,h,w) of the loss, or None for all alike."""
        return None

    def start_latents(self, noise: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """Where sampling starts, from noise (B,C,T,h,w)."""
        return noise

    def final_latents(self, latents: Tensor, condition: dict[str, Tensor]) -> Tensor:
        """What is decoded, from the sampler's last state (B,C,T,h,w)."""
        return latents
