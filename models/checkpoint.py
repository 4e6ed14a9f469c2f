"""Weights on disk as lazy mappings: names and shapes unread, tensors one by one from memory-mapped files."""

from __future__ import annotations

import ctypes
import json
import logging
import math
import mmap
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from common.errors import UserError
from common.progress import brief

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_WRAPPERS = ("state_dict", "module", "model")
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_CHUNK_ELEMENTS = 1 << 22
_OWN_MAPPING = (32 << 20) // 4 + 1
"""fp32 elements from which glibc always maps memory of its own (mallopt's M_MMAP_THRESHOLD, at most 32 MB): a smaller
buffer would leave holes in the heap between weights, measured as up to 18 % of the model. Untouched, it costs nothing."""
_LISTED = 5


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, not yet read.

    `source` is its name in the file; `read()` returns it, mapped where `mapped` is true: such a tensor
    shares the file's pages and must not be written to.
    """

    source: str
    file: Path
    shape: Shape
    dtype: torch.dtype
    read: Callable[[], Tensor]
    mapped: bool
    scaled: tuple[Entry, Entry] | None = None
    """Where this is an 8-bit weight times its scale: the two as they are in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def derived(self, shape: Shape, dtype: torch.dtype, function: Callable[[Tensor], Tensor]) -> Entry:
        """The entry of `function(tensor)`, a view (`chunk`, `reshape`), computed when it is read."""
        return replace(self, shape=shape, dtype=dtype, read=lambda: function(self.read()), scaled=None)


class Tensors(Mapping[str, Tensor]):
    """A lazy mapping from names to tensors; `tensors[name]` reads, everything else does not.

    `where` is the file or folder to name in messages; `spell` turns a name of this mapping into the one that
    the user's file has, so that errors speak of names the user can find.
    """

    def __init__(
        self, entries: Mapping[str, Entry], where: Path, spell: Callable[[str], str] = lambda name: name
    ) -> None:
        self.entries = dict(entries)
        self.where = where
        self.spell = spell

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: entry.dtype for name, entry in self.entries.items()}

    def renamed(self, rename: Callable[[str], str], spell: Callable[[str], str] | None = None) -> Tensors:
        """The same tensors under `rename(name)`; `spell` is the inverse, for messages.

        Raises:
            UserError: two tensors would get the same name.
        """
        entries: dict[str, Entry] = {}
        for name, entry in self.entries.items():
            new = rename(name)
            if new in entries:
                raise UserError(
                    f"{self.where}: {entries[new].source} and {entry.source} are the same parameter ({new}) "
                    "in two naming schemes; expected one of them. The file mixes two layouts: use an "
                    "unmodified release."
                )
            entries[new] = entry
        outer = self.spell
        return Tensors(entries, self.where, outer if spell is None else lambda name: outer(spell(name)))

    def stripped(self, *prefixes: str) -> Tensors:
        """Without the first of `prefixes` that occurs, where it occurs; other names stay (for key checks)."""
        names = list(self.entries)
        prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in names)), None)
        if prefix is None:
            return self
        return self.renamed(lambda name: name.removeprefix(prefix), lambda name: prefix + name)

    def under(self, prefix: str) -> Tensors:
        """Only the tensors whose names begin with `prefix`, named without it."""
        part = self.filtered(lambda name: name.startswith(prefix))
        return part.renamed(lambda name: name.removeprefix(prefix), lambda name: prefix + name)

    def filtered(self, keep: Callable[[str], bool]) -> Tensors:
        entries = {name: entry for name, entry in self.entries.items() if keep(name)}
        return Tensors(entries, self.where, self.spell)

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Raise a `UserError` unless names and shapes are exactly `expected`; in the file's own spelling."""
        def spell(name: str) -> str:
            return self.entries[name].source if name in self.entries else self.spell(name)

        check_keys(expected, self.shapes, self.where, spell)


def open_tensors(path: Path, stems: tuple[str, ...] = _STEMS) -> Tensors:
    """Open a safetensors file, a torch file, or a folder with one safetensors file or its shards.

    In a folder, `stems` are the accepted file names without suffix, first match wins.

    Raises:
        UserError: nothing to open, a missing shard, an unreadable or truncated file, a pickle with more than
            tensors.
    """
    if path.is_dir():
        return _open_folder(path, stems)
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the path of an existing checkpoint.")
    path.open("rb").close()  # what may not be read is told as that; its parser would say that it is not there
    if path.suffix == ".safetensors":
        return Tensors(_safetensors_entries(path), path)
    if path.suffix in _TORCH_SUFFIXES:
        return Tensors(_torch_entries(path), path)
    raise UserError(
        f"{path}: unknown kind of file; expected one ending in .safetensors, {', '.join(_TORCH_SUFFIXES)}."
    )


def read_header(path: Path) -> dict[str, str]:
    """The free metadata of a safetensors file; empty for any other kind of file.

    Raises:
        UserError: an unreadable or truncated file.
    """
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # the parser meets arbitrary bytes here
        raise UserError(
            f"{path}: not a complete safetensors file ({error}); {_size(path)}. Download or copy it again."
        ) from error


def weight_files(path: Path, stems: tuple[str, ...] = _STEMS) -> list[Path]:
    """The files that `open_tensors(path, stems)` reads, in order; a missing shard is a `UserError`."""
    if not path.is_dir():
        return [path]
    for stem in stems:
        if (index := path / f"{stem}.safetensors.index.json").is_file():
            return _shards_of_index(index)
        if (single := path / f"{stem}.safetensors").is_file():
            return [single]
        if shards := sorted(path.glob(f"{stem}-*-of-*.safetensors")):
            return _numbered_shards(shards)
        for suffix in _TORCH_SUFFIXES:
            if (torch_file := path / f"{stem}{suffix}").is_file():
                return [torch_file]
    found = ", ".join(sorted(child.name for child in path.iterdir())[:10]) or "nothing"
    raise UserError(f"{path}: no weights; expected {stems[0]}.safetensors or its shards, found {found}.")


def _open_folder(path: Path, stems: tuple[str, ...]) -> Tensors:
    entries: dict[str, Entry] = {}
    for file in weight_files(path, stems):
        for name, entry in open_tensors(file).entries.items():
            if name in entries:
                raise UserError(
                    f"{file}: {name} is also in {entries[name].file.name}; expected each tensor once. Remove "
                    "stale shards of another version from the folder."
                )
            entries[name] = entry
    return Tensors(entries, path)


def _shards_of_index(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(shard) for shard in weight_map.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index}: no safetensors index ({error!r}); expected a weight_map.") from error
    if bad := [name for name in names if Path(name).name != name]:
        raise UserError(f"{index}: shards must be plain file names of the same folder, found {bad[0]!r}.")
    return _existing([index.parent / name for name in names], index)


def _numbered_shards(shards: list[Path]) -> list[Path]:
    """All shards of a set whose index file is absent: names say how many there must be."""
    match = re.fullmatch(r"(.+)-(\d+)-of-(\d+)\.safetensors", shards[0].name)
    if match is None:
        raise UserError(f"{shards[0]}: expected a shard named like model-00001-of-00007.safetensors.")
    stem, digits, count = match[1], len(match[2]), match[3]
    names = [f"{stem}-{i:0{digits}d}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
    return _existing([shards[0].parent / name for name in names], shards[0].parent)


def _existing(files: list[Path], where: Path) -> list[Path]:
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f"{where}: {len(missing)} of {len(files)} shards are missing: {_some(missing)}. Download them "
            "again; all shards must lie in this folder."
        )
    return files


def _safetensors_entries(path: Path) -> dict[str, Entry]:
    try:
        handle = safe_open(path, framework="pt", device="cpu")
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
    except Exception as error:  # the parser meets arbitrary bytes here
        raise UserError(
            f"{path}: not a complete safetensors file ({error}); {_size(path)}. Download or copy it again."
        ) from error
    entries = {}
    for name, part in slices.items():
        dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
        if dtype is None:
            raise UserError(
                f"{path}: {name} has dtype {part.get_dtype()}; expected one of "
                f"{', '.join(SAFETENSORS_DTYPES)}."
            )
        read = _reader(handle, name)
        entries[name] = Entry(name, path, tuple(part.get_shape()), dtype, read, mapped=True)
    return entries


def _reader(handle: Any, name: str) -> Callable[[], Tensor]:
    return lambda: handle.get_tensor(name)


def _torch_entries(path: Path) -> dict[str, Entry]:
    mapped = zipfile.is_zipfile(path)  # files older than torch 1.6 cannot be mapped and are read whole
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused: it holds more than tensors, or is damaged. Loading such a file could run "
            f"code. Expected a plain state dict; {_size(path)}. Get the file from its original source. "
            f"(torch: {str(error).strip().splitlines()[0] if str(error).strip() else 'no detail'})"
        ) from error
    except Exception as error:  # the parser meets arbitrary bytes here
        raise UserError(
            f"{path}: not a complete torch file ({type(error).__name__}); {_size(path)}. Download or copy it "
            "again."
        ) from error
    state = _unwrapped(content)
    if not isinstance(state, Mapping):
        raise UserError(f"{path}: holds a {type(state).__name__}; expected a state dict (names to tensors).")
    skipped = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if skipped:
        logger.warning("%s: %d entries are no tensors, not used: %s", path, len(skipped), _some(skipped))
    return {
        str(name): Entry(str(name), path, tuple(value.shape), value.dtype, lambda value=value: value, mapped)
        for name, value in state.items() if isinstance(value, Tensor)
    }


def _unwrapped(content: Any) -> Any:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    return content


def _size(path: Path) -> str:
    return f"it has {path.stat().st_size:,} bytes" if path.is_file() else "it is not a file"


def check_keys(
    expected: Mapping[str, Shape], found: Mapping[str, Shape], where: Path | str,
    spell: Callable[[str], str] = lambda name: name,
) -> None:
    """Raise one `UserError` unless `found` has exactly the names and shapes of `expected`.

    `spell` turns a name into the one that the user's file has.
    """
    missing = [spell(name) for name in expected if name not in found]
    unexpected = [spell(name) for name in found if name not in expected]
    misshapen = [
        f"{spell(name)} {tuple(found[name])} instead of {tuple(shape)}" for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}" for what, names in
        (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", misshapen)) if names
    ]
    if problems:
        raise UserError(
            f"{where}: the weights do not fit the model. Expected {len(expected)} tensors, found "
            f"{len(found)}; {'; '.join(problems)}. {_likely_cause(missing, unexpected)}"
        )


_SIGNATURES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("lora_",), "This is a LoRA, not a base model."),
    (("language_model.", "multi_modal_projector."), "This is LLaVA whole: text encoder and vision tower."),
    (("multi_modal_projector.",), "This is LLaVA's vision encoder with its projector, without the language model."),
    (("layers.0.mlp.gate_proj.",), "This is LLaVA's language model, a text encoder without the vision tower."),
    (("encoder.layers.0.", "embeddings.token_embedding."), "This is CLIP's text encoder."),
    (("encoder.layers.0.", "embeddings.class_embedding"), "This is a CLIP vision encoder in transformers' names."),
    (("SelfAttention.", "DenseReluDense."), "This is a T5 text encoder in transformers' names."),
    (("double_blocks.0.img_attn.qkv.",), "This is a HunyuanVideo transformer in ComfyUI's names, or Flux's."),
    (("double_blocks.",), "This is a HunyuanVideo transformer."),
    (("single_transformer_blocks.",), "This is a HunyuanVideo transformer in diffusers' names, or Flux's."),
    (("visual.",), "This is Wan's CLIP file."),
    (("token_embedding.",), "This is Wan's UMT5 text encoder."),
    (("encoder.downsamples.",), "This is Wan's VAE."),
    (("encoder.down_blocks.0.resnets.0.conv1.conv.",), "This is HunyuanVideo's VAE."),
    (("encoder.down.0.block.0.conv1.conv.",), "This is HunyuanVideo's VAE in ComfyUI's names."),
    (("cross_attn.k_img.",), "This is a Wan I2V transformer in the original names."),
    (("attn2.add_k_proj.",), "This is a Wan I2V transformer in diffusers' names."),
    (("cross_attn.",), "This is a Wan transformer without image conditioning."),
)
"""What a file holds if each of these occurs in some name; the first that fits counts."""


def _likely_cause(missing: list[str], unexpected: list[str]) -> str:
    if missing and not unexpected:
        return "Likely an incomplete download or a missing shard: get the file again."
    if not missing and not unexpected:
        return "Likely a variant of another size: use the config.json that came with these weights."
    return guess_content(unexpected)


def guess_content(names: Iterable[str]) -> str:
    """One sentence on what a file with these tensors probably is, for error messages."""
    names = list(names)
    for markers, cause in _SIGNATURES:
        if all(any(marker in name for name in names) for marker in markers):
            return f"{cause} Check which file the path names."
    return "Likely another model or an unknown layout: check which file the path names."


def _some(names: list[str]) -> str:
    more = f", ... ({len(names) - _LISTED} more)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def stored_dtype(tensors: Tensors) -> str:
    """The dtype that most of the weights have in the file, e.g. `bfloat16`, `scaled float8_e4m3fn`."""
    sizes: dict[str, int] = {}
    scales = any(name.endswith(("scale_weight", "weight_scale")) for name in tensors)
    for entry in tensors.entries.values():
        raw = entry.scaled[0].dtype if entry.scaled else entry.dtype
        if not raw.is_floating_point:
            continue
        scaled = entry.scaled is not None or (scales and raw.itemsize == 1)
        name = ("scaled " if scaled else "") + str(raw).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + math.prod(entry.shape)
    return max(sizes, key=sizes.__getitem__, default="nothing")


DtypeOf = Callable[[str, Tensor], torch.dtype]


def load_into(
    module: nn.Module, tensors: Tensors, dtype_of: DtypeOf | None = None, device: torch.device | str = "cpu",
    mapped: bool = True,
) -> None:
    """Fill a module built on the meta device, tensor by tensor, in the order of the files.

    Parameters become frozen (`requires_grad` False). A tensor that stays on the CPU in its own dtype stays
    mapped: it costs no copy, and must not be changed in place. Any other is converted in small pieces whose
    file pages are given back, so that the peak is what stays resident plus one piece.

    Args:
        tensors: exactly the module's parameters and persistent buffers, by name.
        dtype_of: final dtype from the name and a meta tensor of the file's shape and dtype; default: as in
            the file.
        device: where the weights shall live.
        mapped: whether tensors may stay mapped; else all are copies.

    Raises:
        UserError: names or shapes differ from the module's.
    """
    tensors.check(slots(module))
    _check_floating(module, tensors)
    total = sum(entry.nbytes for entry in tensors.entries.values())
    with brief(total, f"loading {tensors.where.name}", unit="B", unit_scale=True) as bar:
        for name, entry in tensors.entries.items():
            example = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            dtype = dtype_of(name, example) if dtype_of else entry.dtype
            place(module, name, materialise(entry, dtype, torch.device(device), mapped))
            bar.update(entry.nbytes)


def _check_floating(module: nn.Module, tensors: Tensors) -> None:
    """Refuse integers where the module has numbers: they are some quantisation, and garbage without its scales."""
    for name, slot in (*module.named_parameters(), *module.named_buffers()):
        entry = tensors.entries.get(name)
        if entry and slot.is_floating_point() and not entry.dtype.is_floating_point:
            raise UserError(
                f"{entry.file}: {entry.source} has dtype {str(entry.dtype).removeprefix('torch.')}; expected floating "
                "point. This is a quantised file that cannot be read here: use bf16, fp16 or fp8 (plain or scaled)."
            )


def slots(module: nn.Module) -> dict[str, Shape]:
    """Names and shapes of a module's parameters and persistent buffers; tied ones once."""
    persistent = set(module.state_dict())
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tuple(tensor.shape) for name, tensor in named if name in persistent}


def materialise(entry: Entry, dtype: torch.dtype, device: torch.device, mapped: bool = True) -> Tensor:
    """The tensor in `dtype` on `device`; where nothing has to change as it is, unless it may not stay `mapped`."""
    if entry.scaled is not None:
        return _dequantised(*entry.scaled, dtype, device)
    source = entry.read()
    if source.dtype == dtype and device.type == "cpu" and (mapped or not entry.mapped):
        return source
    target = torch.empty(entry.shape, dtype=dtype, device=device)
    pieces = source.contiguous().view(-1).split(_CHUNK_ELEMENTS)
    for piece, place in zip(pieces, target.view(-1).split(_CHUNK_ELEMENTS), strict=True):
        place.copy_(piece)
        if entry.mapped and source.is_contiguous():
            release_pages(piece)
    return target


def _dequantised(weight: Entry, scale: Entry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An 8-bit weight times its scale (one number, or one per row), a few rows at a time."""
    source, factor = weight.read(), scale.read().to(device).float()
    if source.ndim == 0 or source.numel() == 0:
        return (source.to(device).float() * factor.reshape(source.shape)).to(dtype)
    target = torch.empty(weight.shape, dtype=dtype, device=device)
    factor = factor.reshape(-1, *[1] * (source.ndim - 1))
    for rows, values in row_pieces(weight, source, device):
        target[rows] = values.mul_(factor if len(factor) == 1 else factor[rows])
    return target


def row_pieces(entry: Entry, source: Tensor, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
    """A tensor's rows as fp32, a few at a time, in one buffer that is used again; read pages are given back."""
    columns = max(1, source[0].numel())
    step = max(1, _CHUNK_ELEMENTS // 4 // columns)
    size = step * columns
    room = max(size, _OWN_MAPPING) if device.type == "cpu" else size
    buffer = torch.empty(room, device=device)[:size].view(step, *source.shape[1:])
    for first in range(0, len(source), step):
        piece = source[first : first + step]
        yield slice(first, first + step), buffer[: len(piece)].copy_(piece)
        if entry.mapped and source.is_contiguous():
            release_pages(piece)


def release_pages(mapped: Tensor) -> None:
    """Give the file pages under a mapped tensor back to the system; using it again reads them again."""
    if not sys.platform.startswith("linux"):
        return
    page = mmap.PAGESIZE
    start = -(-mapped.data_ptr() // page) * page
    end = (mapped.data_ptr() + mapped.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def trim_heap() -> None:
    """Give freed memory back to the system, holes between what is in use included, where the C library can (glibc)."""
    if sys.platform.startswith("linux") and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(ctypes.c_size_t(0))


def place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a frozen tensor where a module has a parameter or buffer of that dotted name."""
    path, _, leaf = name.rpartition(".")
    parent = module.get_submodule(path)
    is_parameter = leaf in parent._parameters
    setattr(parent, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from a file; damaged content is a `UserError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}). Download the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value
