"""From pixels to latents, once: triples through the frozen encoders into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.files import check_writable
from common.progress import progress
from dataset.cache import LatentCache
from dataset.triple import EncodedTriple, Triple
from loraedit_ext.masks import MaskRule
from loraedit_ext.pipeline import World
from models.base import I2VModel


@dataclass(frozen=True)
class Unconditional:
    """What the unconditional pass of classifier-free guidance is told instead of the prompt."""

    name: str
    reference: Tensor
    """float32 (3, H, W) in [-1, 1]."""
    prompt: str


def encode(model: I2VModel, triple: Triple | Unconditional) -> EncodedTriple:
    """Run the frozen encoders on one triple."""
    if isinstance(triple, Unconditional):
        return EncodedTriple(triple.name, None, model.encode_negative(triple.prompt, triple.reference))
    condition = model.encode_condition(triple.condition, triple.mask, triple.reference, triple.prompt)
    target = None if triple.target is None else model.encode_video(triple.target)
    return EncodedTriple(triple.name, target, condition)


def identity(model: I2VModel, triple: Triple | Unconditional, rule: MaskRule) -> dict[str, Any]:
    """The cache key of a triple: its own pixels, mask and words, and all that encodes them.

    Keyed by what is encoded rather than by where it came from, so an edit of one frame re-encodes one sample.
    """
    tensors = {"reference": triple.reference}
    if isinstance(triple, Triple):
        tensors |= {"condition": triple.condition, "mask": triple.mask, "target": triple.target}
    return {
        "name": triple.name,
        "prompt": triple.prompt,
        "mask_rule": rule,
        "model": {key: value for key, value in model.describe().items() if key != "expert"},  # both read the same
        "encoders": model.encoder_identity(),
        **{name: _hash(tensor) for name, tensor in tensors.items() if tensor is not None},
    }


def _hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def encode_all(
    model: I2VModel, triples: Sequence[Triple | Unconditional], cache: LatentCache, rule: MaskRule, world: World
) -> dict[str, EncodedTriple]:
    """All triples, encoded by the main process where the cache lacks them and read from the cache elsewhere.

    With a warm cache no encoder is loaded. Encoders are freed before this returns.
    """
    identities = {triple.name: identity(model, triple, rule) for triple in triples}
    if world.is_main:
        missing = [triple for triple in triples if cache.get(identities[triple.name]) is None]
        if missing:
            check_writable(cache.folder)
        with progress(len(missing), "encoding", unit="sample") as bar:
            for triple in missing:
                cache.put(identities[triple.name], encode(model, triple))
                bar.update()
        model.free_encoders()
    world.barrier()
    samples = {}
    for name, key in identities.items():
        sample = cache.get(key)
        if sample is None:
            raise UserError(
                f"{cache.path(key)}: the cache entry of `{name}` is not there after encoding. With several machines, "
                "cache_dir must be on a disk that all of them share."
            )
        samples[name] = sample
    return samples
