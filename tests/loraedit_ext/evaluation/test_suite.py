"""The benchmark: fixed lists, exact truth, baselines with known scores, statistics, a resumable run."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import evaluate
from common.errors import UserError
from dataset.images import read_image
from dataset.video import read_video
from loraedit_ext.config import load_config
from loraedit_ext.evaluation import metrics
from loraedit_ext.evaluation.suite import baselines, page, report, tasks
from loraedit_ext.evaluation.suite import run as suite
from loraedit_ext.evaluation.suite.claims import Claim, Results, claims
from loraedit_ext.evaluation.suite.methods import (
    DEFAULT_METHODS,
    METHODS,
    Budget,
    settings_of,
    training_seconds,
    write_config,
)
from loraedit_ext.evaluation.suite.scores import SCORES, UNSEEN, scores
from loraedit_ext.evaluation.suite.settings import load_suite
from loraedit_ext.evaluation.suite.statistics import Estimate, estimate, paired, t_quantile
from loraedit_ext.evaluation.suite.tasks import BENCHMARK, GUARD, LISTS, QUICK, REPLICATION, VALIDATION, TaskMedia
from pretraining.clips import HELD_OUT
from tests.browser import document_of

TASK = BENCHMARK[3]
SHORT = ("suite.steps=1", "suite.appearance_steps=2", "suite.seeds=[0]", "suite.jobs=1", "edit.steps=1",
         f"suite.tasks={TASK.name}")  # fmt: skip


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / suite.RESULTS).read_text().splitlines()]


def test_a_new_setting_of_what_is_written_makes_no_committed_result_stale(tmp_path) -> None:
    config = load_config(write_config(tmp_path, tmp_path))
    for line in Path("benchmarks/scenes.jsonl").read_text().splitlines():
        there = json.loads(line)["settings"]
        if METHODS[there["method"]].learned:
            now = settings_of(METHODS[there["method"]], config)
            assert now["edit"].keys() == there["edit"].keys()
            assert now["model"].keys() == there["model"].keys()


def test_the_lists_have_the_promised_size_and_mix() -> None:
    assert len(BENCHMARK) == 24
    assert Counter(task.edit for task in BENCHMARK) == dict.fromkeys(("recolour", "retexture", "reshape"), 8)
    assert Counter(task.motion for task in BENCHMARK) == dict.fromkeys(
        ("translating", "rotating", "turning", "emerging"), 6
    )
    assert Counter(task.panning for task in BENCHMARK) == {True: 12, False: 12}
    assert Counter(task.several for task in BENCHMARK) == {True: 12, False: 12}
    assert len({(task.edit, task.motion, task.panning) for task in BENCHMARK}) == 24
    assert {task.motion for task in QUICK} == {task.motion for task in BENCHMARK}
    assert {task.edit for task in VALIDATION} == {task.edit for task in QUICK} == {task.edit for task in BENCHMARK}
    assert {task.motion for task in VALIDATION} == {task.motion for task in BENCHMARK}
    assert set(GUARD) < set(QUICK) < set(BENCHMARK)


def test_validation_and_pretraining_never_see_the_benchmark() -> None:
    seeds = [task.seed for task in (*BENCHMARK, *REPLICATION, *VALIDATION)]
    assert len(set(seeds)) == len(seeds)
    assert max(seeds) < HELD_OUT


def test_the_replication_is_the_other_half_of_the_design() -> None:
    both = Counter((task.edit, task.motion, task.several, task.panning) for task in LISTS["both"])
    edits, motions = ("recolour", "retexture", "reshape"), ("translating", "rotating", "turning", "emerging")
    assert both == dict.fromkeys(product(edits, motions, (False, True), (False, True)), 1)
    assert set(LISTS["both"]) == {*BENCHMARK, *REPLICATION}
    assert tasks.chosen("replication") == REPLICATION
    assert tasks.chosen(REPLICATION[3].name) == REPLICATION[3:4]


@pytest.mark.parametrize("task", REPLICATION, ids=lambda task: task.name)
def test_the_replications_seeds_are_the_first_that_meet_its_bounds(task: tasks.SuiteTask) -> None:
    """No object that is tiny or leaves the picture, no region that is most of it, and an edit that can be seen later on."""
    earlier = max((each.seed + 1 for each in REPLICATION if each.seed < task.seed), default=2000)
    fits = [_is_plain(replace(task, seed=seed)) for seed in range(earlier, task.seed + 1)]
    assert fits == [False] * (len(fits) - 1) + [True]


def _is_plain(task: tasks.SuiteTask) -> bool:
    media = TaskMedia(task)
    seen, changed = media.object, media.changed
    if (seen & media.preserve).any() or (changed & media.preserve).any() or (~media.preserve).mean((1, 2)).max() > 0.5:
        return False
    size = seen.sum((1, 2))
    if changed[6:].sum((1, 2)).min() < 150 or size.max() < 1000:
        return False
    return 100 < size[0] < 0.5 * size.max() if task.motion == "emerging" else size.min() > 450


@pytest.mark.parametrize("task", [*BENCHMARK, *REPLICATION, *VALIDATION], ids=lambda task: task.name)
def test_truth_and_source_differ_inside_the_mask_and_nowhere_else(task: tasks.SuiteTask) -> None:
    media = TaskMedia(task)
    assert np.array_equal(media.source[media.preserve], media.truth[media.preserve])
    seen = media.object
    assert not (seen & media.preserve).any()
    assert not (media.changed & media.preserve).any()
    assert media.changed[6:].sum((1, 2)).min() > 40
    share_of_first = seen[0].sum() / seen.sum((1, 2)).max()
    assert share_of_first < 0.5 if task.motion == "emerging" else seen.sum((1, 2)).min() > 100
    assert len(task.scene.objects) == task.objects
    assert (task.scene.pan != (0.0, 0.0)) == task.panning


def test_a_task_is_written_as_a_user_would_bring_it_and_only_once(tmp_path: Path) -> None:
    tasks.write(TASK, tmp_path)
    media = TaskMedia(TASK)
    assert np.array_equal(tasks.read_frames(tmp_path / "source"), media.source)
    assert np.array_equal(read_image(tmp_path / "edited_00012.png"), media.truth[12])
    assert np.array_equal(tasks.read_frames(tmp_path / "mask")[..., 0] == 0, media.preserve)
    assert not set(UNSEEN) & {0, 6, 12}
    (tmp_path / "source" / "00000.png").unlink()
    tasks.write(TASK, tmp_path)
    assert not (tmp_path / "source" / "00000.png").exists()
    (tmp_path / tasks.IDENTITY).write_text("of another renderer")
    tasks.write(TASK, tmp_path)
    assert np.array_equal(tasks.read_frames(tmp_path / "source"), media.source)


@pytest.mark.parametrize("name", ["source", "static_paste", "tracked_paste"])
def test_what_pastes_keeps_the_background_and_the_first_frame_exactly(name: str) -> None:
    media = TaskMedia(BENCHMARK[0])
    paste = {"source": baselines.unchanged, "static_paste": baselines.static_paste,
             "tracked_paste": baselines.tracked_paste}[name]  # fmt: skip
    video = paste(media.source, media.truth[0], media.preserve)
    found = scores(video, media)
    assert math.isinf(found["preserved_psnr"])
    assert found["preserved_ssim"] == pytest.approx(1)
    if name == "source":
        assert found["object_gain"] == -math.inf
    else:
        assert np.array_equal(video[0], media.truth[0])
        assert found["edit_psnr"] == metrics.quality(video[1:], media.truth[1:], ~media.preserve[1:]).psnr < 40


def test_the_truth_has_perfect_scores_and_the_sources_motion() -> None:
    media = TaskMedia(BENCHMARK[0])
    found = scores(media.truth, media)
    assert {found["preserved_psnr"], found["edit_psnr"], found["edit_psnr_unseen"], found["object_gain"]} == {math.inf}
    assert found["warping"] == found["warping_truth"] < scores(
        baselines.static_paste(media.source, media.truth[0], media.preserve), media)["warping"]  # fmt: skip


def test_a_tracked_paste_follows_centre_and_size_of_the_box() -> None:
    source = np.full((3, 32, 32, 3), 100, np.uint8)
    preserve = np.ones((3, 32, 32), bool)
    preserve[0, 4:12, 4:12] = preserve[1, 10:18, 20:28] = False
    first = source[0].copy()
    first[4:12, 4:12] = np.arange(64).reshape(8, 8, 1)
    video = baselines.tracked_paste(source, first, preserve)
    assert np.array_equal(video[1, 10:18, 20:28], first[4:12, 4:12])
    assert np.array_equal(video[2], source[2])
    preserve[1, 2:18, 12:28] = False
    grown = baselines.tracked_paste(source, first, preserve)[1, 2:18, 12:28, 0].astype(int)
    assert np.abs(grown[::2, ::2] - first[4:12, 4:12, 0]).max() <= 5
    preserve[0] = True
    assert np.array_equal(baselines.tracked_paste(source, first, preserve)[1:], source[1:])


@pytest.mark.parametrize(("degrees", "value"), [(1, 12.7062), (2, 4.3027), (5, 2.5706), (10, 2.2281), (23, 2.0687)])
def test_students_quantiles_are_those_of_the_tables(degrees: int, value: float) -> None:
    assert t_quantile(degrees) == pytest.approx(value, abs=2e-4)


def test_an_estimate_counts_tasks_not_seeds() -> None:
    found = estimate({"a": [1, 3], "b": [4, 4, 4], "c": [6]})
    assert (found.mean, found.tasks) == (4, 3)
    assert found.half_width == pytest.approx(4.3027 * 2 / math.sqrt(3), abs=1e-3)
    assert math.isnan(estimate({"a": [1, 2, 3]}).half_width)
    assert estimate({"a": [math.inf], "b": [1]}).mean == math.inf
    difference = paired({"a": [2], "b": [10, 12], "only": [0]}, {"a": [1], "b": [10]})
    assert (difference.mean, difference.half_width) == (1, pytest.approx(0, abs=1e-9))
    with pytest.raises(ValueError, match="at least one"):
        paired({"a": [1]}, {"b": [1]})


@pytest.mark.parametrize(
    ("mean", "half_width", "verdict"),
    [(4, 1, "shown"), (4, 2, "likely"), (2, 2, "not shown"), (2, 0.5, "refuted"), (2, math.nan, "one task")],
)
def test_a_verdict_heeds_the_interval(mean: float, half_width: float, verdict: str) -> None:
    assert Claim("", Estimate(mean, half_width, 5), 3.0).verdict == verdict


def test_claims_are_paired_differences_on_the_tasks_they_speak_of() -> None:
    def record(task: tasks.SuiteTask, method: str, psnr: float) -> dict:
        return {"task": task.name, "method": method, "seed": 0, "steps": 1, "seconds": 1.0,
                "scores": {score.key: psnr for score in SCORES}}  # fmt: skip

    records = [record(task, "naive", 20.0 + index) for index, task in enumerate(BENCHMARK)]
    records += [record(task, "motion", 20.0 + index + (5 if task.open_background else -2))
                for index, task in enumerate(BENCHMARK)]  # fmt: skip
    found = claims(Results(BENCHMARK, records))
    assert (found[0].found.mean, found[0].found.tasks, found[0].verdict) == (5, 19, "shown")
    assert (found[1].found.mean, found[1].found.tasks, found[1].verdict) == (-2, 5, "refuted")
    assert found[2].verdict == "not computed"
    assert [claim.found.tasks for claim in found[4:6]] == [24, 18]


def test_stages_are_those_of_the_methods() -> None:
    budget = Budget(100, 50, 0.25, 2.0)
    assert [stage["steps"] for stage in budget.stages(METHODS["appearance"])] == [100, 50]
    assert budget.stages(METHODS["appearance"])[1]["mix"] == {"motion": 0.75, "appearance": 0.25}
    assert budget.stages(METHODS["naive"]) == [{"name": "naive", "steps": 100, "mix": {"naive": 1}}]
    assert budget.stages(METHODS["motion_long"])[0]["steps"] == 150


def test_seconds_are_those_of_all_steps_of_a_run(tmp_path: Path) -> None:
    rows = [{"step": 1, "train/step_seconds": 0.5}, {"step": 1, "motion/loss": 3.0}, {"step": 2, "train/step_seconds": 2}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert training_seconds(tmp_path) == 2.5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("suite.tusks=quick", "did you mean `tasks`"),
        ('suite.methods=["magic"]', "no method `magic`"),
        ("seed=3", "suite.seeds"),
        ("stage.0.steps=3", "suite.steps"),
        ("suite.jobs=0", "jobs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_suite([override])


def test_quick_is_a_default_that_overrides_beat() -> None:
    settings, rest = load_suite(["suite.steps=7", "optimizer.lr=1e-3"], quick=True)
    assert (settings.tasks, settings.seeds, settings.steps, settings.appearance_steps) == ("quick", [0], 7, 150)
    assert rest == ["optimizer.lr=1e-3"]


def test_unknown_tasks_and_absent_checkpoints_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no list or task `benchmrak`.*benchmark"):
        tasks.chosen("benchmrak")
    with pytest.raises(UserError, match=r"suite\.checkpoint=FOLDER"):
        suite.run_suite([f"suite.checkpoint={tmp_path / 'none'}"], out=tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny_wan: Path) -> tuple[Path, Results, list[str]]:
    """One task with all methods on the random checkpoint, a step each."""
    out = tmp_path_factory.mktemp("suite")
    overrides = [*SHORT, f"suite.checkpoint={tiny_wan}"]
    return out, suite.run_suite(overrides, out=out), overrides


@pytest.fixture
def copied(done: tuple[Path, Results, list[str]], tmp_path: Path) -> Path:
    """Its folder, for tests that change what is in it."""
    return Path(shutil.copytree(done[0], tmp_path / "suite"))


def test_every_method_leaves_a_whole_line(done: tuple[Path, Results, list[str]]) -> None:
    found = {line["method"]: line for line in lines(done[0])}
    assert tuple(found) == DEFAULT_METHODS
    assert all(line["scores"].keys() >= {score.key for score in SCORES} for line in found.values())
    assert {name: line["steps"] for name, line in found.items() if line["steps"]} == {
        "naive": 1, "motion": 1, "motion_guided": 1, "appearance": 3, "appearance_guided": 3,
    }  # fmt: skip
    assert {name for name, line in found.items() if line["seconds"]} == {
        name for name in DEFAULT_METHODS if METHODS[name].learned
    }  # fmt: skip
    assert found["full"]["settings"]["condition"] == "all"
    folder = done[0] / "tasks" / TASK.name
    assert "stage     appearance: 2 steps" in (folder / "log-0.txt").read_text()
    assert not (folder / "runs" / "0").exists()


def test_a_report_alone_draws_what_is_there_and_computes_nothing(
    done: tuple[Path, Results, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, results, overrides = done
    more = [*overrides, "suite.seeds=[0,1]", "suite.report_only=true"]
    with pytest.raises(UserError, match=r"none of the results.*suite\.report_only"):
        suite.run_suite(more, out=tmp_path)
    shutil.copy(out / suite.RESULTS, tmp_path)
    again = suite.run_suite(more, out=tmp_path)
    assert again.records == results.records
    assert lines(tmp_path) == lines(out)
    assert f"{len(results.records)} of {len(results.records) + 9} results" in capsys.readouterr().out, "nine methods learn"
    table = report.main_table(results)
    assert "\n".join(table) in (tmp_path / suite.TABLE).read_text()


def test_the_report_has_every_method_and_claim(done: tuple[Path, Results, list[str]]) -> None:
    out, results, _ = done
    text = (out / suite.TABLE).read_text()
    assert all(text.count(f"| {METHODS[name].title} |") == 4 for name in DEFAULT_METHODS)
    assert all(claim.statement in text for claim in claims(results))
    sheet = read_image(out / suite.SHEET)
    assert sheet.shape[1] == (len(DEFAULT_METHODS) + 1) * (2 * 128 + report.MARGIN)
    assert (sheet[2 * report.LABEL :, -20] != 200).any()  # the last column has its picture


def page_rows(text: str, table: str) -> list[list[str]]:
    """Texts of the cells of a table of the page."""
    body = re.search(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', text, re.S)[1]
    return [[html.unescape(re.sub("<[^>]+>", "", cell)) for cell in re.findall(r"<td.*?</td>", row, re.S)]
            for row in re.findall(r"<tr>.*?</tr>", body, re.S)]  # fmt: skip


def test_the_page_has_every_number_and_the_videos_side_by_side(done: tuple[Path, Results, list[str]]) -> None:
    out, _, _ = done
    text = (out / "results.html").read_text()
    means, rows = page_rows(text, "mean-table"), page_rows(text, "task-table")
    in_markdown = (out / suite.TABLE).read_text()
    assert [row[0] for row in means] == [METHODS[name].title for name in DEFAULT_METHODS]
    assert all("| " + " | ".join(row) + " |" in in_markdown for row in means)
    assert [row[5:] for row in rows] == [row[1:] for row in means]  # one task: its numbers are the means
    assert {tuple(row[:4]) for row in rows} == {(TASK.name, TASK.edit, TASK.motion, "panning")}
    assert not re.findall(r'(?:src|href)="(?!data:|#)', text)  # nothing from elsewhere
    (film,) = re.findall(r'src="data:video/mp4;base64,([^"]+)"', text)
    (out / "film.mp4").write_bytes(base64.b64decode(film))
    frames = read_video(out / "film.mp4").frames
    side = 128
    step = side + report.MARGIN
    assert frames.shape == (13, side, (len(DEFAULT_METHODS) + 1) * step, 3)
    media = TaskMedia(TASK)
    for column, expected in enumerate((media.source, media.truth)):
        shown = frames[:, :, column * step : column * step + side].astype(int)
        assert np.abs(shown - expected).mean() < 4
    assert np.abs(frames[:, :, :side].astype(int) - frames[:, :, step : step + side]).mean() > 4  # they differ


def test_a_click_on_a_heading_sorts_in_a_browser(done: tuple[Path, Results, list[str]], tmp_path: Path) -> None:
    clicks = """<script>
const order = () => [...document.querySelectorAll("#mean-table tbody tr")].map(row => row.cells[1].dataset.value).join();
const other = () => document.querySelector("#task-table tbody").textContent;
const before = other(), heading = document.querySelectorAll("#mean-table th button")[1], found = [];
for (let turn = 0; turn < 2; turn++) { heading.click(); found.push(order()); }
document.body.dataset.found = JSON.stringify([...found, String(before === other())]);
</script>"""
    html_file = tmp_path / "page.html"
    html_file.write_text((done[0] / "results.html").read_text().replace("</body>", clicks + "</body>"))
    dom = document_of(html_file.as_uri(), tmp_path)
    rising, falling, alone = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', dom)[1]))
    values = [float(text) for text in rising.split(",")]
    assert values == sorted(values)
    assert len(values) == len(DEFAULT_METHODS)
    assert math.isinf(values[-1])
    assert [float(text) for text in falling.split(",")] == values[::-1]
    assert alone == "true"


def test_what_was_not_run_is_grey_on_the_page() -> None:
    video = np.zeros((3, 4, 6, 3), np.uint8)
    film = page.side_by_side([video, None], (4, 6))
    step = 6 + report.MARGIN
    assert film.shape == (3, 4, 2 * step, 3)
    assert (film[:, :, :6] == 0).all()
    assert (film[:, :, step : step + 6] == report.GREY).all()


def test_a_second_run_computes_nothing(done: tuple[Path, Results, list[str]], capsys: pytest.CaptureFixture) -> None:
    out, _, overrides = done
    before = (out / suite.RESULTS).read_bytes()
    suite.run_suite(overrides, out=out)
    assert (out / suite.RESULTS).read_bytes() == before
    assert "13 results, 13 of them in" in capsys.readouterr().out


def test_what_is_missing_is_computed_and_comes_out_the_same(
    done: tuple[Path, Results, list[str]], copied: Path
) -> None:
    """The appearance stage alone trains both stages in one go, the first run continued the motion stage: no matter.
    And an edit with source guidance needs its LoRA trained again."""
    out, overrides = copied, done[2]
    whole = lines(out)
    gone = ("motion_guided", "appearance")
    kept = [line for line in whole if line["method"] not in gone]
    (out / suite.RESULTS).write_text("".join(json.dumps(line) + "\n" for line in kept))
    suite.run_suite(overrides, out=out)
    again = lines(out)
    assert len(again) == len(whole)
    assert tuple(line["method"] for line in again[-2:]) == gone
    assert [line["scores"] for line in again[-2:]] == [line["scores"] for line in whole if line["method"] in gone]


def test_only_what_a_setting_touches_is_computed_again(
    done: tuple[Path, Results, list[str]], copied: Path, capsys: pytest.CaptureFixture
) -> None:
    out, overrides = copied, done[2]
    wanted = 'suite.methods=["source", "no_lora", "naive", "vae"]'
    before = len(lines(out))
    suite.run_suite([*overrides, wanted, "optimizer.lr=1e-3"], out=out)
    assert "4 results, 3 of them in" in capsys.readouterr().out
    assert [line["method"] for line in lines(out)[before:]] == ["naive"]


def test_a_torn_line_is_told(tmp_path: Path) -> None:
    (tmp_path / suite.RESULTS).write_text('{"key": "a", "scores": {"x": "-inf", "y": null}}\n{"key": "b", "sc')
    with pytest.raises(UserError, match="line 2 is not whole"):
        suite.read_records(tmp_path)
    (tmp_path / suite.RESULTS).write_text('{"key": "a", "scores": {"x": "-inf", "y": null}}\n')
    read = suite.read_records(tmp_path)[0]["scores"]
    assert read["x"] == -math.inf
    assert math.isnan(read["y"])


def test_processes_side_by_side_fill_one_file(tmp_path: Path, tiny_wan: Path) -> None:
    overrides = [f"suite.checkpoint={tiny_wan}", 'suite.methods=["source", "tracked_paste"]', "suite.jobs=2"]
    results = suite.run_suite(overrides, quick=True, out=tmp_path)
    assert len(lines(tmp_path)) == len(results.records) == 2 * len(QUICK)


BENCHMARK_WITH_ONE_PROCESS = """
import multiprocessing, os, time
from concurrent.futures import ProcessPoolExecutor
from loraedit_ext.evaluation.suite import run as suite
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    numbers.put(0)
    with ProcessPoolExecutor(1, context, suite._start_process, (numbers, 0, os.getpid())) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(1000)
"""


def test_a_killed_benchmark_leaves_no_process_behind(tmp_path: Path) -> None:
    """They once waited for work for ever."""
    script = tmp_path / "benchmark.py"
    script.write_text(BENCHMARK_WITH_ONE_PROCESS)
    environment = os.environ | {"PYTHONPATH": str(Path(suite.__file__).parents[3])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as benchmark:
        worker = Path("/proc") / benchmark.stdout.readline().strip()
        assert worker.is_dir()
        benchmark.kill()
    deadline = time.monotonic() + 60
    while worker.is_dir() and "State:\tZ" not in (worker / "status").read_text():
        assert time.monotonic() < deadline, "the process is still there"
        time.sleep(0.05)


def test_quick_scores_are_what_a_guard_needs(tmp_path: Path, tiny_wan: Path) -> None:
    found = suite.quick_scores(tiny_wan, tmp_path, ['suite.methods=["masked"]', "edit.steps=1"])
    assert found.keys() == {task.name for task in GUARD}
    assert all(scored["masked"]["edit_psnr"] > 0 for scored in found.values())


@pytest.mark.parametrize(
    "arguments", [["--suite", "scenes", "--config", "x.toml"], ["--quick"], ["--suite", "scenes", "--edit", "x"]]
)
def test_flags_that_do_not_go_together_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments)
    assert caught.value.code == 2
