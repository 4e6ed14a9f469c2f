"""Making a job: the edit is found, its region followed, and what is written is a job that loads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import prepare as verb
from common.errors import UserError, UserErrors
from dataset.images import read_image, write_png
from dataset.job import load_job
from dataset.resize import Grid
from dataset.video_writer import write_images
from loraedit_ext.evaluation.rendering import render
from loraedit_ext.evaluation.scenes import random_scene
from loraedit_ext.prepare.difference import changed
from loraedit_ext.prepare.job import Request, prepare
from loraedit_ext.prepare.regions import from_box, from_picture, widened
from loraedit_ext.prepare.tracking import track

ROOT = Path(__file__).parents[2]
SIZE = 192


def clip_of(kind: str, frames: int = 13, panning: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A scene of one object, and where that is: uint8 (F, H, W, 3) and bool (F, H, W)."""
    scene = random_scene(1234, objects=1, kind=kind, panning=panning)
    rendered = render(scene, frames, (SIZE, SIZE))
    return np.rint(rendered.video * 255).astype(np.uint8), rendered.alpha[0] > 0.5


def box_of(shape: np.ndarray) -> tuple[int, int, int, int]:
    return cv2.boundingRect(shape.astype(np.uint8))


def overlap(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of each frame."""
    return (found & truth).sum((1, 2)) / (found | truth).sum((1, 2))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A source of 13 frames whose object moves, and the picture of frame 0 with the object painted over."""
    video, shapes = clip_of("translating")
    write_images(tmp_path / "source", video)
    edited = video[0].copy()
    edited[shapes[0]] = 255 - edited[shapes[0]]
    write_png(tmp_path / "edited.png", edited)
    return tmp_path


def request(folder: Path, **more) -> Request:
    return Request(folder / "source", folder / "job", **more)


@pytest.mark.parametrize("panning", [False, True])
@pytest.mark.parametrize("kind", ["translating", "rotating", "deforming"])
def test_the_mask_of_a_box_covers_the_object_wherever_it_goes(kind, panning):
    video, shapes = clip_of(kind, panning=panning)
    tracked = track(video, {0: from_box(box_of(shapes[0]), (SIZE, SIZE))})
    masks = np.stack([widened(shape, 0.1) for shape in tracked.shapes])
    assert ((masks & shapes).sum((1, 2)) >= 0.97 * shapes.sum((1, 2))).all()
    assert masks.mean() < 3.5 * shapes.mean()  # and no more than a box with its margin asks for


def test_a_mask_that_stays_where_it_was_would_not_do():
    """What the tests here measure: the objects do move out of their first box."""
    _, shapes = clip_of("translating")
    still = widened(from_box(box_of(shapes[0]), (SIZE, SIZE)).shape, 0.1)
    assert (still & shapes[-1]).sum() < 0.9 * shapes[-1].sum()


@pytest.mark.parametrize("kind", ["translating", "rotating"])
def test_a_painted_shape_moves_and_turns_with_the_object(kind):
    video, shapes = clip_of(kind)
    assert overlap(track(video, {0: from_picture(shapes[0])}).shapes, shapes).min() > 0.85


def test_a_region_is_followed_backward_too():
    video, shapes = clip_of("rotating")
    backward = track(video[::-1], {12: from_picture(shapes[0])}).shapes[::-1]
    assert np.array_equal(backward, track(video, {0: from_picture(shapes[0])}).shapes)


def test_large_pictures_are_followed_at_a_smaller_size():
    video, shapes = clip_of("translating")
    large = np.stack([cv2.resize(frame, None, fx=4, fy=4, interpolation=cv2.INTER_CUBIC) for frame in video])
    wide = shapes.repeat(4, 1).repeat(4, 2)
    assert overlap(track(large, {0: from_picture(wide[0])}).shapes, wide).min() > 0.85


def test_one_more_key_frame_mends_the_track_around_it():
    """After a cut the first key is lost; a second one holds for the frames that are nearer to it, and both are exact."""
    first, shapes = clip_of("translating")
    second, others = clip_of("rotating", panning=True)
    video, truth = np.concatenate([first[:7], second[:6]]), np.concatenate([shapes[:7], others[:6]])
    alone = track(video, {0: from_picture(truth[0])})
    assert overlap(alone.shapes, truth)[8:].max() < 0.6
    assert 7 in alone.doubtful()
    mended = track(video, {0: from_picture(truth[0]), 12: from_picture(truth[12])})
    assert overlap(mended.shapes, truth)[7:].min() > 0.85
    assert np.array_equal(mended.shapes[:7], alone.shapes[:7])
    assert np.array_equal(mended.shapes[[0, 12]], truth[[0, 12]])


def test_every_frame_belongs_to_the_key_frame_that_is_nearest():
    """On a still picture each frame shows its key's box."""
    still = np.repeat(clip_of("translating")[0][:1], 9, axis=0)
    keys = {frame: from_box((10 * frame, 20, 60, 60), (SIZE, SIZE)) for frame in (1, 4, 8)}
    shapes = track(still, keys).shapes
    assert [int(np.flatnonzero(shape.any(0))[0]) // 10 for shape in shapes] == [1, 1, 1, 4, 4, 4, 4, 8, 8]


def test_the_difference_finds_the_edit_under_the_traces_of_an_editor():
    video, _ = clip_of("translating")
    edited = video[0].copy()
    edited[50:90, 30:100] = (255, 255, 0)
    noisy = np.clip(edited.astype(int) + np.random.default_rng(0).integers(-6, 7, edited.shape), 0, 255).astype(np.uint8)
    saved = cv2.imdecode(cv2.imencode(".jpg", noisy, [cv2.IMWRITE_JPEG_QUALITY, 85])[1], cv2.IMREAD_COLOR)
    left, top, width, height = box_of(changed(video[0], saved))
    assert np.allclose((left, top, left + width, top + height), (30, 50, 100, 90), atol=5)
    assert not changed(video[0], video[0]).any()
    untouched = cv2.imdecode(cv2.imencode(".jpg", video[0], [cv2.IMWRITE_JPEG_QUALITY, 85])[1], cv2.IMREAD_COLOR)
    assert not changed(video[0], untouched).any()


def test_from_a_video_to_a_job_in_two_calls(folder):
    lines = prepare(request(folder))
    assert "next      edit this picture" in lines[-1]
    assert sorted(path.name for path in (folder / "job").iterdir()) == ["frame.png"]
    assert np.array_equal(read_image(folder / "job" / "frame.png"), read_image(folder / "source" / "00000.png"))
    lines = prepare(request(folder, edited=folder / "edited.png", caption='a "red" disc', edited_caption="a blue disc"))
    assert not [line for line in lines if line.startswith("note")]
    job = load_job(folder / "job" / "job.toml", Grid())
    _, shapes = clip_of("translating")
    assert ((job.grey_mask == 255) & shapes).sum() > 0.99 * shapes.sum()
    assert set(np.unique(job.grey_mask)) == {0, 255}
    assert (job.caption, job.first_edit.caption) == ('a "red" disc', "a blue disc")
    assert np.array_equal(job.first_edit.image, read_image(folder / "edited.png"))
    assert {"preview.mp4", "preview.png", "mask", "frame.png", "job.toml"} <= {p.name for p in (folder / "job").iterdir()}


def test_frames_outside_the_clip_have_black_masks_and_the_job_says_which_it_uses(folder):
    box = {0: box_of(clip_of("translating")[1][3])}
    prepare(request(folder, boxes=box, start=3, frames=5))
    grey = np.stack([read_image(path)[..., 0] for path in sorted((folder / "job" / "mask").glob("*.png"))])
    assert len(grey) == 13
    assert [bool(mask.any()) for mask in grey] == [3 <= index < 8 for index in range(13)]
    job = load_job(folder / "job" / "job.toml", Grid())
    assert (job.start, len(job.frames)) == (3, 5)
    assert np.array_equal(job.grey_mask, grey[3:8])


def test_an_edit_beyond_the_region_is_told(folder):
    left, top, width, height = box_of(clip_of("translating")[1][0])
    lines = prepare(request(folder, edited=folder / "edited.png", boxes={0: (left, top, width // 3, height)}))
    assert any("outside the mask" in line for line in lines)


def test_a_region_that_leaves_the_picture_is_told(folder):
    still = clip_of("translating")[0][0]
    wide = np.hstack([still, still[:, ::-1]])
    write_images(folder / "source", np.stack([wide[:, 12 * index : 12 * index + 192] for index in range(9)]))
    lines = prepare(request(folder, boxes={0: (12, 60, 40, 40)}))
    assert any("nothing is marked in frames 5-8: the region has left the picture" in line for line in lines), "\n".join(lines)


def test_a_job_that_somebody_wrote_is_kept(folder):
    (folder / "job").mkdir()
    (folder / "job" / "job.toml").write_text("mine")
    lines = prepare(request(folder, edited=folder / "edited.png"))
    assert lines[-1].startswith("kept")
    assert (folder / "job" / "job.toml").read_text() == "mine"


def test_the_same_call_again_writes_the_same(folder):
    asked = request(folder, edited=folder / "edited.png")
    prepare(asked)
    files = {path: path.read_bytes() for path in (folder / "job" / "mask").iterdir()}
    prepare(asked)
    assert files == {path: path.read_bytes() for path in (folder / "job" / "mask").iterdir()}


@pytest.mark.parametrize(("change", "words"), [
    ({"frames": 6}, "nearest: 5 or 9"),
    ({"frames": 17}, "has 13 frames, 13 from frame 0 on; expected at least 17"),
    ({"start": 10}, "has 13 frames, 3 from frame 10 on; expected at least 5"),
    ({"start": 13}, "expected at least 5"),
    ({"boxes": {13: (0, 0, 9, 9)}}, "the clip has frames 0 to 12"),
    ({"boxes": {0: (SIZE, 0, 9, 9)}}, "marks nothing inside the picture of 192x192"),
    ({"painted": {0: Path("black.png")}}, "marks nothing"),
    ({"painted": {0: Path("small.png")}}, "masks are 20x20, expected 192x192"),
    ({"edited": Path("small.png")}, "is 20x20, expected 192x192"),
    ({"edited": Path("source/00000.png")}, "does not differ from frame 0"),
    ({"edited": Path("other.png")}, "does not tell where the edit is"),
    ({"edited": Path("none.png")}, "none.png"),
])  # fmt: skip
def test_what_cannot_be_done_is_told_with_the_cure(folder, change, words):
    write_png(folder / "black.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    write_png(folder / "small.png", np.full((20, 20, 3), 255, np.uint8))
    write_png(folder / "other.png", 255 - read_image(folder / "source" / "00000.png"))
    if "edited" in change:
        change = {"edited": folder / change["edited"]}
    if "painted" in change:
        change = {"painted": {0: folder / change["painted"][0]}}
    with pytest.raises(UserError, match=words):
        prepare(request(folder, **change))
    assert not (folder / "job").exists()


def test_all_wrong_regions_are_told_at_once(folder):
    wrong = request(folder, boxes={20: (0, 0, 9, 9), 1: (500, 0, 9, 9)})
    with pytest.raises(UserErrors) as caught:
        prepare(replace(wrong, painted={1: folder / "edited.png"}))
    assert len(caught.value.messages) == 2


def test_the_verb_takes_boxes_and_pictures_with_and_without_a_frame(folder, capsys):
    painted = folder / "painted.png"
    write_png(painted, clip_of("translating")[1][12].astype(np.uint8) * 255)
    left, top, width, height = box_of(clip_of("translating")[1][0])
    code = verb.main(["--source", str(folder / "source"), "--out", str(folder / "job"), "--margin", "0.05",
                      "--box", f"{left},{top},{width},{height}", "--painted", f"12:{painted}"])  # fmt: skip
    told = capsys.readouterr().out
    assert code == 0
    assert f"frame 0: {width}x{height} at ({left}, {top})" in told
    assert "frame 12:" in told
    assert verb.main(["--source", str(folder / "nowhere.mp4"), "--out", str(folder / "job")]) == 2
    assert "nowhere.mp4: no such file" in capsys.readouterr().err


@pytest.mark.parametrize("box", ["1,2,3", "1,2,3,x", "1,2,0,4", "1,2,3,-4"])
def test_a_box_that_is_none_is_refused_before_anything_is_read(box):
    command = [sys.executable, "prepare.py", "--source", "x", "--out", "y", "--box", box]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--box" in done.stderr
    assert "Traceback" not in done.stderr
