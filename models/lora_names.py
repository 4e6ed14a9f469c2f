"""How tools spell the linears that a LoRA adapts, for one model family: original, diffusers, kohya."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from models.keymap import KeyMap

KOHYA_PREFIX = "lora_unet_"

LoraWeights = dict[str, Tensor]
"""`<linear>.lora_A.weight` (rank, in) and `<linear>.lora_B.weight` (out, rank) of each adapted linear, scale 1."""


class LoraNames:
    """The names of one family's modules.

    Args:
        family: as in `[model] type`.
        prefix: before original names in ComfyUI's files.
        modules: original names of all modules with weights; `{}` stands for a block's index; what follows a `#`
            (a part of a fused linear) does not count.
        library: original (left) to diffusers (right).
        bare: last parts of parameters that belong to no module of their own (`modulation`).
        comfyui: original (left) to the names that ComfyUI has of its own.
    """

    def __init__(
        self, family: str, prefix: str, modules: Iterable[str], library: KeyMap, bare: tuple[str, ...] = (),
        comfyui: KeyMap | None = None,
    ) -> None:
        self.family = family
        self.prefix = prefix
        self.bare = bare
        self._library = library
        self._comfyui = comfyui or KeyMap([])
        modules = sorted({module.partition("#")[0] for module in modules})
        self._known = [_pattern(module) for module in modules]
        spelled = [*modules, *self._comfyui.right]
        self._kohya = [(_pattern(module.replace(".", "_")), module) for module in spelled]

    @property
    def example(self) -> str:
        """The original name of one linear of a block, for messages."""
        return next(name.format(0) for _, name in self._kohya if re.search(r"blocks.*(qkv|\.q)$", name))

    def knows(self, module: str) -> bool:
        """Whether `module` is the original name of one of this family's modules."""
        return any(pattern.fullmatch(module) for pattern in self._known)

    def original(self, module: str) -> str | None:
        """The original name of a module in any tool's spelling, without prefix; None for a stranger."""
        for name in (module, self._library.to_left(module), self._of_kohya(module)):
            own = None if name is None else self._comfyui.to_left(name)
            if own is not None and self.knows(own):
                return own
        return None

    def is_comfyuis(self, module: str) -> bool:
        """Whether ComfyUI takes the module's name as it is: it is the original's, or ComfyUI's own."""
        return self.knows(self._comfyui.to_left(module))

    def _of_kohya(self, module: str) -> str | None:
        matches = ((pattern.fullmatch(module), name) for pattern, name in self._kohya)
        return next((name.format(*match.groups()) for match, name in matches if match), None)

    def kohya(self, module: str) -> str:
        """musubi-tuner's name of an original module: dots become underscores."""
        return KOHYA_PREFIX + module.replace(".", "_")

    def diffusers(self, module: str) -> str:
        """diffusers' name of an original module."""
        return self._library.to_right(module)

    def from_library(self, weights: Mapping[str, Tensor]) -> LoraWeights:
        """Weights of original linears from weights under what `original` calls them.

        The same here. A family whose original linears are several in diffusers joins their branches.
        """
        return dict(weights)

    def to_library(self, weights: Mapping[str, Tensor]) -> LoraWeights:
        """Weights under diffusers' names, without prefix, from those of original linears."""
        renamed = {}
        for name, value in weights.items():
            module, part = split_key(name)
            renamed[f"{self.diffusers(module)}.{part}"] = value
        return renamed


def split_key(name: str) -> tuple[str, str]:
    """`blocks.0.ffn.0.lora_A.weight` -> `blocks.0.ffn.0`, `lora_A.weight`."""
    module, _, part = name.rpartition(".lora_")
    return module, f"lora_{part}"


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))
