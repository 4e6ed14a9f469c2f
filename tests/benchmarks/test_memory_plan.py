"""docs/memory.md says what the plan predicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import memory_plan

DOCS = Path(memory_plan.__file__).parents[1] / "docs" / "memory.md"


@pytest.mark.parametrize("way", [True, "attention", "offload"])
def test_the_tables_are_in_the_docs(way):
    rows = list(memory_plan.rows(way))
    assert len(rows) == 10
    text = DOCS.read_text()
    assert "\n".join(rows) in text
