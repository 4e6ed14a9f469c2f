"""Checkpoints spoilt at random, for the fuzzing of every family's loaders."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8, torch.float64]


def spoilt(state, data, new_names, shapes):
    """The state with one to three tensors removed, renamed, of another shape or dtype, or with some added.

    Args:
        data: of hypothesis; it draws what happens.
        new_names, shapes: what tensors may be called and look like afterwards.
    """
    state = dict(state)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(state)))
        value = state.pop(name)
        action = data.draw(st.sampled_from(["remove", "rename", "shape", "dtype", "add"]))
        if action == "rename":
            state[data.draw(st.sampled_from(new_names))] = value
        elif action == "shape":
            state[name] = torch.zeros(data.draw(st.sampled_from(shapes)))
        elif action == "dtype":
            state[name] = value.to(data.draw(st.sampled_from(DTYPES)))
        elif action == "add":
            state |= {name: value, data.draw(st.sampled_from(new_names)): torch.zeros(data.draw(st.sampled_from(shapes)))}
    return {name: value.clone() for name, value in state.items()}
