"""Check the machine: `python -m loraedit_ext.doctor`; each finding has a cure."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from common.errors import first_line

Status = Literal["ok", "note", "bad"]
GB = 1e9
PYTHON = (3, 11)
DEEPSPEED = ("0.19.4", "0.20")
SMALL_CARD = 24 * GB
PINNED_PROBE = 4 * GB
CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limits."""
_PROBE_PIECE = 256 << 20
ATTENTION = {"flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3", "sageattention": "sageattention",
             "xformers": "xformers"}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it (empty if nothing)."""

    status: Status
    what: str
    found: str
    cure: str = ""

    def __str__(self) -> str:
        cure = f"\n{'':18}-> {self.cure}" if self.cure else ""
        return f"{self.status:4}  {self.what:10}  {self.found}{cure}"


def python() -> Iterator[Finding]:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info >= PYTHON:
        yield Finding("ok", "python", found)
    else:
        yield Finding("bad", "python", found, "Use Python 3.11 or newer: make setup PYTHON=/path/to/python3.11")


def torch_and_cuda() -> Iterator[Finding]:
    import torch

    yield Finding("ok", "torch", torch.__version__)
    if not torch.cuda.is_available():
        built = torch.version.cuda
        cure = "Install the driver and reboot; check with nvidia-smi." if built else (
            "This build of torch has no CUDA. On a machine with an NVIDIA card: pip install torch from the CUDA index "
            "that pytorch.org names, then run again."
        )
        yield Finding("note", "cuda", f"no GPU can be used (torch built for CUDA {built})", cure)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found = f"{index}: {name}, sm{capability[0]}{capability[1]}, {free / GB:.1f} of {total / GB:.1f} GB free"
        busy = "Other programs hold memory: see nvidia-smi." if free < 0.9 * total else ""
        old = "No bfloat16 on this card: set model.dtype = 'float32'." if capability < (8, 0) else ""
        small = "Small for a 14B model: see docs/memory.md (float8, blocks_to_swap, clip_frames)." if total < SMALL_CARD else ""
        cure = " ".join(filter(None, (old, busy, small)))
        yield Finding("note" if cure else "ok", "gpu", found, cure)


def deepspeed() -> Iterator[Finding]:
    wanted = f">={DEEPSPEED[0]},<{DEEPSPEED[1]}"
    cure = f'pip install "deepspeed{wanted}" (older versions get gradients wrong with accumulation)'
    found = _version("deepspeed")
    if found is None:
        yield Finding("bad", "deepspeed", "not installed", cure)
    elif _numbers(DEEPSPEED[0]) <= _numbers(found) < _numbers(DEEPSPEED[1]):
        yield Finding("ok", "deepspeed", found)
    else:
        yield Finding("bad", "deepspeed", f"{found}, expected {wanted}", cure)


def attention() -> Iterator[Finding]:
    import torch

    present = [package for module, package in ATTENTION.items() if importlib.util.find_spec(module)]
    kernels = [
        name for name, enabled in (
            ("flash", torch.backends.cuda.flash_sdp_enabled()), ("cudnn", torch.backends.cuda.cudnn_sdp_enabled()),
            ("memory-efficient", torch.backends.cuda.mem_efficient_sdp_enabled()), ("math", True),
        ) if enabled and (torch.cuda.is_available() or name == "math")
    ]  # fmt: skip
    found = f"torch SDPA ({', '.join(kernels)}) is used; also installed: {', '.join(present) or 'none'}"
    yield Finding("ok", "attention", found)


def memory() -> Iterator[Finding]:
    available, total = ram()
    if available is None:
        yield Finding("note", "ram", "unknown on this system")
        return
    found = f"{available / GB:.1f} of {total / GB:.1f} GB available"
    if available < 16 * GB:
        yield Finding("note", "ram", found, "Little for a 14B model: with transformer_dtype = 'float8' the weights take "
                      "16 GB, on the GPU or, with blocks_to_swap, here; close other programs, or train a 1.3B model.")
    else:
        yield Finding("ok", "ram", found)


def disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free
    cure = "Runs and caches may fill it: set output_dir and cache_dir on a larger disk." if free < 20 * GB else ""
    yield Finding("note" if cure else "ok", "disk", f"{free / GB:.1f} GB free in {Path.cwd()}", cure)


def pinned_memory() -> Iterator[Finding]:
    """How much page-locked memory the system gives, up to 4 GB or a quarter of the RAM."""
    import torch

    if not torch.cuda.is_available():
        yield Finding("note", "pinned", "not probed: pinned memory serves copies to a GPU, and there is none")
        return
    available = ram()[0] or PINNED_PROBE
    goal = int(min(PINNED_PROBE, available / 4))
    pieces = []
    try:
        while len(pieces) * _PROBE_PIECE < goal:
            pieces.append(torch.empty(_PROBE_PIECE, dtype=torch.uint8, pin_memory=True))
    except RuntimeError as error:
        got = len(pieces) * _PROBE_PIECE / GB
        yield Finding("note", "pinned", f"the system gives {got:.1f} of {goal / GB:.1f} GB ({first_line(error)})",
                      "blocks_to_swap and offload copy more slowly without it. Raise `ulimit -l`; under WSL2 raise memory= in "
                      ".wslconfig; containers need --ulimit memlock=-1.")
        return
    yield Finding("ok", "pinned", f"at least {len(pieces) * _PROBE_PIECE / GB:.1f} GB can be page-locked")


def video() -> Iterator[Finding]:
    found = _version("av")
    if found is None:
        yield Finding("bad", "video", "PyAV is not installed", "pip install av (it brings its own ffmpeg libraries)")
        return
    import av

    missing = [name for name in ("libx264", "h264") if name not in av.codecs_available]
    if missing:
        yield Finding("bad", "video", f"PyAV {found} without {', '.join(missing)}",
                      "Install PyAV's wheel instead of a build against the system's ffmpeg: pip install --force-reinstall av")
    else:
        yield Finding("ok", "video", f"PyAV {found} with H.264; no ffmpeg program is needed")


def libraries() -> Iterator[Finding]:
    for name in ("diffusers", "transformers", "peft", "safetensors", "sentencepiece", "ftfy"):
        found = _version(name)
        cure = "" if found else "pip install -r requirements.txt"
        yield Finding("ok" if found else "bad", name, found or "not installed", cure)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    python, torch_and_cuda, deepspeed, libraries, attention, memory, disk, pinned_memory, video,
)


def examine() -> list[Finding]:
    """All findings; a check that cannot run is a finding itself."""
    findings: list[Finding] = []
    for check in CHECKS:
        try:
            findings += check()
        except (ImportError, OSError, RuntimeError) as error:
            detail = f"cannot be checked: {first_line(error)}"
            findings.append(Finding("bad", check.__name__, detail, "pip install -r requirements.txt"))
    return findings


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())


def ram() -> tuple[int | None, int]:
    """Available and total bytes of RAM; a container's limit counts, and files that the system only keeps at hand do not."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None, 0
    available, total = (int(rows[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    limit, used, stat = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and (text := limit.read_text().strip()).isdigit() and used.is_file():
        cached = dict(line.split() for line in stat.read_text().splitlines())["inactive_file"]
        total = min(total, int(text))
        available = min(available, int(text) - int(used.read_text()) + int(cached))
    return available, total


def main(arguments: list[str] | None = None) -> int:
    """Print the findings; status 1 if one is bad."""
    argparse.ArgumentParser("doctor", description=__doc__.splitlines()[0]).parse_args(arguments)
    findings = examine()
    print("\n".join(map(str, findings)))
    return int(any(finding.status == "bad" for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
