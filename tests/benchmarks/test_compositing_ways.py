"""The comparison of ways to composite: what it finds in a results folder, and what its table says."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compositing
from dataset.video_writer import write_lossless
from loraedit_ext.evaluation.suite.run import RESULTS, video_path
from loraedit_ext.evaluation.suite.tasks import QUICK, TaskMedia


def test_only_the_first_seeds_videos_count_and_matching_undoes_a_drift(tmp_path: Path) -> None:
    task = QUICK[0]
    media = TaskMedia(task)
    drifted = np.clip(media.truth.astype(int) + 9, 0, 255).astype(np.uint8)
    records = [{"task": task.name, "method": "motion", "seed": seed, "key": f"{seed:024d}", "scores": {}} for seed in (1, 0)]
    (tmp_path / RESULTS).write_text("".join(json.dumps(record) + "\n" for record in records))
    for record, video in zip(records, (media.source, drifted), strict=True):
        write_lossless(video_path(tmp_path, str(record["key"])), video, Fraction(8))
    [(found, method, video)] = compositing.kept(tmp_path, [task])
    assert method == "motion"
    assert (video == drifted).all()
    (before, *_), (after, *_) = (compositing.scores(video, found, 0, reach) for reach in (0, 8))
    assert after < 0.5 * before


def test_changes_are_paired_by_task() -> None:
    found = {("motion", way): {"a": (4.0, 10.0, 12.0), "b": (6.0, 20.0, 14.0)} for way in compositing.WAYS}
    found["motion", (2, 8)] = {"a": (3.0, 11.0, 12.0), "b": (5.0, 21.0, 14.0)}
    lines = compositing.table(found).split("\n")
    assert "| motion | 2 | 8 | 4.00 | -1.00 ± 0.00 | 16.00 | +1.00 ± 0.00 | 13.00 | +0.00 ± 0.00 |" in lines
    assert "| motion | 2 | 0 | 5.00 | – | 15.00 | – | 13.00 | – |" in lines
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_a_folder_without_videos_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["compositing", str(tmp_path)])
    with pytest.raises(SystemExit, match="no video of these tasks"):
        compositing.main()
