"""LoRA files of every tool: read into original names with scale 1, written in ComfyUI's, diffusers' or kohya's names.

Sources of the spellings: ComfyUI `comfy/lora.py`, diffusers `loaders/lora_conversion_utils.py`, kohya's musubi-tuner
`networks/lora.py`, peft `utils/save_and_load.py`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from common.errors import UserError
from models.hunyuan.keys import LORA as HUNYUAN
from models.lora_names import KOHYA_PREFIX, LoraNames, LoraWeights, split_key
from models.wan.keys import LORA as WAN

FAMILIES: tuple[LoraNames, ...] = (WAN, HUNYUAN)
Export = Literal["comfyui", "diffusers", "kohya"]
EXPORTS: tuple[Export, ...] = get_args(Export)
DIFFUSERS_METADATA = "lora_adapter_metadata"
DIFFUSERS_PREFIX = "transformer."
PEFT_PREFIX = "base_model.model."

_LAYOUT_OF_PREFIX = {
    KOHYA_PREFIX: "kohya", PEFT_PREFIX: "peft", "model.diffusion_model.": "comfyui", "diffusion_model.": "comfyui",
    DIFFUSERS_PREFIX: "diffusers",
}  # fmt: skip
_BRANCH = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up)(?:\.\w+)?\.(weight|bias)")
_SINGLE = re.compile(r"(.+)\.(alpha|diff|diff_b)")
_PARTS = {
    ("lora_A", "weight"): "down", ("lora_down", "weight"): "down", ("lora_B", "weight"): "up",
    ("lora_up", "weight"): "up", ("lora_B", "bias"): "bias",
}  # fmt: skip
_OTHER_KINDS = {
    "hada_": "a LoHa", "lokr_": "a LoKr", "dora_scale": "a DoRA", "magnitude_vector": "a DoRA", "oft_": "an OFT",
    "double_blocks.": "a HunyuanVideo LoRA", "single_blocks.": "a HunyuanVideo LoRA",
    "blocks.0.self_attn": "a Wan LoRA", "blocks.0.attn1": "a Wan LoRA",
    "lora_te": "a LoRA with text encoder weights", "down_blocks": "a Stable Diffusion LoRA",
}  # fmt: skip

Parts = dict[str, Tensor]
Scale = Callable[[str, int], float]
"""From a module's name in the file and its rank to alpha / rank."""


@dataclass(frozen=True)
class Parsed:
    """What a LoRA file holds, in original names.

    `differences` are whole tensors to add to parameters, as step-distilled LoRAs have for norms and biases;
    `layout` names the tool whose spelling the file has.
    """

    weights: LoraWeights
    differences: dict[str, Tensor]
    layout: str


def names_of(family: str) -> LoraNames:
    """The names of a family."""
    return next(names for names in FAMILIES if names.family == family)


def family_of(keys: Iterable[str], where: Path) -> LoraNames:
    """The family whose modules all `keys` name.

    Raises:
        UserError: no family knows them.
    """
    keys = list(keys)
    for names in FAMILIES:
        if keys and not any(_stranger(key, names) for key in keys):
            return names
    best = min(FAMILIES, key=lambda names: sum(_stranger(key, names) for key in keys))
    raise _foreign(keys, best, where)


def parse(
    tensors: Mapping[str, Tensor], names: LoraNames, where: Path, header: Mapping[str, str] | None = None,
    adapter_config: Mapping[str, Any] | None = None,
) -> Parsed:
    """Understand a LoRA file's tensors.

    Args:
        tensors: by their names in the file.
        names: the family that the LoRA must be of.
        header: metadata of a safetensors file; diffusers keeps alpha there.
        adapter_config: content of peft's adapter_config.json.

    Raises:
        UserError: not a LoRA of this family, half a branch, shapes that do not belong together, an unknown alpha.
    """
    keys = list(tensors)
    if not keys or any(_stranger(key, names) for key in keys):
        raise _foreign(keys, names, where)
    layout = _layout(keys, names)
    modules: dict[str, Parts] = {}
    spelled: dict[str, str] = {}
    for key in keys:
        module, part = _split(key)
        original = names.original(module) or module
        if part in modules.setdefault(original, {}):
            raise UserError(f"{where}: `{key}` is there twice in different spellings. Use an unmodified file.")
        if not tensors[key].is_floating_point():
            raise UserError(f"{where}: `{key}` has dtype {tensors[key].dtype}; expected floating point.")
        modules[original][part] = tensors[key]
        spelled[original] = module
    scale = _scale(layout, header or {}, adapter_config, where)
    weights: LoraWeights = {}
    differences: dict[str, Tensor] = {}
    for original, parts in modules.items():
        if "down" in parts or "up" in parts:
            _read_branch(original, parts, scale(spelled[original], _rank(parts)), where, weights, differences)
        _read_differences(original, parts, names, differences)
    try:
        return Parsed(names.from_library(weights), differences, layout)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _layout(keys: list[str], names: LoraNames) -> str:
    """Whose spelling it is; `transformer.` before its names is ComfyUI's for HunyuanVideo."""
    layout = next((_LAYOUT_OF_PREFIX[prefix] for key in keys for prefix in _prefixes(key)), "bare")
    comfyuis = all(names.is_comfyuis(_split(key)[0]) for key in keys)
    return "comfyui" if layout == "diffusers" and comfyuis else layout


def _prefixes(key: str) -> list[str]:
    """The known prefixes of a key, outermost first."""
    found = []
    while prefix := next((prefix for prefix in _LAYOUT_OF_PREFIX if key.startswith(prefix)), None):
        found.append(prefix)
        key = key.removeprefix(prefix)
    return found


def _split(key: str) -> tuple[str, str]:
    """Module without prefixes, and part (down, up, bias, alpha, diff, diff_b); an empty part for a stranger."""
    bare = key.removeprefix("".join(_prefixes(key)))
    if match := _BRANCH.fullmatch(bare):
        return match[1], _PARTS.get((match[2], match[3]), "")
    match = _SINGLE.fullmatch(bare)
    return (match[1], match[2]) if match else (bare, "")


def _stranger(key: str, names: LoraNames) -> bool:
    module, part = _split(key)
    return not part or names.original(module) is None


def _foreign(keys: list[str], names: LoraNames, where: Path) -> UserError:
    strangers = [key for key in keys if _stranger(key, names)]
    kind = next((kind for mark, kind in _OTHER_KINDS.items() if any(mark in key for key in strangers)), "")
    found = f"found `{strangers[0]}` ({len(strangers)} of {len(keys)} names are foreign)" if strangers else "found none"
    return UserError(
        f"{where}: not a LoRA for {names.family}: expected names like `{names.prefix}{names.example}.lora_A.weight` "
        "in the spelling of ComfyUI, diffusers, kohya or peft, "
        f"{found}. {f'This looks like {kind}, which cannot be used here.' if kind else 'Check which file this is.'}"
    )


def _rank(parts: Parts) -> int:
    down = parts.get("down")
    return down.shape[0] if down is not None and down.ndim else 0


def _scale(
    layout: str, header: Mapping[str, str], adapter_config: Mapping[str, Any] | None, where: Path
) -> Scale:
    """The scale of a branch without an alpha of its own: as peft's or diffusers' metadata say, else 1."""
    settings = adapter_config
    if settings is None and layout == "peft":
        settings = {}
    if settings is None and DIFFUSERS_METADATA in header:
        values = json_object(header[DIFFUSERS_METADATA], f"{where}: metadata {DIFFUSERS_METADATA}")
        settings = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in values.items()}
    if settings is None:
        return lambda module, rank: 1.0
    return _peft_scale(settings, layout, where)


def _peft_scale(settings: Mapping[str, Any], layout: str, where: Path) -> Scale:
    alpha, pattern = settings.get("lora_alpha"), settings.get("alpha_pattern") or {}
    names = [str(key).removeprefix("^") for key in pattern] if isinstance(pattern, Mapping) else ["?"]
    if any(not re.fullmatch(r"[\w.]+", name) for name in names):
        raise UserError(f"{where}: an alpha_pattern of regular expressions cannot be read; expected module names.")
    alphas = dict(zip(names, pattern.values(), strict=True))

    def scale(module: str, rank: int) -> float:
        own = next((a for name, a in alphas.items() if module == name or module.endswith("." + name)), alpha)
        if not isinstance(own, int | float) or isinstance(own, bool) or not math.isfinite(own):
            raise UserError(
                f"{where}: the strength of {module} is unknown (lora_alpha is {own!r}): peft keeps it in "
                "adapter_config.json. Put that file beside the weights."
            )
        return own / (math.sqrt(rank) if settings.get("use_rslora") else rank) if rank else 1.0

    return scale


def json_object(text: str, what: str) -> dict[str, Any]:
    """Parse a JSON object; anything else is a `UserError` that begins with `what`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is not JSON ({error}). The file is damaged or was edited.") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} is a {type(value).__name__}, expected an object. The file was edited.")
    return value


def _read_branch(
    module: str, parts: Parts, scale: float, where: Path, weights: LoraWeights, differences: dict[str, Tensor]
) -> None:
    """One linear's branch with its scale multiplied into B; a convolution's becomes a difference."""
    down, up = parts.get("down"), parts.get("up")
    if down is None or up is None:
        raise UserError(f"{where}: {module} has only half a branch ({', '.join(parts)}). The file is incomplete.")
    if down.ndim < 2 or up.ndim != down.ndim or down.shape[0] != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise UserError(
            f"{where}: {module} has shapes A {tuple(down.shape)}, B {tuple(up.shape)}; expected (rank, in) and "
            "(out, rank). The file is damaged."
        )
    if "alpha" in parts:
        scale = _number(parts["alpha"], f"{where}: {module}.alpha") / down.shape[0]
    if scale != 1.0:
        up = up.float() * scale
    if down.ndim > 2:
        if math.prod(up.shape[2:]) != 1:
            raise UserError(f"{where}: {module} is a convolution with B {tuple(up.shape)}; expected one of size 1.")
        difference = up.float().flatten(1) @ down.float().flatten(1)
        differences[f"{module}.weight"] = difference.view(up.shape[0], *down.shape[1:])
    else:
        weights[f"{module}.lora_A.weight"], weights[f"{module}.lora_B.weight"] = down, up
    if "bias" in parts:
        differences[f"{module}.bias"] = parts["bias"].float() * scale


def _number(tensor: Tensor, what: str) -> float:
    value = tensor.item() if tensor.numel() == 1 else math.nan
    if not math.isfinite(value):
        raise UserError(f"{what} is {tuple(tensor.shape)} {value}, expected one finite number. The file is damaged.")
    return float(value)


def _read_differences(module: str, parts: Parts, names: LoraNames, differences: dict[str, Tensor]) -> None:
    if "diff" in parts:
        whole = module.rpartition(".")[2] in names.bare
        differences[module if whole else f"{module}.weight"] = parts["diff"]
    if "diff_b" in parts:
        differences[f"{module}.bias"] = parts["diff_b"]


def spell(
    weights: LoraWeights, differences: Mapping[str, Tensor], names: LoraNames, layout: Export
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the header of a file in a tool's spelling.

    Raises:
        UserError: the LoRA has differences, and the tool has no name for them.
    """
    if differences and layout != "comfyui":
        raise UserError(
            f"this LoRA also changes {len(differences)} norms or biases ({next(iter(differences))}), which only "
            "ComfyUI's format can hold. Use --to comfyui."
        )
    if layout == "diffusers":
        named = names.to_library(weights)
        tensors = {DIFFUSERS_PREFIX + name: value for name, value in named.items()}
        return tensors, {DIFFUSERS_METADATA: json.dumps(_peft_config(named))}
    if layout == "kohya":
        return _kohya(weights, names), {"ss_network_module": "networks.lora"}
    changes = {_difference_key(name, names): value for name, value in differences.items()}
    return {names.prefix + name: value for name, value in {**weights, **changes}.items()}, {}


def _kohya(weights: LoraWeights, names: LoraNames) -> dict[str, Tensor]:
    tensors = {}
    for name, value in weights.items():
        module, part = split_key(name)
        kohya = names.kohya(module)
        if part == "lora_A.weight":
            tensors[f"{kohya}.alpha"] = torch.tensor(float(value.shape[0]))
        tensors[f"{kohya}.{'lora_down' if part == 'lora_A.weight' else 'lora_up'}.weight"] = value
    return tensors


def _difference_key(parameter: str, names: LoraNames) -> str:
    module, _, leaf = parameter.rpartition(".")
    if leaf in names.bare:
        return f"{parameter}.diff"
    return f"{module}.{'diff_b' if leaf == 'bias' else 'diff'}"


def _peft_config(named: LoraWeights) -> dict[str, Any]:
    """What diffusers hands to peft: alpha = rank for every module, since the scale is in the weights."""
    ranks = {split_key(name)[0]: value.shape[0] for name, value in named.items() if ".lora_A." in name}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {module: rank for module, rank in ranks.items() if rank != common}
    config = {
        "r": common, "lora_alpha": common, "rank_pattern": other, "alpha_pattern": other,
        "target_modules": sorted(ranks), "lora_bias": False, "use_dora": False, "use_rslora": False,
    }  # fmt: skip
    return {DIFFUSERS_PREFIX + key: value for key, value in config.items()}
