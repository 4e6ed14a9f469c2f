"""The benchmark's methods: each learned one is run as a user would run it, from a run TOML beside the task's job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.files import write_text_atomic
from loraedit_ext import launch, lora, regimes
from loraedit_ext import run as runs
from loraedit_ext.config import RunConfig, StageSettings, load_config
from loraedit_ext.editing.editor import Editor
from loraedit_ext.evaluation.suite import baselines
from loraedit_ext.evaluation.suite.tasks import TaskMedia
from loraedit_ext.pipeline import alone
from loraedit_ext.regimes import EditCondition
from loraedit_ext.training.state import LATEST
from loraedit_ext.training.tracking import history

Training = Literal["naive", "motion", "appearance"]
CONFIG = "edit.toml"


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    key: str
    title: str
    training: Training | None = None
    """Regime of the LoRA; `appearance` continues the motion stage. None: no LoRA."""
    condition: EditCondition | None = None
    """What the model is told when it edits; None: no diffusion model takes part."""
    long: bool = False
    """As many steps as motion and appearance have together: a control."""
    guided: bool = False
    """Edited with source guidance; trained as the method before it."""

    @property
    def learned(self) -> bool:
        return self.condition is not None


METHODS = {method.key: method for method in (
    Method("source", "source, unchanged"),
    Method("static_paste", "edited first frame pasted"),
    Method("tracked_paste", "edited object pasted, box-tracked"),
    Method("vae", "VAE ceiling: the truth, coded"),
    Method("unconditioned", "no LoRA, nothing preserved (case 1)", None, "none"),
    Method("full", "no LoRA, all preserved (case 2)", None, "all"),
    Method("no_lora", "no LoRA, first frame (default)", None, "first_frame"),
    Method("masked", "no LoRA, masked (case 3)", None, "motion"),
    Method("naive", "naive LoRA", "naive", "first_frame"),
    Method("naive_long", "naive LoRA, all steps", "naive", "first_frame", long=True),
    Method("motion", "motion", "motion", "motion"),
    Method("motion_guided", "motion, source guidance", "motion", "motion", guided=True),
    Method("motion_long", "motion, all steps", "motion", "motion", long=True),
    Method("appearance", "motion + appearance", "appearance", "motion"),
    Method("appearance_guided", "motion + appearance, source guidance", "appearance", "motion", guided=True),
)}  # fmt: skip
"""In the order of table and work: `vae` warms up what the first edit would be charged for. Cases as in the paper's figure 2."""
LATER = dict.fromkeys(("clip_frames", "expert", "other_lora", "other_transformer_path", "boundary")) | {
    "compute_every": 1, "int8_matmul": False,
}  # fmt: skip
"""Keys of [model] and [edit] that came after the committed results, with the value that these were made with."""
DEFAULT_METHODS = tuple(key for key, method in METHODS.items() if not method.long)

PASTES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "source": baselines.unchanged, "static_paste": baselines.static_paste, "tracked_paste": baselines.tracked_paste,
}  # fmt: skip

TEMPLATE = """# One task of the benchmark; every method overrides `stage` and `edit.condition`.
output_dir = "runs"
dataset = "job.toml"
micro_batch_size_per_gpu = 1
activation_checkpointing = false   # the model is tiny; there is nothing to save

[model]
type = "wan"
ckpt_path = {checkpoint}
dtype = "float32"
stratified = true

[adapter]
rank = 16

[optimizer]
type = "adamw"
lr = 2e-3

[edit]
steps = 15
guidance = 1.0
negative_prompt = ""
shift = 3.0
sampler = "euler"
composite = false
"""


@dataclass(frozen=True)
class Budget:
    """Steps of the stages, and the strength of source guidance where a method has it."""

    steps: int
    """Of the naive and of the motion stage."""
    appearance_steps: int
    appearance_share: float
    """Of the steps of the appearance stage; the rest is motion."""
    source_guidance: float

    def stages(self, method: Method) -> list[dict[str, Any]]:
        """[[stage]] tables of a method."""
        total = self.steps + self.appearance_steps if method.long else self.steps
        if method.training == "naive":
            return [{"name": "naive", "steps": total, "mix": {"naive": 1}}]
        motion = {"name": "motion", "steps": total, "mix": {"motion": 1}}
        if method.training == "motion":
            return [motion]
        share = self.appearance_share
        mix = {"appearance": 1} if share == 1 else {"motion": 1 - share, "appearance": share}
        return [motion, {"name": "appearance", "steps": self.appearance_steps, "mix": mix}]


@dataclass(frozen=True)
class Result:
    """What a method made of a task."""

    video: np.ndarray
    """uint8 (F, H, W, 3), before compositing."""
    steps: int
    """Of LoRA training."""
    seconds: float
    """Of training steps and editing, without start-up; 0 for what needs no model."""


def write_config(folder: Path, checkpoint: Path) -> Path:
    """The run TOML of a task."""
    path = folder / CONFIG
    write_text_atomic(path, TEMPLATE.format(checkpoint=json.dumps(str(checkpoint))))
    return path


def config_of(
    path: Path, method: Method, seed: int, budget: Budget, overrides: Sequence[str] = ()
) -> RunConfig:
    """The configuration that runs a method.

    Args:
        path: the task's run TOML.
        seed: of training and of the edit's noise.
        overrides: `key=value` for every method, e.g. optimizer.lr=1e-3.

    Raises:
        UserError: an override does not fit.
    """
    folder = "mask" if method.training in ("motion", "appearance") and not method.long else method.key
    config = load_config(path, [
        *overrides, f"seed={seed}", f"edit.seed={seed}", f"edit.condition={method.condition or 'motion'}",
        f"output_dir=runs/{seed}/{folder}", *([f"edit.source_guidance={budget.source_guidance}"] if method.guided else []),
    ])  # fmt: skip
    if method.training is None:
        return config
    stages = [StageSettings.model_validate(stage) for stage in budget.stages(method)]
    return config.model_copy(update={"stage": stages})


def run(method: Method, media: TaskMedia, config: RunConfig) -> Result:
    """Run a method on a task whose folder holds config.dataset; a motion run that is there already is continued."""
    if paste := PASTES.get(method.key):
        return Result(paste(media.source, media.truth[0], media.preserve), 0, 0.0)
    world = alone()
    model = launch.build_model(config, world.device)
    if method.key == "vae":
        return Result(regimes.to_pixels(model.decode_video(model.encode_video(regimes.to_unit(media.truth)))), 0, 0.0)
    adapter, steps, seconds = None, 0, 0.0
    if method.training:
        path = train(config)
        adapter, steps = lora.read(path, model), sum(stage.steps for stage in config.stage)
        seconds = training_seconds(path.parent.parent)
    edit = Editor(config, model, adapter, world, launch.cache_of(config)).edit(launch.open_job(config, model))
    return Result(edit.generated, steps, round(seconds + edit.facts["seconds"], 2))


def train(config: RunConfig) -> Path:
    """Train, or continue the run of the earlier stage where there is one; returns the LoRA."""
    steps = sum(stage.steps for stage in config.stage)
    if there := list(config.output_dir.glob(f"*/step{steps}/{lora.EXPORT_NAME}")):
        return there[0]
    resumable = any(config.output_dir.glob(f"*/{LATEST}"))
    launch.train(config.model_copy(update={"resume_from_checkpoint": resumable}))
    return runs.newest_lora(config.output_dir)


def training_seconds(run_folder: Path) -> float:
    """Seconds of all steps of a run, its earlier stages included."""
    return sum(row.get("train/step_seconds", 0.0) for row in history(run_folder))


def forget_runs(folder: Path, seed: int) -> None:
    """Remove what training left in a task's folder: half a run would be taken for one to go on with."""
    shutil.rmtree(folder / "runs" / str(seed), ignore_errors=True)


def settings_of(method: Method, config: RunConfig) -> dict[str, Any]:
    """All that a result depends on besides task and checkpoint; JSON-able."""
    facts: dict[str, Any] = {"method": method.key, "training": method.training, "condition": method.condition}
    if not method.learned:
        return facts
    resolved = config.model_dump(mode="json")
    facts["model"] = {key: value for key, value in _as_before(resolved["model"]).items() if not key.endswith("_path")}
    resolved["edit"] = _as_before(resolved["edit"])
    for key in ("size", "color_match", "grain"):  # the suite judges what the model made, whatever becomes of it
        del resolved["edit"][key]
    wanted = ["edit", "seed", "mask_rule"]
    if method.training:
        wanted += ["adapter", "optimizer", "stage", "micro_batch_size_per_gpu", "gradient_accumulation_steps",
                   "gradient_clipping", "warmup_steps", "lr_scheduler", "save_dtype"]  # fmt: skip
    return facts | {key: resolved[key] for key in wanted}


def _as_before(settings: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that results in the repository are older than, where these have the value of then."""
    return {key: value for key, value in settings.items() if key not in LATER or value != LATER[key]}
