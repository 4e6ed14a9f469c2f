"""The metrics by name: title, unit, direction and a definition in one line; what tables and reports show."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    key: str
    group: str
    title: str
    better: Literal["higher", "lower", "near"]
    """`near`: best where it equals the number beside it."""
    definition: str
    unit: str = ""
    digits: int = 3
    beside: str = ""
    """What the number beside it is, e.g. the same metric of the source."""

    @property
    def arrow(self) -> str:
        return {"higher": "↑", "lower": "↓", "near": "="}[self.better]


BACKGROUND, EDIT, BORDER = "Background", "Edited region against ground truth", "Border of the region"
TIME, MOTION, LIKENESS = "Consistency over time", "Motion", "Likeness and quality (the paper's three)"

METRICS: tuple[Metric, ...] = (
    Metric("preserved_psnr_generated", BACKGROUND, "PSNR before compositing", "higher",
           "Preserved pixels of frames 1 on, as the model made them, against the source.", "dB", 2),
    Metric("preserved_ssim_generated", BACKGROUND, "SSIM before compositing", "higher",
           "Gaussian SSIM (Wang 2004) of the same pixels; windows see nothing of the edit.", digits=4),
    Metric("preserved_max_error_generated", BACKGROUND, "Largest error before compositing", "lower",
           "Largest difference of a colour channel.", "grey levels", 0),
    Metric("preserved_psnr", BACKGROUND, "PSNR of the result", "higher",
           "The same on the result as it was written: after compositing and video coding.", "dB", 2),
    Metric("preserved_ssim", BACKGROUND, "SSIM of the result", "higher",
           "The same on the result as it was written.", digits=4),
    Metric("preserved_max_error", BACKGROUND, "Largest error of the result", "lower",
           "The same on the result as it was written.", "grey levels", 0),
    Metric("edit_psnr", EDIT, "PSNR", "higher", "Edited pixels of frames 1 on against the ground truth.", "dB", 2),
    Metric("edit_ssim", EDIT, "SSIM", "higher", "Gaussian SSIM of the same pixels.", digits=4),
    Metric("leak_generated", BORDER, "Leak before compositing", "lower",
           "Mean difference from the source in a ring of 8 preserved pixels around the region.", "grey levels", 2),
    Metric("leak", BORDER, "Leak of the result", "lower", "The same on the result as it was written.",
           "grey levels", 2),
    Metric("seam_jump", BORDER, "Step at the border", "near",
           "Mean step from a preserved pixel to its edited neighbour; above the source's, a seam shows.",
           "grey levels", 2, "source"),
    Metric("warping_inside", TIME, "Warping error, edited region", "lower",
           "Mean squared difference of each frame from the one before, moved along the source's flow; occlusions "
           "left out (Lai 2018). Pixels 0 to 1.", "×10⁻³", 3, "source"),
    Metric("warping_outside", TIME, "Warping error, background", "lower", "The same outside the edited region.",
           "×10⁻³", 3, "source"),
    Metric("flicker_inside", TIME, "Stillness, edited region", "near",
           "1 - mean difference of neighbouring frames / 255 (VBench); a frozen video scores 1.", "", 4, "source"),
    Metric("motion_inside", MOTION, "Motion error, edited region", "lower",
           "Mean distance between the optical flow of result and source.", "px/frame", 3, "frozen picture"),
    Metric("motion_outside", MOTION, "Motion error, background", "lower", "The same outside the edited region.",
           "px/frame", 3, "frozen picture"),
    Metric("clip_score", LIKENESS, "CLIP score", "higher",
           "Mean cosine between CLIP embeddings of the edited frames and the edited first frame (paper 4.2).",
           "", 4),
    Metric("clip_score_later", LIKENESS, "CLIP score, frames 1 on", "higher",
           "The same without the given first frame.", "", 4),
    Metric("input_similarity", LIKENESS, "Input similarity", "near",
           "Mean cosine between CLIP embeddings of edited and source frames of the same time (paper 4.2); beside "
           "it edited against source first frame, what this edit can reach.", "", 4, "first frames"),
    Metric("deqa_score", LIKENESS, "DeQA score", "higher",
           "Mean image quality of the edited frames, 1 to 5, by the external DeQA-Score model (paper 4.2).", "", 4),
)  # fmt: skip
BY_KEY = {metric.key: metric for metric in METRICS}


@dataclass(frozen=True)
class Value:
    """A metric's number, or why there is none."""

    metric: Metric
    value: float | None
    beside: float | None = None
    reason: str = ""
    """Where `value` is None: why it was not computed."""

    @property
    def text(self) -> str:
        return f"not computed: {self.reason}" if self.value is None else self.format(self.value)

    @property
    def beside_text(self) -> str:
        return "" if self.beside is None else f"{self.metric.beside} {self.format(self.beside)}"

    def format(self, number: float) -> str:
        if math.isinf(number):
            return "∞ (identical)"
        return f"{number:.{self.metric.digits}f} {self.metric.unit}".strip()

    def as_json(self) -> dict[str, Any]:
        """Infinite numbers become the string "inf", which JSON has no number for."""
        metric = self.metric
        return {
            "value": json_number(self.value), "unit": metric.unit, "better": metric.better,
            "definition": metric.definition,
            **({"beside": json_number(self.beside), "beside_is": metric.beside} if metric.beside else {}),
            **({"not_computed": self.reason} if self.value is None else {}),
        }  # fmt: skip


def json_number(number: float | None) -> float | str | None:
    """A number that JSON can hold: nan is null, infinity the string "inf"."""
    if number is None or math.isnan(number):
        return None
    return "inf" if math.isinf(number) else number


def computed(key: str, value: float, beside: float | None = None) -> Value:
    """A computed metric; a nan means that the region has no pixels for it."""
    if math.isnan(value):
        return missing(key, "the region has no pixels for it")
    return Value(BY_KEY[key], value, None if beside is None or math.isnan(beside) else beside)


def missing(key: str, reason: str) -> Value:
    """A metric without a number."""
    return Value(BY_KEY[key], None, None, reason)
