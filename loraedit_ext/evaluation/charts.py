"""Line charts as inline SVG, without a library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 12, 38
TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line of a chart; points with nan or infinity are left out, and the line breaks there."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    faint: bool = False
    """Drawn thin and pale: raw values behind a summary."""
    dots: bool = False
    colour: int = 0
    """Index of the page's palette."""


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, marks: Sequence[tuple[float, str]] = (), frames: bool = False
) -> Markup:
    """A chart with axes, grid and legend.

    Args:
        series: at least one finite point among them.
        marks: (x, words): vertical lines, e.g. where a stage begins.
        frames: x is the frame index from 0: the page's cursor follows the videos, and a click seeks.

    Raises:
        ValueError: no finite point.
    """
    points = [(x, y) for line in series for x, y in zip(line.xs, line.ys, strict=True) if math.isfinite(y)]
    if not points:
        raise ValueError("a chart needs a finite point")
    first, last = 0 if frames else min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = ticks(min(y for _, y in points), max(y for _, y in points))
    plot = _Plot((first, max(last, first + 1)), (y_ticks[0], y_ticks[-1]))
    x_ticks = [x for x in ticks(first, last, whole=True) if first <= x <= last]
    parts = [*_axes(plot, x_ticks, y_ticks, x_label, y_label), *(_mark(plot, x, words) for x, words in marks)]
    for line in series:
        parts += _line(plot, line)
    attributes = ""
    if frames:
        parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        attributes = f' data-x0="{plot.x(0):.2f}" data-dx="{plot.x(1) - plot.x(0):.4f}"'
    legend = "".join(f'<span><i class="c{line.colour}{" faint" if line.faint else ""}"></i>{escape(line.name)}</span>'
                     for line in series)
    return Markup(
        f'<figure class="chart"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}"'
        f'{attributes}>{"".join(parts)}</svg><figcaption>{legend}</figcaption></figure>'
    )


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About five round numbers that span low to high; whole numbers only if asked for."""
    if low == high:
        low, high = (low, low + 1) if whole else (low - abs(low or 1) / 10, high + abs(high or 1) / 10)
    raw = (high - low) / TICKS
    power = 10 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    step = max(1, round(step)) if whole else step
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


@dataclass(frozen=True)
class _Plot:
    """From values to places in the drawing."""

    xs: tuple[float, float]
    ys: tuple[float, float]

    def x(self, value: float) -> float:
        return LEFT + (value - self.xs[0]) / (self.xs[1] - self.xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.ys[0]) / (self.ys[1] - self.ys[0]) * (HEIGHT - TOP - BOTTOM)


def _axes(plot: _Plot, x_ticks: list[float], y_ticks: list[float], x_label: str, y_label: str) -> list[str]:
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in y_ticks:
        y = plot.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="right" x="{LEFT - 6}" y="{y + 4:.1f}">{_number(value)}</text>')
    for value in x_ticks:
        parts.append(f'<text class="middle" x="{plot.x(value):.1f}" y="{bottom + 16}">{_number(value)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    parts.append(f'<text class="middle" transform="translate(13 {middle}) rotate(-90)">{escape(y_label)}</text>')
    return parts


def _mark(plot: _Plot, x: float, words: str) -> str:
    place = plot.x(x)
    return (f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{place + 4:.1f}" y="{TOP + 10}">{escape(words)}</text>')


def _line(plot: _Plot, line: Series) -> list[str]:
    runs: list[list[str]] = [[]]
    dots = []
    for x, y in zip(line.xs, line.ys, strict=True):
        if not math.isfinite(y):
            runs.append([])
            continue
        runs[-1].append(f"{plot.x(x):.1f},{plot.y(y):.1f}")
        if line.dots:
            dots.append(f'<circle class="c{line.colour}" cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3"/>')
    faint = " faint" if line.faint else ""
    return [f'<polyline class="c{line.colour}{faint}" points="{" ".join(run)}"/>' for run in runs if run] + dots


def _number(value: float) -> str:
    return f"{value:.6g}"
