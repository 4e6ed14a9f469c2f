"""Settings compared on the validation scenes: `python -m benchmarks.experiments --out runs/experiments`.

Every variant changes one thing against the benchmark's own settings and is compared with them task by task. Resumable:
results that the folder holds are not computed again. Writes OUT/experiments.md after each variant.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from common.files import write_text_atomic
from loraedit_ext.evaluation.suite.claims import Results
from loraedit_ext.evaluation.suite.run import run_suite
from loraedit_ext.evaluation.suite.statistics import Estimate, paired

TRAINED = ("motion", "appearance")
WITH_NAIVE = ("naive", *TRAINED)


@dataclass(frozen=True)
class Variant:
    """One row: what is asked, what is set for it, and which methods are run."""

    question: str
    setting: str
    overrides: tuple[str, ...] = ()
    methods: tuple[str, ...] = TRAINED


def _variants(question: str, *overrides: str, methods: tuple[str, ...] = TRAINED) -> tuple[Variant, ...]:
    """One variant for each `key=value`; several settings of one variant are joined by a blank."""
    return tuple(Variant(question, text, tuple(text.split(" ")), methods) for text in overrides)


DEFAULT = Variant("settings of the benchmark", "as they are", (), WITH_NAIVE)
VARIANTS = (
    DEFAULT,
    *_variants("learning rate", "optimizer.lr=5e-4", "optimizer.lr=1e-3", "optimizer.lr=4e-3", methods=WITH_NAIVE),
    *_variants("scale of the LoRA (alpha / rank)", "adapter.alpha=8 optimizer.lr=4e-3"),
    *_variants("share of appearance in its stage", "suite.appearance_share=0.5", "suite.appearance_share=1.0"),
    *_variants("mask rule", "mask_rule=nearest"),
    *_variants("timesteps in training", "model.stratified=false", "model.timestep_sample_method=uniform"),
    *_variants("rank", "adapter.rank=4", "adapter.rank=64"),
    *_variants("steps", "suite.steps=75 suite.appearance_steps=75", "suite.steps=300 suite.appearance_steps=300"),
    *_variants("noise draws a step", "micro_batch_size_per_gpu=4"),
    *_variants("what is adapted", 'adapter.exclude_modules=["ffn.0","ffn.2"]'),
    *_variants("sampling", "edit.steps=25"),
    *_variants("source guidance", "edit.source_guidance=2", "edit.source_guidance=3",
               "optimizer.lr=1e-3 edit.source_guidance=2"),
)  # fmt: skip

COLUMNS = (
    ("naive", "preserved_psnr", "naive: background"), ("motion", "preserved_psnr", "motion: background"),
    ("motion", "edit_psnr", "edit"), ("motion", "object_gain", "nearer to edit"),
    ("appearance", "preserved_psnr", "+ appearance: background"), ("appearance", "edit_psnr_unseen", "edit, no reference"),
    ("appearance", "object_gain", "nearer to edit"),
)  # fmt: skip
COMPARED = (("motion", "preserved_psnr"), ("motion", "edit_psnr"), ("appearance", "edit_psnr_unseen"))


def run_variant(variant: Variant, out: Path, fixed: Sequence[str]) -> Results:
    """Its results; the suite's own tables are not shown, they are those of one variant."""
    methods = ", ".join(f'"{name}"' for name in variant.methods)
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return run_suite([*fixed, f"suite.methods=[{methods}]", *variant.overrides], out=out)


def table(found: dict[Variant, Results]) -> str:
    """Markdown: means of every variant and its paired differences from the benchmark's settings, in dB."""
    heads = [*(title for *_, title in COLUMNS), *(f"change: {method} {_short(score)}" for method, score in COMPARED)]
    lines = ["| | setting | " + " | ".join(heads) + " |", "|---" * (2 + len(heads)) + "|"]
    for variant, results in found.items():
        means = [_mean(results.estimate(method, score)) for method, score, _ in COLUMNS]
        changes = [_change(results, found[DEFAULT], *compared) for compared in COMPARED]
        lines.append(f"| {variant.question} | `{variant.setting}` | " + " | ".join([*means, *changes]) + " |")
    return "\n".join(lines) + "\n"


def _short(score: str) -> str:
    return {"preserved_psnr": "background", "edit_psnr": "edit", "edit_psnr_unseen": "edit, no reference"}[score]


def _mean(value: Estimate | None) -> str:
    return "–" if value is None else f"{value.mean:.1f}"


def _change(results: Results, default: Results, method: str, score: str) -> str:
    if results is default:
        return "–"
    return paired(results.values(method, score), default.values(method, score)).signed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/experiments"), help="results folder; run again to go on")
    parser.add_argument("--only", action="append", default=[], help="a question to ask, or its beginning; default: all")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for all variants, e.g. suite.seeds=[0,1]")
    options = parser.parse_args()
    fixed = ["suite.tasks=validation", "suite.seeds=[0]", *options.overrides]
    wanted = [v for v in VARIANTS if v is DEFAULT or not options.only or v.question.startswith(tuple(options.only))]
    found: dict[Variant, Results] = {}
    for number, variant in enumerate(wanted, 1):
        print(f"{number} of {len(wanted)}: {variant.question}, {variant.setting}", flush=True)
        found[variant] = run_variant(variant, options.out, fixed)
        write_text_atomic(options.out / "experiments.md", table(found))
    print(table(found), f"wrote     {options.out / 'experiments.md'}", sep="\n")


if __name__ == "__main__":
    main()
