"""The house: imports go downwards, every file says its duty, nothing forbidden is written."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "common": set(),
    "models": {"common"},
    "dataset": {"common"},
    "loraedit_ext": {"common", "models", "dataset"},
    "pretraining": {"common", "models", "dataset", "loraedit_ext"},
    "benchmarks": {"common", "models", "dataset", "loraedit_ext", "pretraining"},
}
ROOMS = ("lora", "editing", "prepare", "training", "evaluation", "sweep")
"""In loraedit_ext; each may import those before it, and the files beside them."""
VERBS = sorted(path.name for path in ROOT.glob("*.py"))
FILES = sorted(
    path.relative_to(ROOT) for folder in ALLOWED for path in (ROOT / folder).rglob("*.py")
) + [Path(verb) for verb in VERBS]


def imported_rooms(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & (set(ALLOWED) | {Path(verb).stem for verb in VERBS})


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_go_downwards(path):
    room = path.parts[0]
    allowed = ALLOWED[room] | {room} if room in ALLOWED else {"loraedit_ext", "common"}
    assert imported_rooms(path) <= allowed


def test_the_test_for_imports_can_fail():
    assert imported_rooms(Path("loraedit_ext/wan.py")) == {"loraedit_ext", "models"}
    assert not imported_rooms(Path("loraedit_ext/wan.py")) <= ALLOWED["dataset"]


def upper_rooms(path: Path) -> set[str]:
    """Rooms of loraedit_ext that a file imports and that come after its own."""
    text = (ROOT / path).read_text()
    named = set(re.findall(r"^ *from loraedit_ext\.(\w+)", text, re.M))
    for names in re.findall(r"^ *from loraedit_ext import (.*)", text, re.M):
        named |= set(re.findall(r"\w+", names))
    return named & set(ROOMS[ROOMS.index(path.parts[1]) + 1 :])


IN_ROOMS = [path for path in FILES if path.parts[0] == "loraedit_ext" and path.parts[1] in ROOMS]


@pytest.mark.parametrize("path", IN_ROOMS, ids=str)
def test_imports_go_downwards_between_the_rooms_of_loraedit_ext_too(path):
    assert not upper_rooms(path)


def test_the_test_for_rooms_can_fail():
    assert {path.parts[1] for path in IN_ROOMS} == set(ROOMS)
    assert upper_rooms(Path("loraedit_ext/lora/../launch.py")) >= {"editing", "training"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse((ROOT / path).read_text()))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_the_readme_gives_every_file_a_line_of_duty(path):
    if path.name != "__init__.py":
        assert re.search(rf"\b{re.escape(path.name)}\b", (ROOT / "README.md").read_text()), path


FORBIDDEN = {
    r"torch\.load\((?![^)]*weights_only=True)": "torch.load without weights_only=True",
    r"trust_remote_code": "trust_remote_code",
    r"sys\.path\.": "sys.path edited",
    r"except( Exception)?:\s*\n\s*pass": "a swallowed exception",
    r"\bNotImplementedError\b": "a stub",
    r"(TODO|FIXME|XXX)\b": "unfinished work",
    r"snapshot_download|hf_hub_download|urlopen|requests\.get": "a download at run time",
}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_forbidden_is_written(path):
    text = (ROOT / path).read_text()
    found = [what for pattern, what in FORBIDDEN.items() if re.search(pattern, text)]
    assert not found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_functions_stay_short(path):
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > 80
    ]
    assert not long


def test_the_command_line_gains_no_flags():
    """Every knob is in the TOML (and so in sweeps and in the record of a run); a new flag needs a reason here."""
    flags = {}
    for verb in VERBS:
        text = subprocess.run([sys.executable, verb, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        flags[verb] = set(re.findall(r"--[a-z_]+", text.stdout))
    assert flags["train.py"] == {
        "--help", "--config", "--traceback", "--resume_from_checkpoint", "--cache_only", "--dry_run",
    }
    assert flags["evaluate.py"] == {
        "--help", "--config", "--traceback", "--edit", "--source", "--edited", "--mask", "--reference", "--generated",
        "--truth", "--out",
        "--suite", "--quick",  # which of three things to do; all knobs of the benchmark are suite.KEY=value
    }
    assert flags["prepare.py"] == {  # makes the job's TOML, so it cannot read one
        "--help", "--traceback", "--source", "--out", "--edited", "--box", "--painted", "--margin", "--start",
        "--every", "--frames", "--caption", "--edited_caption", "--frame", "--overwrite",
        "--sam", "--click", "--not",  # what follows the region, and where the object is
        "--captioner",  # what writes the captions that are not given
        "--ckpt", "--model",  # the lines of edit.toml that have no default
        "--page",  # draws all that in a browser
    }
    assert flags["inference.py"] == {
        "--help", "--config", "--traceback", "--lora", "--out",
        "--seeds",  # makes several results; the record of each has its own edit.seed
    }


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_quick_because_heavy_imports_come_late(verb):
    heavy = ("torch", "deepspeed", "diffusers", "transformers", "wandb")
    code = f"import sys, {verb.removesuffix('.py')}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_project_imports_without_torchvision():
    """A package that needs torchvision lets pip replace the torch build; nothing of ours may need it."""
    code = (
        "import sys; sys.modules['torchvision'] = None\n"
        "import loraedit_ext.launch, loraedit_ext.training.trainer, loraedit_ext.editing.editor, models.wan.encoders\n"
        "import loraedit_ext.evaluation.run, loraedit_ext.prepare.sam\n"
        "from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil\n"
        "from diffusers import AutoencoderKLWan\n"
        "from transformers import UMT5EncoderModel, CLIPVisionModelWithProjection\nprint('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("ok"), done.stderr
