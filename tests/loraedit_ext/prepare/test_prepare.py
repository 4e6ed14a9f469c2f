"""Making a job: the edit is found, its region followed, and what is written is a job that loads."""

from __future__ import annotations

import re
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import prepare as verb
from common.errors import UserError, UserErrors
from dataset.images import read_image, write_png
from dataset.job import EditJob, load_job
from dataset.resize import Grid
from dataset.video_writer import write_images
from loraedit_ext.config import load_config
from loraedit_ext.difference import changed
from loraedit_ext.evaluation.rendering import render
from loraedit_ext.evaluation.scenes import random_scene
from loraedit_ext.evaluation.textures import ATLAS_PATH
from loraedit_ext.prepare.job import prepare
from loraedit_ext.prepare.regions import Box, from_box, from_picture, widened
from loraedit_ext.prepare.request import Request
from loraedit_ext.prepare.tomls import edit_toml, job_toml
from loraedit_ext.prepare.tracking import track

ROOT = Path(__file__).parents[3]
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
    assert lines[-1].startswith(f"next      edit {folder / 'job' / 'frame.png'} with any image editor")
    assert sorted(path.name for path in (folder / "job").iterdir()) == [".prepare.json", "frame.png"]
    assert np.array_equal(read_image(folder / "job" / "frame.png"), read_image(folder / "source" / "00000.png"))
    lines = prepare(request(folder, edited={0: folder / "edited.png"}, caption='a "red" disc', edited_caption="a blue disc"))
    assert not [line for line in lines if line.startswith("note")]
    job = load_job(folder / "job" / "job.toml", Grid())
    _, shapes = clip_of("translating")
    assert ((job.grey_mask == 255) & shapes).sum() > 0.99 * shapes.sum()
    assert set(np.unique(job.grey_mask)) == {0, 255}
    assert (job.caption, job.first_edit.caption) == ('a "red" disc', "a blue disc")
    assert np.array_equal(job.first_edit.image, read_image(folder / "edited.png"))
    found = {path.name for path in (folder / "job").iterdir()}
    assert {"preview.mp4", "preview.png", "mask", "frame.png", "job.toml", "edit.toml"} <= found


def test_a_picture_that_an_image_model_gave_another_size_shows_the_same_region(folder):
    prepare(request(folder, edited={0: folder / "edited.png"}))
    whole = job_of(folder).grey_mask.astype(int)
    smaller = cv2.resize(read_image(folder / "edited.png"), (144, 146), interpolation=cv2.INTER_AREA)
    write_png(folder / "smaller.png", smaller)
    shutil.rmtree(folder / "job")
    lines = prepare(request(folder, edited={0: folder / "smaller.png"}))
    assert "note      smaller.png: scaled from 144x146 to 192x192" in lines
    assert np.abs(job_of(folder).grey_mask - whole).mean() < 0.02 * 255


def test_a_picture_that_an_image_model_put_off_is_brought_into_line(folder):
    """As it was, much of what was not edited would count as edited."""
    photographs = cv2.resize(read_image(ATLAS_PATH), (192, 192), interpolation=cv2.INTER_AREA)
    video = np.repeat(photographs[None], 13, axis=0)
    write_images(folder / "source", video)
    edited = video[0].copy()
    edited[60:120, 60:120] = (255, 0, 255)
    off = cv2.warpAffine(edited, np.array([[1.02, 0, -2], [0, 1.02, -3]]), (192, 192), borderMode=cv2.BORDER_REFLECT)
    write_png(folder / "off.png", off)
    lines = prepare(request(folder, edited={0: folder / "off.png"}))
    assert any(line.startswith("note      off.png: what it shows lies up to 3.") for line in lines)
    aligned = folder / "job" / "aligned_00000.png"
    assert f"wrote     {aligned}" in lines
    assert job_of(folder).first_edit.path.resolve() == aligned.resolve()
    left, top, width, height = box_of(changed(video[0], read_image(aligned)))
    assert np.allclose((left, top, left + width, top + height), (60, 60, 120, 120), atol=3)
    again = prepare(request(folder, edited={0: folder / "off.png"}))
    assert not [line for line in again if line.startswith("kept      aligned")]


def test_a_job_with_a_hand_written_every_is_not_given_the_masks_of_other_frames(folder):
    prepare(request(folder, boxes=box_at(0), frames=5))
    job = folder / "job" / "job.toml"
    job.write_text("every = 2\n" + job.read_text())
    with pytest.raises(UserError, match="every = 2; this call asks for 1"):
        prepare(request(folder, boxes=box_at(0), frames=5))
    prepare(request(folder, boxes=box_at(0), frames=5, every=2))


def test_every_other_frame_is_tracked_and_its_masks_are_those_that_the_job_reads(folder):
    prepare(request(folder, boxes=box_at(1), start=1, every=2, frames=5))
    job = job_of(folder)
    assert (job.start, job.every, len(job.frames)) == (1, 2, 5)
    masks = [read_image(folder / "job" / "mask" / f"{index:05d}.png")[..., 0] for index in range(13)]
    assert [bool(mask.any()) for mask in masks] == [index in (1, 3, 5, 7, 9) for index in range(13)]
    assert (job.grey_mask == np.stack(masks[1:10:2])).all()


def test_frames_outside_the_clip_have_black_masks_and_the_job_says_which_it_uses(folder):
    box = {0: box_of(clip_of("translating")[1][3])}
    prepare(request(folder, boxes=box, start=3, frames=5))
    grey = np.stack([read_image(path)[..., 0] for path in sorted((folder / "job" / "mask").glob("*.png"))])
    assert len(grey) == 13
    assert [bool(mask.any()) for mask in grey] == [3 <= index < 8 for index in range(13)]
    job = load_job(folder / "job" / "job.toml", Grid())
    assert (job.start, len(job.frames)) == (3, 5)
    assert np.array_equal(job.grey_mask, grey[3:8])


def test_a_mask_of_everything_is_told(folder):
    edited = {0: folder / "edited.png"}
    for margin, told in ((0.1, False), (50, True), (1e9, True)):
        lines = prepare(request(folder, edited=edited, margin=margin))
        assert any("marks all of every frame: nothing is left to preserve" in line for line in lines) == told


def test_what_reading_the_clip_found_is_told_before_a_frame_is_edited(folder):
    (folder / "source" / "00012.png").rename(folder / "source" / "00020.png")
    (note,) = [line for line in prepare(request(folder)) if line.startswith("note")]
    assert "source: " in note
    assert "11" in note
    assert "20" in note


def test_weights_that_are_not_there_are_told(folder):
    for ckpt, told in ((folder, False), (folder / "typo", True)):
        lines = prepare(request(folder, edited={0: folder / "edited.png"}, ckpt=ckpt))
        assert any(f"--ckpt {folder / 'typo'}: no such folder on this machine" in line for line in lines) == told


def test_a_caption_of_any_characters_is_read_back(folder):
    caption = "a \x7f\x1f\x80 \"b\" \\ 'c'\t\u2028d"
    assert tomllib.loads(job_toml(request(folder, caption=caption), 13))["caption"] == caption


def test_a_link_keeps_the_name_that_says_what_it_is(folder):
    (folder / "edited.png").rename(folder / "8f14e45f")
    (folder / "edited.png").symlink_to("8f14e45f")
    prepare(request(folder, edited={0: folder / "edited.png"}))
    assert job_of(folder).first_edit.path.name == "edited.png"


def test_an_edit_beyond_the_region_is_told(folder):
    left, top, width, height = box_of(clip_of("translating")[1][0])
    lines = prepare(request(folder, edited={0: folder / "edited.png"}, boxes={0: (left, top, width // 3, height)}))
    assert any("outside the mask" in line for line in lines)


def test_a_region_that_leaves_the_picture_is_told(folder):
    still = clip_of("translating")[0][0]
    wide = np.hstack([still, still[:, ::-1]])
    write_images(folder / "source", np.stack([wide[:, 12 * index : 12 * index + 192] for index in range(9)]))
    lines = prepare(request(folder, boxes={0: (12, 60, 40, 40)}))
    assert any("nothing is marked in frames 5-8: the region has left the picture" in line for line in lines), "\n".join(lines)


def job_of(folder: Path) -> EditJob:
    return load_job(folder / "job" / "job.toml", Grid())


def paint_over(folder: Path, name: str, value: int = 255) -> bytes:
    """What a person does to a picture of the job's folder; returns its bytes."""
    path = folder / "job" / name
    write_png(path, np.full_like(read_image(path), value))
    return path.read_bytes()


def box_at(frame: int = 0) -> dict[int, Box]:
    return {0: box_of(clip_of("translating")[1][frame])}


def test_the_same_call_with_more_writes_the_job_anew(folder):
    """What the first call advises: the edited picture and the captions of the second one are in the job."""
    lines = prepare(request(folder, boxes=box_at()))
    assert "run the same command with --edited PICTURE" in lines[-1]
    prepare(request(folder, boxes=box_at(), edited={0: folder / "edited.png"}, caption="a disc", edited_caption="a square"))
    assert job_of(folder).caption == "a disc"
    assert job_of(folder).first_edit.caption == "a square"
    lines = prepare(request(folder, boxes=box_at(6), start=6, frames=5, caption="a disc"))
    assert (job_of(folder).start, len(job_of(folder).frames), job_of(folder).edited_frames) == (6, 5, ())
    assert any(line.startswith("note") and "no longer has edited_caption, edited frame 0" in line for line in lines), lines


def test_a_job_that_a_person_edited_is_refused_where_it_contradicts_the_call(folder):
    prepare(request(folder, boxes=box_at()))
    path = folder / "job" / "job.toml"
    path.write_text(path.read_text().replace("frames = 13", "frames = 9") + 'size = [96, 96]\ncaption = "mine"\n')
    before = {file: file.read_bytes() for file in (folder / "job").rglob("*") if file.is_file()}
    with pytest.raises(UserError) as caught:
        prepare(request(folder, boxes=box_at(3), start=4, frames=5, caption="theirs", edited={4: folder / "edited.png"}))
    told = str(caught.value)
    for words in ("job.toml", "start = 0; this call asks for 4", "frames = 9; this call asks for 5", "remove the file",
                  'caption = "mine"; this call asks for "theirs"', 'image = "../edited.png", frame = 4'):  # fmt: skip
        assert words in told
    assert "source" not in told
    assert "size" not in told
    assert before == {file: file.read_bytes() for file in (folder / "job").rglob("*") if file.is_file()}


def test_a_job_that_a_person_added_to_is_kept_where_it_says_what_the_call_asks_for(folder):
    """Also one that prepare never wrote, and whatever way its paths are spelled."""
    (folder / "job").mkdir()
    text = 'frames = 13\nsource = "../job/../source"\nmask = "./mask"\ncaption = "mine"\n'
    text += '[[edited_frame]]\nimage = "../edited.png"\nframe = 0\n'
    (folder / "job" / "job.toml").write_text(text)
    lines = prepare(request(folder, edited={0: folder / "edited.png"}))
    assert f"kept      {folder / 'job' / 'job.toml'}, which is there already" in lines
    assert (folder / "job" / "job.toml").read_text() == text
    assert job_of(folder).caption == "mine"


def test_what_a_person_painted_is_kept_shown_and_told_unless_it_may_be_overwritten(folder):
    asked = request(folder, edited={0: folder / "edited.png"})
    prepare(asked)
    preview = (folder / "job" / "preview.png").read_bytes()
    painted = {name: paint_over(folder, name) for name in ("mask/00003.png", "frame.png")}
    lines = prepare(replace(asked, margin=0.3))
    assert "kept      frame.png, mask/00003.png as changed by hand; --overwrite writes them anew" in lines
    assert painted == {name: (folder / "job" / name).read_bytes() for name in painted}
    assert (job_of(folder).grey_mask[3] == 255).all()
    assert (folder / "job" / "preview.png").read_bytes() != preview
    assert any("to 100.0 %" in line for line in lines)
    lines = prepare(replace(asked, overwrite=True))
    assert not any("by hand" in line for line in lines)
    assert (folder / "job" / "preview.png").read_bytes() == preview
    assert not (job_of(folder).grey_mask[3] == 255).all()


def test_a_frame_that_was_edited_in_place_is_the_edited_frame(folder):
    """Also where pictures may be overwritten: it is what the call reads."""
    prepare(request(folder))
    path = folder / "job" / "frame.png"
    path.write_bytes((folder / "edited.png").read_bytes())
    for overwrite in (False, True):
        prepare(request(folder, edited={0: path}, overwrite=overwrite))
        assert path.read_bytes() == (folder / "edited.png").read_bytes()
        assert np.array_equal(job_of(folder).first_edit.image, read_image(folder / "edited.png"))


def test_masks_of_a_longer_source_go_and_a_strange_picture_is_told(folder):
    prepare(request(folder, boxes=box_at(), frames=5))
    (folder / "source" / "00012.png").unlink()
    prepare(request(folder, boxes=box_at(), frames=5))
    assert len(list((folder / "job" / "mask").iterdir())) == 12
    (folder / "source" / "00011.png").unlink()
    painted = paint_over(folder, "mask/00011.png")
    with pytest.raises(UserError, match=r"00011\.png: is no mask of source, which has 11 frames"):
        prepare(request(folder, boxes=box_at(), frames=5, overwrite=True))
    assert (folder / "job" / "mask" / "00011.png").read_bytes() == painted


def test_a_call_that_ends_early_does_not_take_its_own_files_for_a_persons(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("loraedit_ext.prepare.job._write_previews", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(request(folder, boxes=box_at()))
    monkeypatch.undo()
    assert not [line for line in prepare(request(folder, boxes=box_at(2), margin=0.3)) if line.startswith("kept")]


def test_a_damaged_record_is_told(folder):
    prepare(request(folder))
    (folder / "job" / ".prepare.json").write_text("{")
    with pytest.raises(UserError, match=r"\.prepare\.json: could not be read .* Remove it"):
        prepare(request(folder))


@pytest.mark.parametrize("out", ["edited.png", "edited.png/job"])
def test_a_folder_that_cannot_be_made_is_told(folder, out):
    for boxes in ({}, box_at()):
        with pytest.raises(UserError, match=r"edited\.png.*: this folder cannot be made .* Choose another --out"):
            prepare(Request(folder / "source", folder / out, boxes=boxes))


def test_later_frames_are_written_edited_and_shown(folder):
    """Each edited picture also tells where the edit is in its frame."""
    video, shapes = clip_of("translating")
    lines = prepare(request(folder, pictures=(12, 0, 5)))
    assert {path.name for path in (folder / "job").glob("*.png")} == {"frame.png", "frame_00005.png", "frame_00012.png"}
    assert np.array_equal(read_image(folder / "job" / "frame_00012.png"), video[12])
    assert "--edited N:PICTURE" in lines[-2]
    later = video[12].copy()
    later[shapes[12]] = 255 - later[shapes[12]]
    write_png(folder / "later.png", later)
    lines = prepare(request(folder, edited={12: folder / "later.png", 0: folder / "edited.png"}))
    assert [line.split(":")[0] for line in lines if line.startswith("region")] == ["region    frame 0", "region    frame 12"]
    job = job_of(folder)
    assert not any("--edited N:PICTURE" in line for line in lines)
    assert [edited.index for edited in job.edited_frames] == [0, 12]
    assert np.array_equal(job.edited_frames[1].image, later)
    assert ((job.grey_mask == 255) & shapes).sum() > 0.99 * shapes.sum()
    lines = prepare(request(folder, boxes=box_at(), edited={12: folder / "edited.png", 0: folder / "edited.png"}))
    assert any("the edited picture of frame 12 changes is outside the mask" in line for line in lines)


def test_a_run_is_written_beside_the_job_with_the_commands_that_use_it(folder, monkeypatch):
    monkeypatch.chdir(folder)
    asked = request(folder, edited={0: folder / "edited.png"}, caption="a", edited_caption="b")
    lines = prepare(asked)
    config = folder / "job" / "edit.toml"
    assert any("fill in ckpt_path" in line for line in lines)
    assert load_config(config).model.ckpt_path is None
    lines = prepare(replace(asked, ckpt=Path("weights"), model="hunyuan-video"))
    assert [line.split()[1:] for line in lines[-3:]] == [
        [str(ROOT / "train.py"), "--config", str(config), "--dry_run"], [str(ROOT / "train.py"), "--config", str(config)],
        [str(ROOT / "inference.py"), "--config", str(config)],
    ]  # fmt: skip
    assert not any("fill in" in line for line in lines)
    run = load_config(config)
    assert (run.model.type, run.model.ckpt_path) == ("hunyuan-video", folder / "weights")
    assert (run.output_dir, run.dataset) == (folder / "job" / "runs", folder / "job" / "job.toml")
    text = config.read_text()
    prepare(asked)
    assert config.read_text() == text, "a call that does not name the model leaves the run alone"


def test_the_lines_for_a_card_of_24_gb_are_keys_of_the_run(folder):
    prepare(request(folder, edited={0: folder / "edited.png"}, ckpt=Path("/weights")))
    config = folder / "job" / "edit.toml"
    assert load_config(config).model.ckpt_path == Path("/weights")
    config.write_text(re.sub(r"^# (\w+ = )", r"\1", config.read_text(), flags=re.MULTILINE))
    run = load_config(config)
    assert (run.activation_checkpointing, run.blocks_to_swap, run.model.transformer_dtype) == ("offload", 4, "float8")


def test_a_run_that_a_person_edited_is_kept_or_refused(folder):
    asked = request(folder, edited={0: folder / "edited.png"}, ckpt=Path("/weights"))
    prepare(asked)
    config = folder / "job" / "edit.toml"
    config.write_text("seed = 7\n" + config.read_text())
    prepare(asked)
    assert config.read_text().startswith("seed = 7\n")
    with pytest.raises(UserError) as caught:
        prepare(replace(asked, ckpt=Path("/others"), model="hunyuan-video"))
    assert 'model.type = "wan"; this call asks for "hunyuan-video"' in str(caught.value)
    assert 'model.ckpt_path = "/weights"; this call asks for "/others"' in str(caught.value)


def test_the_readme_shows_what_is_written():
    """The job to the letter, the run but for its comments."""
    asked = Request(Path("clip.mp4"), Path("jobs/helmet"), edited={0: Path("jobs/helmet/edited.png")},
                    caption="an old man exercising in a park", ckpt=Path("/models/Wan2.1-I2V-14B-480P"),
                    edited_caption="an old man with a white helmet exercising in a park")  # fmt: skip
    text = (ROOT / "README.md").read_text()
    assert f"```toml\n{job_toml(asked, 49)}```" in text
    assert "```toml\n" + re.sub(r"^#.*\n", "", edit_toml(asked), flags=re.MULTILINE) + "```" in text


def test_captions_are_asked_for(folder):
    asked = request(folder, edited={0: folder / "edited.png"})
    (line,) = [line for line in prepare(asked) if "no caption" in line]
    assert "in one sentence who or what is seen" in line
    assert '--caption "' in line
    assert '--edited_caption "' in line
    (line,) = [line for line in prepare(replace(asked, caption="a disc")) if "no edited_caption" in line]
    assert "no caption" not in line
    assert not any("caption:" in line for line in prepare(replace(asked, caption="a disc", edited_caption="a square")))


def test_a_region_may_be_painted_in_one_colour_on_a_transparent_layer(folder):
    shape = clip_of("translating")[1][0]
    layer = np.zeros((SIZE, SIZE, 4), np.uint8)
    layer[shape] = (0, 0, 0, 255)
    cv2.imwrite(str(folder / "layer.png"), layer)
    lines = prepare(request(folder, painted={0: folder / "layer.png"}))
    left, top, width, height = box_of(shape)
    assert f"region    frame 0: {width}x{height} at ({left}, {top})" in lines


def test_the_same_call_again_writes_the_same(folder):
    asked = request(folder, edited={0: folder / "edited.png"})
    prepare(asked)
    files = {path: path.read_bytes() for path in (folder / "job" / "mask").iterdir()}
    prepare(asked)
    assert files == {path: path.read_bytes() for path in (folder / "job" / "mask").iterdir()}


@pytest.mark.parametrize(("change", "words"), [
    ({"frames": 6}, "nearest: 5 or 9"),
    ({"frames": 0}, "nearest: 5"),
    ({"frames": 17}, "has 13 frames, 13 from frame 0 on; expected at least 17"),
    ({"start": 10}, "has 13 frames, 3 from frame 10 on; expected at least 5"),
    ({"start": 13}, "expected at least 5"),
    ({"start": -3}, "--start -3: must be 0 or more"),
    ({"every": 0}, "--every 0: must be 1 or more"),
    ({"every": 3, "start": 1}, "has 13 frames, 4 from frame 1 on in steps of 3; expected at least 5"),
    ({"margin": -0.1}, "--margin -0.1: must be 0 or more"),
    ({"pictures": (13,)}, "--frame 13: the clip has frames 0 to 12"),
    ({"boxes": {13: (0, 0, 9, 9)}}, "the clip has frames 0 to 12"),
    ({"boxes": {0: (SIZE, 0, 9, 9)}}, "marks nothing inside the picture of 192x192"),
    ({"painted": {0: Path("black.png")}}, r"black.png: marks nothing \(brightest value 0\)"),
    ({"painted": {0: Path("small.png")}}, "masks are 20x20, expected 192x192"),
    ({"edited": Path("wide.png")}, "is 30x20, expected 192x192 as source, or the same aspect. Crop"),
    ({"edited": Path("source/00000.png")}, "does not differ from frame 0"),
    ({"edited": Path("other.png")}, "does not tell where the edit is"),
    ({"edited": Path("none.png")}, "none.png"),
])  # fmt: skip
def test_what_cannot_be_done_is_told_with_the_cure(folder, change, words):
    write_png(folder / "black.png", np.zeros((SIZE, SIZE, 3), np.uint8))
    write_png(folder / "small.png", np.full((20, 20, 3), 255, np.uint8))
    write_png(folder / "wide.png", np.full((20, 30, 3), 255, np.uint8))
    write_png(folder / "other.png", 255 - read_image(folder / "source" / "00000.png"))
    if "edited" in change:
        change = {"edited": {0: folder / change["edited"]}}
    if "painted" in change:
        change = {"painted": {0: folder / change["painted"][0]}}
    with pytest.raises(UserError, match=words):
        prepare(request(folder, **change))
    assert not (folder / "job").exists()


def test_all_wrong_regions_are_told_at_once(folder):
    wrong = request(folder, boxes={20: (0, 0, 9, 9), 1: (500, 0, 9, 9)})
    with pytest.raises(UserErrors) as caught:
        prepare(replace(wrong, painted={1: folder / "edited.png"}, edited={17: folder / "edited.png"}, pictures=(-1,)))
    assert len(caught.value.messages) == 4


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


@pytest.mark.parametrize("box", ["10,10", "1,2,3", "1,2,3,x", "x:1,2,3,4", "1,2,0,4", "1,2,3,-4"])
def test_a_box_that_is_none_is_refused_before_anything_is_read(box, capsys):
    with pytest.raises(SystemExit) as ended:
        verb.main(["--source", "x", "--out", "y", "--box", box])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert f"--box: {box}: expected four whole numbers" in told or "must be positive" in told


def test_two_regions_or_pictures_for_one_frame_are_told(folder, capsys):
    common = ["--source", str(folder / "source"), "--out", str(folder / "job")]
    assert verb.main([*common, "--box", "1,1,9,9", "--box", "0:2,2,9,9"]) == 2
    assert "--box: given twice for frame 0" in capsys.readouterr().err
    assert verb.main([*common, "--edited", "a.png", "--edited", "b.png"]) == 2
    assert "--edited: given twice for frame 0" in capsys.readouterr().err
