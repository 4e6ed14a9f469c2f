"""Sampling steps that need no model: their velocity lies on the line through the last two that were computed.

What TeaCache (arXiv 2411.19108) and EasyCache (arXiv 2507.02860) are for. They repeat what a computed step has changed; but
along the path of one sample the velocity is smooth in t, and a line is the better guess by far (docs/experiments.md). Which
steps are computed is fixed beforehand: in bf16, differences of neighbouring velocities are mostly rounding, and nothing to
decide by.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from torch import Tensor

Predict = Callable[[Tensor, Tensor], Tensor]
"""(x, t scalar in [0, 1]) -> velocity."""
FIRST, SHARE = 3, 10
"""Computed in any case: the first three steps, or a tenth of all, for they lay out the picture;"""
LAST = 2
"""and the last two, in which t takes its largest steps."""
SUPPORT = 2
"""Velocities that a line needs."""


def computed(sigmas: Sequence[float], every: int, boundary: float | None = None) -> tuple[bool, ...]:
    """Which sampling steps ask the model.

    Args:
        sigmas: noise levels that steps begin at.
        every: in between, one in so many.
        boundary: noise level below which another model takes over (Wan2.2), of which the first velocities are not known.
    """
    steps = len(sigmas)
    begins = [0, *(n for n in range(1, steps) if boundary is not None and sigmas[n] < boundary <= sigmas[n - 1])]
    known = {n for n in range(steps) if n < max(FIRST, steps // SHARE) or n >= steps - LAST}
    for begin, end in zip(begins, [*begins[1:], steps], strict=True):
        run = range(begin, end)
        known.update(run[:SUPPORT])
        since = 0
        for n in run:
            since = 0 if n in known else since + 1
            if since == every:
                known.add(n)
                since = 0
    return tuple(n in known for n in range(steps))


class Skipping:
    """A velocity that is computed in some steps and follows from them in the others; called once a step, in their order.

    Args:
        predict: the model, with all passes of guidance.
        plan: which steps are computed (`computed`).
    """

    def __init__(self, predict: Predict, plan: Sequence[bool]) -> None:
        self.predict, self._plan = predict, iter(plan)
        self._known: deque[tuple[Tensor, Tensor]] = deque(maxlen=SUPPORT)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if not next(self._plan):
            (before, v), (last, w) = self._known
            return w + (w - v) * ((t - last) / (last - before)).item()
        velocity = self.predict(x, t)
        self._known.append((t, velocity))
        return velocity
