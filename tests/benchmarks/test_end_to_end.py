"""The demo's commands as the end-to-end table runs them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.end_to_end import ROWS, Row, as_row, measure
from common.errors import UserError


def test_a_row_trains_stops_goes_on_and_edits(tmp_path: Path) -> None:
    found = measure(Row("fp32", ("model.dtype=float32",), stopped=True), 2, tmp_path)
    runs = list((tmp_path / "runs").iterdir())
    assert [sorted(path.name for path in run.glob("step*")) for run in runs] == [["step2", "step3", "step4"]]
    assert 0 < found.step_seconds < found.train_seconds
    assert 0.05 < found.loss < 1
    assert 5 < found.psnr < 30
    assert as_row("fp32", found).count("|") == 8


def test_a_row_that_fails_names_its_output(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_0\.log: the command ended with 2, expected 0"):
        measure(Row("wrong", ("model.dtype=float33",)), 1, tmp_path)
    assert "float33" in (tmp_path / "train_0.log").read_text()


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
