"""Parameter names of HunyuanVideo's transformer and VAE: original release on the left, diffusers or ComfyUI on the right."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from common.errors import UserError
from models.checkpoint import Entry, Tensors, release_pages
from models.keymap import KeyMap
from models.lora_names import LoraNames, LoraWeights, split_key

_PIECES = ("#q", "#k", "#v", "#mlp")
"""Parts of a linear that the original fuses and diffusers keeps apart, in the order of the fused rows."""

_TIME = "time_text_embed"
_REFINER = "txt_in.individual_token_refiner.blocks.{}"
_REFINER_RIGHT = "context_embedder.token_refiner.refiner_blocks.{}"
_DOUBLE, _DOUBLE_RIGHT = "double_blocks.{}", "transformer_blocks.{}"
_SINGLE, _SINGLE_RIGHT = "single_blocks.{}", "single_transformer_blocks.{}"
FINAL_MODULATION = "final_layer.adaLN_modulation.1"


def _qkv(left: str, *right: str) -> list[tuple[str, str]]:
    return [(left + piece, name) for piece, name in zip(_PIECES, right, strict=False)]


TRANSFORMER = KeyMap([
    ("img_in", "x_embedder"),
    ("time_in.mlp.0", f"{_TIME}.timestep_embedder.linear_1"),
    ("time_in.mlp.2", f"{_TIME}.timestep_embedder.linear_2"),
    ("guidance_in.mlp.0", f"{_TIME}.guidance_embedder.linear_1"),
    ("guidance_in.mlp.2", f"{_TIME}.guidance_embedder.linear_2"),
    ("vector_in.in_layer", f"{_TIME}.text_embedder.linear_1"),
    ("vector_in.out_layer", f"{_TIME}.text_embedder.linear_2"),
    ("txt_in.input_embedder", "context_embedder.proj_in"),
    ("txt_in.t_embedder.mlp.0", f"context_embedder.{_TIME}.timestep_embedder.linear_1"),
    ("txt_in.t_embedder.mlp.2", f"context_embedder.{_TIME}.timestep_embedder.linear_2"),
    ("txt_in.c_embedder.linear_1", f"context_embedder.{_TIME}.text_embedder.linear_1"),
    ("txt_in.c_embedder.linear_2", f"context_embedder.{_TIME}.text_embedder.linear_2"),
    (f"{_REFINER}.norm1", f"{_REFINER_RIGHT}.norm1"),
    (f"{_REFINER}.norm2", f"{_REFINER_RIGHT}.norm2"),
    *_qkv(f"{_REFINER}.self_attn_qkv", *(f"{_REFINER_RIGHT}.attn.to_{part}" for part in "qkv")),
    (f"{_REFINER}.self_attn_proj", f"{_REFINER_RIGHT}.attn.to_out.0"),
    (f"{_REFINER}.mlp.fc1", f"{_REFINER_RIGHT}.ff.net.0.proj"),
    (f"{_REFINER}.mlp.fc2", f"{_REFINER_RIGHT}.ff.net.2"),
    (f"{_REFINER}.adaLN_modulation.1", f"{_REFINER_RIGHT}.norm_out.linear"),
    (f"{_DOUBLE}.img_mod.linear", f"{_DOUBLE_RIGHT}.norm1.linear"),
    *_qkv(f"{_DOUBLE}.img_attn_qkv", *(f"{_DOUBLE_RIGHT}.attn.to_{part}" for part in "qkv")),
    (f"{_DOUBLE}.img_attn_q_norm", f"{_DOUBLE_RIGHT}.attn.norm_q"),
    (f"{_DOUBLE}.img_attn_k_norm", f"{_DOUBLE_RIGHT}.attn.norm_k"),
    (f"{_DOUBLE}.img_attn_proj", f"{_DOUBLE_RIGHT}.attn.to_out.0"),
    (f"{_DOUBLE}.img_mlp.fc1", f"{_DOUBLE_RIGHT}.ff.net.0.proj"),
    (f"{_DOUBLE}.img_mlp.fc2", f"{_DOUBLE_RIGHT}.ff.net.2"),
    (f"{_DOUBLE}.txt_mod.linear", f"{_DOUBLE_RIGHT}.norm1_context.linear"),
    *_qkv(f"{_DOUBLE}.txt_attn_qkv", *(f"{_DOUBLE_RIGHT}.attn.add_{part}_proj" for part in "qkv")),
    (f"{_DOUBLE}.txt_attn_q_norm", f"{_DOUBLE_RIGHT}.attn.norm_added_q"),
    (f"{_DOUBLE}.txt_attn_k_norm", f"{_DOUBLE_RIGHT}.attn.norm_added_k"),
    (f"{_DOUBLE}.txt_attn_proj", f"{_DOUBLE_RIGHT}.attn.to_add_out"),
    (f"{_DOUBLE}.txt_mlp.fc1", f"{_DOUBLE_RIGHT}.ff_context.net.0.proj"),
    (f"{_DOUBLE}.txt_mlp.fc2", f"{_DOUBLE_RIGHT}.ff_context.net.2"),
    (f"{_SINGLE}.modulation.linear", f"{_SINGLE_RIGHT}.norm.linear"),
    *_qkv(f"{_SINGLE}.linear1", *(f"{_SINGLE_RIGHT}.attn.to_{part}" for part in "qkv"), f"{_SINGLE_RIGHT}.proj_mlp"),
    (f"{_SINGLE}.q_norm", f"{_SINGLE_RIGHT}.attn.norm_q"),
    (f"{_SINGLE}.k_norm", f"{_SINGLE_RIGHT}.attn.norm_k"),
    (f"{_SINGLE}.linear2", f"{_SINGLE_RIGHT}.proj_out"),
    (FINAL_MODULATION, "norm_out.linear"),
    ("final_layer.linear", "proj_out"),
])


def _comfyui_stream(stream: str) -> list[tuple[str, str]]:
    """One of the two streams of a double block: ComfyUI has its Flux modules there (`comfy/ldm/flux/layers.py`)."""
    left = f"{_DOUBLE}.{stream}"
    return [
        (f"{left}_mod.linear", f"{left}_mod.lin"), (f"{left}_attn_qkv", f"{left}_attn.qkv"),
        *_comfyui_norms(f"{left}_attn_", f"{left}_attn"), (f"{left}_attn_proj", f"{left}_attn.proj"),
        (f"{left}_mlp.fc1", f"{left}_mlp.0"), (f"{left}_mlp.fc2", f"{left}_mlp.2"),
    ]


def _comfyui_norms(left: str, right: str) -> list[tuple[str, str]]:
    """The norms of q and k; their parameter is `scale`, in files of newer versions `weight`."""
    return [
        (f"{left}{part}_norm.weight", f"{right}.norm.{name}_norm.{leaf}")
        for leaf in ("scale", "weight") for part, name in (("q", "query"), ("k", "key"))
    ]


COMFYUI = KeyMap([
    *((f"{embedder}.mlp.{index}", f"{embedder}.{layer}") for embedder in ("time_in", "guidance_in", "txt_in.t_embedder")
      for index, layer in ((0, "in_layer"), (2, "out_layer"))),
    ("txt_in.c_embedder.linear_1", "txt_in.c_embedder.in_layer"),
    ("txt_in.c_embedder.linear_2", "txt_in.c_embedder.out_layer"),
    (f"{_REFINER}.self_attn_qkv", f"{_REFINER}.self_attn.qkv"),
    (f"{_REFINER}.self_attn_proj", f"{_REFINER}.self_attn.proj"),
    (f"{_REFINER}.mlp.fc1", f"{_REFINER}.mlp.0"), (f"{_REFINER}.mlp.fc2", f"{_REFINER}.mlp.2"),
    *_comfyui_stream("img"), *_comfyui_stream("txt"),
    (f"{_SINGLE}.modulation.linear", f"{_SINGLE}.modulation.lin"),
    *_comfyui_norms(f"{_SINGLE}.", _SINGLE),
])
"""ComfyUI's own names, which its repacked files have; every other name is the original's. Linears stay fused."""


def vae_keys(levels: int) -> KeyMap:
    """Names of the VAE: the original's, which are diffusers', against ComfyUI's, which counts the decoder from its end."""
    attention = (("group_norm", "norm"), ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "proj_out"))
    pairs = [
        *_resnet("encoder.down_blocks.{}.resnets.{}", "encoder.down.{}.block.{}"),
        ("encoder.down_blocks.{}.downsamplers.0", "encoder.down.{}.downsample"),
    ]
    for half in ("encoder", "decoder"):
        pairs += [(f"{half}.mid_block.attentions.0.{ours}", f"{half}.mid.attn_1.{theirs}") for ours, theirs in attention]
        pairs += [(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}") for index in range(2)]
        pairs.append((f"{half}.conv_norm_out", f"{half}.norm_out"))
    for level in range(levels):
        left, right = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        pairs += [*_resnet(left + ".resnets.{}", right + ".block.{}"), (f"{left}.upsamplers.0", f"{right}.upsample")]
    return KeyMap(pairs)


def _resnet(left: str, right: str) -> list[tuple[str, str]]:
    return [(f"{left}.conv_shortcut", f"{right}.nin_shortcut"), (left, right)]


def vae_from_comfyui(tensors: Tensors) -> Tensors:
    """ComfyUI's VAE file in the original names; its attention has convolutions of size 1 for linears."""
    levels = {name.split(".")[2] for name in tensors if name.startswith("decoder.up.")}
    keys = vae_keys(len(levels))
    entries = {}
    for name, entry in tensors.renamed(keys.to_left, keys.to_right).entries.items():
        flat = ".attentions.0.to_" in name and len(entry.shape) > 2
        entries[name] = entry.derived(entry.shape[:2], entry.dtype, _linear) if flat else entry
    return Tensors(entries, tensors.where, lambda name: tensors.spell(keys.to_right(name)))


def _linear(convolution: Tensor) -> Tensor:
    return convolution.flatten(1)


def from_comfyui(tensors: Tensors) -> Tensors:
    """The weights of ComfyUI's transformer in the original names."""
    return tensors.renamed(COMFYUI.to_left, COMFYUI.to_right)


def from_diffusers(tensors: Tensors) -> Tensors:
    """A diffusers transformer's weights in the original names: linears fused, shift before scale at the end.

    Raises:
        UserError: a part of a fused linear is missing.
    """
    tensors = tensors.renamed(TRANSFORMER.to_left, _diffusers_spelling)
    entries: dict[str, Entry] = {}
    fused: dict[str, dict[str, Entry]] = {}
    for name, entry in tensors.entries.items():
        if piece := _piece(name):
            fused.setdefault(name.replace(piece, ""), {})[piece] = entry
        elif name.startswith(FINAL_MODULATION):
            entries[name] = entry.derived(entry.shape, entry.dtype, _swap_halves)
        else:
            entries[name] = entry
    for name, parts in fused.items():
        wanted = _pieces_of(name.rpartition(".")[0])
        _check_pieces(name, wanted, tensors)
        entries[name] = _fused([parts[piece] for piece in wanted])
    return Tensors(entries, tensors.where, tensors.spell)


def _diffusers_spelling(name: str) -> str:
    """diffusers' name of an original parameter; of a fused one its first part's."""
    module, _, leaf = name.rpartition(".")
    pieces = () if _piece(module) else _pieces_of(module)
    return TRANSFORMER.to_right(f"{module}{pieces[0]}.{leaf}" if pieces else name)


def _check_pieces(name: str, pieces: Sequence[str], tensors: Tensors) -> None:
    module, _, leaf = name.rpartition(".")
    missing = [name for piece in pieces if (name := f"{module}{piece}.{leaf}") not in tensors]
    if missing:
        raise UserError(
            f"{tensors.where}: {len(missing)} of the {len(pieces)} parts of a linear are missing: "
            f"{', '.join(map(tensors.spell, missing))}. Likely an incomplete download or a missing shard: get the file "
            "again."
        )


def _piece(name: str) -> str:
    return next((piece for piece in _PIECES if piece in name), "")


def _fused(parts: Sequence[Entry]) -> Entry:
    first = parts[0]
    for part in parts:
        if not part.shape or part.shape[1:] != first.shape[1:]:
            raise UserError(
                f"{part.file}: {part.source} has shape {part.shape} beside {first.source} with {first.shape}; expected the "
                "same width. The file is damaged or of another model."
            )
    shape = (sum(part.shape[0] for part in parts), *first.shape[1:])
    same = all(part.dtype == first.dtype for part in parts)
    dtype = first.dtype if same else torch.float32
    return Entry(first.source, first.file, shape, dtype, _concatenation(parts, dtype), mapped=False)


def _concatenation(parts: Sequence[Entry], dtype: torch.dtype) -> Callable[[], Tensor]:
    """Reads the parts into one tensor, and gives the file's pages under each back before the next."""
    def read() -> Tensor:
        first = parts[0]
        joined = torch.empty(sum(part.shape[0] for part in parts), *first.shape[1:], dtype=dtype)
        for part, rows in zip(parts, joined.split([part.shape[0] for part in parts]), strict=True):
            source = part.read()
            rows.copy_(source)
            if part.mapped and source.is_contiguous():
                release_pages(source)
        return joined

    return read


def _swap_halves(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


_MLP_RATIO = 4
"""Rows of linear1's feed-forward part over the width in the released model, for a LoRA that leaves it alone."""
_SWAPPED = "#swapped"
Branch = tuple[Tensor, Tensor]


class HunyuanLoraNames(LoraNames):
    """HunyuanVideo's names: diffusers keeps apart the linears that the original fuses."""

    def original(self, module: str) -> str | None:
        return FINAL_MODULATION + _SWAPPED if module == "norm_out.linear" else super().original(module)

    def knows(self, module: str) -> bool:
        return super().knows(module.partition("#")[0])

    def from_library(self, weights: Mapping[str, Tensor]) -> LoraWeights:
        """Join the branches of one fused linear: A stacked, B block-diagonal, or B stacked where all share one A."""
        modules: dict[str, dict[str, Branch]] = {}
        for name in weights:
            full, part = split_key(name)
            if part == "lora_A.weight":
                module, mark, piece = full.partition("#")
                modules.setdefault(module, {})[mark + piece] = (weights[name], weights[f"{full}.lora_B.weight"])
        joined: LoraWeights = {}
        for module, pieces in modules.items():
            a, b = _joined(module, pieces)
            joined |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        return joined

    def to_library(self, weights: Mapping[str, Tensor]) -> LoraWeights:
        """Give each part of a fused linear its rows of B and the whole A."""
        named: LoraWeights = {}
        for name in weights:
            module, part = split_key(name)
            if part != "lora_A.weight":
                continue
            a, b = weights[name], weights[f"{module}.lora_B.weight"]
            pieces = _pieces_of(module)
            rows = [a.shape[1]] * 3 + [b.shape[0] - 3 * a.shape[1]] * (len(pieces) - 3) if pieces else [b.shape[0]]
            b = _swap_halves(b) if module == FINAL_MODULATION else b
            for piece, own in zip(pieces or [""], b.split(rows), strict=True):
                key = self.diffusers(module + piece)
                named |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": own}
        return named


def _pieces_of(module: str) -> tuple[str, ...]:
    """What diffusers splits a linear of the original into; nothing for most."""
    if module.endswith("_attn_qkv"):
        return _PIECES[:3]
    return _PIECES if module.endswith(".linear1") else ()


def _joined(module: str, pieces: Mapping[str, Branch]) -> Branch:
    if set(pieces) <= {"", _SWAPPED} and len(pieces) == 1:
        (mark, (a, b)) = next(iter(pieces.items()))
        return a, _swap_halves(b) if mark else b
    if not set(pieces) <= set(_pieces_of(module)):
        raise UserError(f"{module} is there in two spellings ({', '.join(pieces)}). Use an unmodified LoRA file.")
    wanted = _pieces_of(module)
    first = next(iter(pieces.values()))[0]
    if len(pieces) == len(wanted) and all(torch.equal(a, first) for a, _ in pieces.values()):
        return first, torch.cat([pieces[piece][1] for piece in wanted])
    present = [pieces[piece] for piece in wanted if piece in pieces]
    if len({a.shape[1] for a, _ in present}) > 1:
        raise UserError(f"{module}: its parts have inputs of different widths. The LoRA file is damaged.")
    width = first.shape[1]
    absent = {piece: first.new_zeros(width * (_MLP_RATIO if piece == "#mlp" else 1), 0) for piece in wanted}
    rows = [pieces[piece][1] if piece in pieces else absent[piece] for piece in wanted]
    return torch.cat([a for a, _ in present]), torch.block_diag(*rows)


LORA = HunyuanLoraNames(
    "hunyuan-video", "transformer.", [*TRANSFORMER.left, "img_in.proj"], TRANSFORMER, comfyui=COMFYUI
)
