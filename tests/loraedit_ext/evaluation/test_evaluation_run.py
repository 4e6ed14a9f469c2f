"""evaluate.py from end to end: files in, evaluation.json and report.html out, and what it refuses."""

from __future__ import annotations

import base64
import html.parser
import io
import json
import math
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from skimage import data

import evaluate
from common.errors import UserError
from dataset.images import write_png
from dataset.job import load_job
from dataset.resize import Grid
from dataset.video import hash_media, read_media
from dataset.video_writer import write_images, write_lossless
from loraedit_ext.config import EvaluationSettings, load_config, load_evaluation
from loraedit_ext.editing import results
from loraedit_ext.editing.editor import Edit
from loraedit_ext.evaluation import motion, pages, report, run
from loraedit_ext.evaluation.catalogue import METRICS
from loraedit_ext.evaluation.charts import Series, line_chart, ticks
from loraedit_ext.evaluation.judge import judge
from loraedit_ext.evaluation.subject import Files, Subject, from_edit, from_files, newest_edit
from loraedit_ext.lora import LoraFile
from tests.browser import document_of

FRAMES, SIDE = 5, 64
BOX = (slice(16, 48), slice(16, 48))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source() -> np.ndarray:
    picture = np.ascontiguousarray(data.astronaut()[::4, ::4])
    return np.stack([picture[20 : 20 + SIDE, 20 + t : 20 + t + SIDE] for t in range(FRAMES)])


@pytest.fixture(scope="module")
def edited(source) -> np.ndarray:
    out = source.copy()
    out[:, *BOX] = 255 - out[:, *BOX]
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory, source, edited) -> Path:
    """A job, as a user has it."""
    root = tmp_path_factory.mktemp("job")
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[BOX] = 255
    write_lossless(root / "source.mkv", source, 8)
    write_lossless(root / "edited.mkv", edited, 8)
    write_png(root / "mask.png", mask)
    write_png(root / "first.png", edited[0])
    (root / "job.toml").write_text(
        'name = "<b>box</b>"\nsource = "source.mkv"\nmask = "mask.png"\n'
        '[[edited_frame]]\nimage = "first.png"\nframe = 0\n'
    )
    (root / "edit.toml").write_text(
        'output_dir = "runs"\ndataset = "job.toml"\n[model]\ntype = "wan"\nckpt_path = "wan"\n'
        '[[stage]]\nname = "motion"\nsteps = 2\nmix = { motion = 1 }\n'
    )
    return root


@pytest.fixture(scope="module")
def run_folder(folder, source, edited) -> Path:
    """A finished run whose LoRA made an edit: its step folder."""
    step = folder / "runs/20260101_00-00-00/step2"
    step.mkdir(parents=True)
    (step / "adapter_model.safetensors").write_bytes(b"weights")
    (step.parent / "metrics.jsonl").write_text(
        '{"step": 0, "motion/loss": 2.5}\n{"step": 1, "train/loss": 2.0}\n'
        '{"step": 2, "train/loss": 1.5, "motion/loss": 1.0}\n'
    )
    config = load_config(folder / "edit.toml", ["edit.output=png", "optimizer.lr=2e-4"])
    (step.parent / "config.json").write_text(json.dumps({"config": config.model_dump(mode="json")}))
    generated = np.clip(edited.astype(int) + 3, 0, 255).astype(np.uint8)
    job = load_job(folder / "job.toml", Grid())
    adapter = LoraFile(step / "adapter_model.safetensors", {}, {})
    results.write(step / "edit", Edit(edited, generated, {}), job, config, adapter)
    return step


def files(folder: Path, **changes: Path) -> Files:
    named = {"source": "source.mkv", "edited": "edited.mkv", "mask": "mask.png", "reference": "first.png"}
    return Files(**({role: folder / name for role, name in named.items()} | changes))


def arguments(folder: Path, out: Path) -> list[str]:
    named = files(folder).named()
    return [*(part for role, path in named.items() for part in (f"--{role}", str(path))), "--out", str(out)]


def test_results_keep_what_the_model_made_without_loss(run_folder, edited):
    stored = read_media(run_folder / "edit/generated.mkv").frames
    np.testing.assert_array_equal(stored, np.clip(edited.astype(int) + 3, 0, 255))


def test_the_reference_is_what_the_edit_was_made_from(folder, run_folder, edited, tmp_path):
    """Inside the mask only, or the whole picture where the job said so, or where the edit is older than that key."""
    shutil.copytree(run_folder / "edit", tmp_path / "edit")
    config, picture = load_config(folder / "edit.toml"), edited[0].copy()
    picture[:8] = 255
    shutil.copy(folder / "first.png", tmp_path / "first.png")
    record = json.loads((tmp_path / "edit/edited.json").read_text())
    try:
        write_png(folder / "first.png", picture)
        record["job"]["hashes"]["edited_frame.0"] = hash_media(folder / "first.png")
        for keys, expected in (({"keep_outside": True}, edited[0]), ({"keep_outside": False}, picture), ({}, picture)):
            made = {key: value for key, value in record["job"].items() if key not in ("keep_outside", "every")} | keys
            (tmp_path / "edit/edited.json").write_text(json.dumps(record | {"job": made}))
            assert (from_edit(config, tmp_path / "edit").reference == expected).all()
    finally:
        shutil.copy(tmp_path / "first.png", folder / "first.png")


def test_a_clip_model_that_is_named_must_be_there(folder, run_folder, capsys):
    """Only the default one may be missing; a wrong path once ended as "not computed" in the table."""
    assert evaluate.main(["--config", str(folder / "edit.toml"), f"evaluation.clip_path={folder / 'clpi'}"]) == 2
    assert f"{folder / 'clpi'}: not a whole CLIP folder" in capsys.readouterr().err


def test_a_finished_run_is_judged_by_its_config(folder, run_folder, capsys):
    assert evaluate.main(["--config", str(folder / "edit.toml")]) == 0
    out = json.loads((run_folder / "edit/evaluation.json").read_text())
    numbers = {key: entry["value"] for key, entry in out["metrics"].items()}
    assert list(numbers) == sorted(metric.key for metric in METRICS)
    assert numbers["preserved_psnr"] == "inf", "composited and stored as PNG: exact"
    assert numbers["preserved_psnr_generated"] == pytest.approx(20 * math.log10(255 / 3), abs=0.1)
    assert numbers["leak_generated"] == pytest.approx(3, abs=0.1)
    assert numbers["leak"] == 0
    assert "looked for" in out["metrics"]["clip_score"]["not_computed"]
    assert out["hashes"].keys() == {"source", "edited", "mask", "reference", "generated"}
    shown = capsys.readouterr().out
    assert "∞ (identical)" in shown
    assert "not computed: looked for" in shown


def test_the_newest_lora_without_an_edit_is_told(folder, run_folder):
    newer = folder / "runs/20260102_00-00-00/step1"
    newer.mkdir(parents=True)
    (newer / "adapter_model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"Run inference\.py first"):
        newest_edit(load_config(folder / "edit.toml"))
    shutil.rmtree(newer.parent)
    assert newest_edit(load_config(folder / "edit.toml")) == run_folder / "edit"


def test_what_was_made_last_is_judged_and_named(folder, run_folder, capsys):
    shutil.copytree(run_folder / "edit", run_folder / "edit_2")  # keeps its time
    (run_folder / "edit_2/edited.json").touch()
    assert evaluate.main(["--config", str(folder / "edit.toml")]) == 0
    assert f"{run_folder / 'edit_2'}, made last" in capsys.readouterr().out
    (run_folder / "edit/edited.json").touch()
    assert newest_edit(load_config(folder / "edit.toml")) == run_folder / "edit"
    shutil.rmtree(run_folder / "edit_2")


def test_a_moved_run_keeps_its_loss_curve(folder, run_folder, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(run_folder.parent, moved)
    subject = from_edit(load_config(folder / "edit.toml"), moved / "step2/edit")
    assert subject.run == moved
    lone = tmp_path / "edit"
    shutil.copytree(run_folder / "edit", lone)
    assert from_edit(load_config(folder / "edit.toml"), lone).run == run_folder.parent


def test_an_edit_of_other_files_is_refused(folder, run_folder, tmp_path, edited, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    write_png(copy / "first.png", edited[0] // 2)
    assert evaluate.main(["--config", str(copy / "edit.toml")]) == 2
    assert "edited_frame.0 changed since" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"job": 3}', '{"job": {"size": [1, 1]}}', "{"])
def test_a_record_that_is_none_is_told(folder, tmp_path, text, capsys):
    (tmp_path / "edited.json").write_text(text)
    assert evaluate.main(["--config", str(folder / "edit.toml"), "--edit", str(tmp_path)]) == 2
    assert f"{tmp_path / 'edited.json'}: is not what inference.py writes" in capsys.readouterr().err


@pytest.mark.usefixtures("run_folder")
def test_a_place_that_cannot_be_written_to_is_told_before_anything_is_judged(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "judge", None)
    (tmp_path / "file").touch()
    assert evaluate.main(["--config", str(folder / "edit.toml"), "--out", str(tmp_path / "file")]) == 2
    assert "cannot be a folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be a folder"):
        run.evaluate_files(Files(*[folder] * 4), EvaluationSettings(), tmp_path / "file")


def test_any_tools_files_are_judged(folder, tmp_path):
    assert evaluate.main(arguments(folder, tmp_path / "out")) == 0
    out = json.loads((tmp_path / "out/evaluation.json").read_text())["metrics"]
    assert out["preserved_psnr"]["value"] == "inf"
    assert "before compositing" in out["preserved_psnr_generated"]["not_computed"]
    assert out["motion_outside"]["value"] < 0.3 * out["motion_outside"]["beside"]
    assert out["seam_jump"]["value"] > 2 * out["seam_jump"]["beside"]
    assert (tmp_path / "out/report.html").is_file()


def test_a_mask_may_have_its_shape_in_the_alpha_channel(folder, tmp_path):
    layer = np.zeros((SIDE, SIDE, 4), np.uint8)
    layer[BOX][..., 3] = 255
    cv2.imwrite(str(tmp_path / "layer.png"), layer)
    found = from_files(files(folder, mask=tmp_path / "layer.png"))
    assert np.array_equal(found.preserve, from_files(files(folder)).preserve)


def test_ground_truth_is_used_where_there_is_one(folder, edited, tmp_path):
    write_lossless(tmp_path / "truth.mkv", np.clip(edited.astype(int) - 5, 0, 255).astype(np.uint8), 8)
    found = judge(from_files(files(folder, truth=tmp_path / "truth.mkv")), EvaluationSettings(), CPU)
    assert found["edit_psnr"].value == pytest.approx(20 * math.log10(255 / 5), abs=0.2)
    assert found["edit_ssim"].value > 0.95


def test_inside_is_the_edit_and_outside_the_background(folder, source, tmp_path):
    frozen = source.copy()
    frozen[:, *BOX] = source[:1, *BOX]
    write_images(tmp_path / "frozen", frozen)
    found = judge(from_files(files(folder, edited=tmp_path / "frozen")), EvaluationSettings(), CPU)
    for name in ("warping", "motion"):
        assert found[f"{name}_inside"].value > 3 * found[f"{name}_outside"].value
    assert found["motion_inside"].value == pytest.approx(found["motion_inside"].beside, rel=0.2)
    assert found["flicker_inside"].value == 1


def test_the_given_first_frame_counts_in_no_comparison(folder, edited, tmp_path):
    spoilt = edited.copy()
    spoilt[0] = 0
    write_images(tmp_path / "spoilt", spoilt)
    found = judge(from_files(files(folder, edited=tmp_path / "spoilt")), EvaluationSettings(), CPU)
    assert found["preserved_psnr"].value == math.inf
    assert math.isnan(found.frames["preserved_psnr"][0])


def test_a_shorter_result_is_judged_and_told(folder, edited, tmp_path):
    write_images(tmp_path / "short", edited[:3])
    subject = from_files(files(folder, edited=tmp_path / "short"))
    assert len(subject.source) == len(subject.preserve) == 3
    assert "source: first 3 of 5 frames used." in subject.notes


def test_a_result_of_another_rate_is_told(folder, edited, tmp_path):
    assert not from_files(files(folder)).notes
    write_lossless(tmp_path / "slow.mkv", edited, 4)
    subject = from_files(files(folder, edited=tmp_path / "slow.mkv"))
    (note,) = subject.notes
    assert "source: 8 frames a second, the edited video 4; frames are compared by their numbers" in note
    write_images(tmp_path / "frames", edited)
    assert from_files(files(folder, edited=tmp_path / "frames")).fps == 8


def test_weights_that_are_no_clip_are_told_before_anything_is_measured(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(motion, "flow", lambda *_: pytest.fail("optical flow was computed"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="not a whole CLIP folder"):
        judge(from_files(files(folder)), EvaluationSettings(clip_path=tmp_path), CPU)


def test_what_does_not_fit_is_told_all_at_once(folder, edited, tmp_path):
    write_images(tmp_path / "long", np.concatenate([edited, edited]))
    with pytest.raises(UserError, match="source has 5 frames, the edited video 10"):
        from_files(files(folder, edited=tmp_path / "long"))
    write_png(tmp_path / "small.png", np.zeros((32, 32), np.uint8))
    with pytest.raises(UserError, match=r"(?s)mask is 32x32.*reference is 32x32"):
        from_files(files(folder, mask=tmp_path / "small.png", reference=tmp_path / "small.png"))
    with pytest.raises(UserError, match=r"(?s)nowhere\.mp4.*gone\.png"):
        from_files(files(folder, edited=tmp_path / "nowhere.mp4", reference=tmp_path / "gone.png"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--source", "a.mp4"], "missing: --edited, --mask, --reference, --out"),
        (["--config", "edit.toml", "--source", "a.mp4"], "leave out --source"),
        (["--edit", "folder"], "missing: --source"),
    ],
)
def test_the_command_line_says_what_belongs_together(given, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(given)
    assert message in capsys.readouterr().err


def test_evaluation_settings_from_the_command_line():
    found = load_evaluation(["evaluation.clip_path=clip", 'evaluation.deqa_command=["x", "{frames}", "{out}"]'])
    assert found.clip_path == Path("clip")
    assert found.deqa_command[0] == "x"
    with pytest.raises(UserError, match=r"only keys of \[evaluation\]"):
        load_evaluation(["optimizer.lr=1"])
    with pytest.raises(UserError, match="did you mean `clip_path`"):
        load_evaluation(["evaluation.clip_pth=1"])


def test_what_is_no_folder_of_an_edit_is_told_with_the_flag_of_this_verb(folder, run_folder, tmp_path, capsys):
    config = ["--config", str(folder / "edit.toml")]
    assert evaluate.main([*config, "--edit", str(run_folder)]) == 2
    assert "Give the folder of an edit, e.g. runs/RUN/stepN/edit" in capsys.readouterr().err
    assert evaluate.main([*config, f"output_dir={tmp_path}"]) == 2
    assert "evaluate.py --edit FOLDER" in capsys.readouterr().err


def test_a_failing_scorer_costs_only_its_own_row(folder):
    settings = EvaluationSettings(deqa_command=[sys.executable, "-c", "import sys; sys.exit('boom')", "{frames}{out}"])
    found = judge(from_files(files(folder)), settings, CPU)
    assert found["deqa_score"].value is None
    assert "boom" in found["deqa_score"].reason
    assert found["preserved_psnr"].value is not None


class Page(html.parser.HTMLParser):
    """Videos, scripts and tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.videos: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        if tag == "video":
            self.videos.append(values["src"] or "")
        else:
            self.links += [value for key, value in attrs if key in ("src", "href") and value]


@pytest.fixture(scope="module")
def page_path(folder, run_folder) -> Path:
    assert evaluate.main(["--config", str(folder / "edit.toml")]) == 0
    return run_folder / "edit/report.html"


def test_the_page_is_whole_and_alone(page_path):
    text = page_path.read_text()
    page = Page(text)
    assert not page.links, "nothing is loaded from anywhere"
    assert "http" not in re.sub(r"data:video/mp4;base64,[\w+/=]+", "", text)
    assert len(page.videos) == 5
    for uri in page.videos:
        head, _, body = uri.partition(",")
        assert head == "data:video/mp4;base64"
        with av.open(io.BytesIO(base64.b64decode(body))) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
            assert sum(1 for _ in container.decode(stream)) == FRAMES
    assert re.search(r"deepspeed train\.py --config \S+ optimizer\.lr=0\.0002 edit\.output=png\n?<", text)
    for words in ("motion: mean over fixed noise levels", "Resolved configuration",
                  "gradient_accumulation_steps", "Warping error", "not computed: looked for"):  # fmt: skip
        assert words in text


def test_names_cannot_write_html(page_path):
    text = page_path.read_text()
    assert "&lt;b&gt;box&lt;/b&gt;" in text
    assert "<b>box</b>" not in text


def test_the_pages_numbers_are_the_files(page_path):
    embedded = re.search(r'<script type="application/json" id="evaluation">(.*?)</script>', page_path.read_text(), re.S)
    stored = json.loads((page_path.parent / "evaluation.json").read_text())
    assert json.loads(embedded[1])["metrics"] == stored["metrics"]


def test_large_videos_lie_beside_the_page(folder, tmp_path, monkeypatch):
    subject = from_files(files(folder))
    evaluation = judge(subject, EvaluationSettings(), CPU)
    monkeypatch.setattr(pages, "EMBED_BYTES", 1)
    written = report.write_report(tmp_path, subject, evaluation, [])
    videos = Page((tmp_path / "report.html").read_text()).videos
    assert written == [tmp_path / "report.html", tmp_path / "report_videos"]
    assert all((tmp_path / video).is_file() for video in videos)
    monkeypatch.undo()
    report.write_report(tmp_path, subject, evaluation, [])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html"], "no debris, no stale videos"


def test_overlay_and_difference_show_the_region(folder):
    subject = from_files(files(folder))
    tinted = report.overlay(subject.source, subject.preserve)
    assert (tinted != subject.source).any(-1)[0, *BOX].mean() > 0.9
    outside = subject.preserve[0]
    np.testing.assert_array_equal(tinted[0][outside], subject.source[0][outside])
    shown = report.difference(subject.edited, subject.source, subject.preserve)
    assert shown[0][outside].max() < 10
    assert shown[0, *BOX].mean() > 80


def test_the_script_runs_in_a_browser(page_path, tmp_path):
    shown = document_of(page_path.as_uri(), tmp_path)
    assert re.search(r'class="cursor"[^>]*x1="\d', shown), "the script places the cursor when it gets to its end"


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 12, True, [0, 5, 10, 15]), (0, 1, True, [0, 1]), (3, 3, True, [3, 4]),
        (0, 1, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (32.1, 42.9, False, [30, 35, 40, 45]), (1e-4, 9e-4, False, [0, 2e-4, 4e-4, 6e-4, 8e-4, 1e-3]),
    ],
)  # fmt: skip
def test_ticks_are_round_and_span_the_values(low, high, whole, expected):
    assert ticks(low, high, whole) == pytest.approx(expected)


def test_charts_break_where_there_is_no_number():
    chart = line_chart([Series("a & b", range(5), [math.nan, 1, 2, math.inf, 3])], "frame", "dB", frames=True)
    assert chart.count("<polyline") == 2
    assert "a &amp; b" in chart
    with pytest.raises(ValueError, match="finite"):
        line_chart([Series("none", [0], [math.nan])], "x", "y")


def test_short_or_small_videos_have_no_flow_and_say_so(source):
    tiny = source[:, :16, :16]
    preserve = np.ones(tiny.shape[:3], bool)
    preserve[:, 4:12, 4:12] = False
    subject = Subject("tiny", tiny, tiny, preserve, tiny[0], None, None, Fraction(8), {}, {})
    found = judge(subject, EvaluationSettings(), CPU)
    assert "needs two frames" in found["warping_inside"].reason
    assert len(found.values) == len(METRICS)
