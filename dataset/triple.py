"""The unit of training: a (condition, mask, target) triple, in pixels and encoded.

Axes: F pixel frames, H W pixels, T latent frames, h w latent cells, C latent channels.
This room carries the tensors; what a mask means is decided in `loraedit_ext.masks` and
`loraedit_ext.regimes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Triple:
    """One sample in pixels, before the frozen encoders (paper section 3.3, equation 2)."""

    name: str
    """Unique within a job and stable between runs, e.g. `motion`, `motion@12`, `appearance@12`."""
    condition: Tensor
    """float32 (3, F, H, W) in [-1, 1]: the pseudo-video that the model is conditioned on."""
    mask: Tensor
    """bool (F, H, W)."""
    target: Tensor | None
    """float32 (3, F, H, W) in [-1, 1]: what the model learns to generate; None at inference."""
    reference: Tensor
    """float32 (3, H, W) in [-1, 1]: the picture for the image encoder."""
    prompt: str


@dataclass(frozen=True)
class EncodedTriple:
    """The same sample in latents; nothing else is needed to train on it."""

    name: str
    target: Tensor | None
    """float32 (C, T, h, w): normalised latents of the target video; None at inference."""
    condition: dict[str, Tensor]
    """The model's conditioning by name, without batch axis; names and shapes are the model's own."""
