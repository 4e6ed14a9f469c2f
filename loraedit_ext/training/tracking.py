"""Tracking: metrics.jsonl and tensorboard always, wandb when enabled. Only the main process tracks.

Metric names are diffusion-pipe's: `train/loss`, `train/grad_norm`, `<regime>/loss_quantile_0.10`, ...
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import UserError
from common.files import write_text_atomic
from loraedit_ext.config import MonitoringSettings

_log = logging.getLogger(__name__)

JSONL = "metrics.jsonl"
WANDB_ID = "wandb_run_id"
STEP = "train/step"
STRIP = 8
"""Frames of a video that tensorboard shows."""


@dataclass(frozen=True)
class Clip:
    """A short video, in memory and as it was written."""

    path: Path
    """mp4, H.264 yuv420p."""
    frames: np.ndarray
    """uint8 (F, H, W, 3)."""


class Tracker(Protocol):
    """Somewhere that numbers go."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def video(self, step: int, name: str, clip: Clip) -> None: ...

    def lora(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """One JSON object a line: step, then the values."""

    def __init__(self, run: Path, resumed_at: int) -> None:
        self.path = run / JSONL
        if self.path.is_file():
            self._forget_after(resumed_at)

    def _forget_after(self, step: int) -> None:
        """A resumed run repeats the steps behind its checkpoint; their first account is dropped."""
        kept = [row for row in history(self.path.parent) if row["step"] <= step]
        write_text_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, step: int, values: dict[str, float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def video(self, step: int, name: str, clip: Clip) -> None:
        """Numbers only; the video lies in the run folder under its step."""

    def lora(self, step: int, path: Path) -> None:
        """Numbers only."""

    def close(self) -> None:
        """Every line is already on its way to the disk."""


class TensorboardTracker:
    """Scalars in the run folder, as diffusion-pipe has them."""

    def __init__(self, run: Path, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run), purge_step=resumed_at + 1 if resumed_at else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, clip: Clip) -> None:
        """A strip of frames: `add_video` without moviepy prints a line and writes nothing."""
        shown = np.unique(np.linspace(0, len(clip.frames) - 1, STRIP).round().astype(int))
        self.writer.add_image(name, np.concatenate(list(clip.frames[shown]), axis=1), step, dataformats="HWC")
        self.writer.flush()

    def lora(self, step: int, path: Path) -> None:
        """Tensorboard has no place for files."""

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """wandb under one run id kept in the run folder, so that a resumed run continues it, offline too.

    The step is a metric of its own: wandb's does not survive an offline resume.
    """

    def __init__(self, run: Path, settings: MonitoringSettings, config: dict[str, Any]) -> None:
        self.settings = settings
        id_file = run / WANDB_ID
        if not id_file.is_file():
            # A sweep's agent names the run that it watches.
            write_text_atomic(id_file, (os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]) + "\n")
        self.run = _start_wandb(run, settings, config)
        self.run.define_metric(STEP)
        self.run.define_metric("*", step_metric=STEP)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log({STEP: step, **values})

    def video(self, step: int, name: str, clip: Clip) -> None:
        import wandb

        self.run.log({STEP: step, name: wandb.Video(str(clip.path), format="mp4")})

    def lora(self, step: int, path: Path) -> None:
        """The final LoRA as an artifact, if [monitoring] asks for it."""
        import wandb

        if self.settings.wandb_log_model:
            artifact = wandb.Artifact(f"lora-{self.run.id}", type="model", metadata={"step": step})
            artifact.add_file(str(path))
            self.run.log_artifact(artifact, aliases=["final", f"step{step}"])

    def close(self) -> None:
        self.run.finish()


def _start_wandb(run: Path, settings: MonitoringSettings, config: dict[str, Any] | None) -> Any:
    """Start or continue the wandb run whose id the run folder keeps."""
    import wandb

    try:
        return wandb.init(
            project=settings.wandb_tracker_name, entity=settings.wandb_entity, group=settings.wandb_group,
            name=settings.wandb_run_name or run.name, tags=settings.wandb_tags or None, mode=settings.wandb_mode,
            id=(run / WANDB_ID).read_text().strip(), resume="allow", dir=str(run), config=config,
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"[monitoring]: wandb would not start: {error} Run `wandb login`, or set wandb_mode = \"offline\"."
        ) from error


def summarise(run: Path | None, settings: MonitoringSettings, values: dict[str, float]) -> str | None:
    """Put numbers that are known after the training into the summary of the run's wandb run.

    Returns:
        The id of the wandb run, or None where the training had none, or wandb is not enabled now.
    """
    if run is None or not (run / WANDB_ID).is_file() or not wandb_enabled(settings):
        return None
    session = _start_wandb(run, settings, None)
    for name, value in values.items():
        session.summary[name] = value
    session.finish()
    return session.id


def wandb_enabled(settings: MonitoringSettings) -> bool:
    return settings.enable_wandb and settings.wandb_mode != "disabled"


def history(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.jsonl, oldest first; none where nothing was logged.

    Raises:
        UserError: a line is damaged. The last one is left out with a warning instead: a process that is killed cuts it.
    """
    path = run / JSONL
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}, line {number}: not JSON ({error}). Remove the line, or the whole file.") from error
            _log.warning("%s: the last line is cut off and left out: %.60s", path, line)
    return rows


class Trackers:
    """All of a run's trackers as one; none on processes that are not the main one."""

    def __init__(self, trackers: list[Tracker]) -> None:
        self.trackers = trackers

    def log(self, step: int, values: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(step, values)

    def video(self, step: int, name: str, clip: Clip) -> None:
        for tracker in self.trackers:
            tracker.video(step, name, clip)

    def lora(self, step: int, path: Path) -> None:
        for tracker in self.trackers:
            tracker.lora(step, path)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def open_trackers(
    run: Path, settings: MonitoringSettings, config: dict[str, Any], resumed_at: int
) -> Trackers:
    """The trackers of the main process."""
    trackers: list[Tracker] = [JsonlTracker(run, resumed_at), TensorboardTracker(run, resumed_at)]
    if wandb_enabled(settings):
        trackers.append(WandbTracker(run, settings, config))
    return Trackers(trackers)
