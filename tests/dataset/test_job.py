"""The edit job: what is used and why, and every mistake of a person told at once."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from media_makers import box_masks, cut_short, encode, picture_frames, write_folder, write_picture

from common.errors import UserError, UserErrors
from dataset.job import EditJob, load_job, split_clips
from dataset.resize import Grid
from dataset.schema import EditedFrameSettings, JobSettings
from dataset.video import read_video
from dataset.video_writer import write_lossless, write_video

GRID = Grid()
FRAMES = picture_frames(17)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound job: 17 lossless frames of 64x48 with masks, frames 0 and 8 edited."""
    write_lossless(tmp_path / "source.mkv", FRAMES, 8)
    write_folder(tmp_path / "masks", box_masks(17))
    write_picture(tmp_path / "edit0.png", FRAMES[0] ^ 255)
    write_picture(tmp_path / "edit8.png", FRAMES[8] ^ 255)
    return tmp_path


BASE = """
source = "source.mkv"
mask = "masks"
caption = "a street"
"""
EDITS = """
[[edited_frame]]
image = "edit8.png"
time = 1.04
caption = "a blue street"
[[edited_frame]]
image = "edit0.png"
frame = 0
"""


def load(folder: Path, text: str = BASE + EDITS, grid: Grid = GRID, **overrides: object) -> EditJob:
    path = folder / "street.toml"
    path.write_text(text)
    return load_job(path, grid, overrides)


def error_of(folder: Path, text: str = BASE + EDITS, **overrides: object) -> str:
    with pytest.raises(UserError) as error:
        load(folder, text, **overrides)
    return str(error.value)


def test_a_sound_job(folder):
    job = load(folder, edited_caption="a red street")
    assert (job.name, job.caption, job.trigger) == ("street", "a street", "p3rs0n,")
    assert (job.fps, job.variable_rate, job.size, job.original_size) == (8, False, (64, 48), (64, 48))
    assert (job.frames == FRAMES).all()
    assert (job.grey_mask == box_masks(17)).all()
    assert [edit.index for edit in job.edited_frames] == [0, 8]
    assert [edit.caption for edit in job.edited_frames] == ["a red street", "a blue street"]
    assert (job.first_edit.image == FRAMES[0] ^ 255).all()
    assert job.clips == (range(17),)
    assert job.audio is None
    np.testing.assert_allclose(job.times, np.arange(17) / 8)
    with pytest.raises(ValueError, match="read-only"):
        job.frames[0] = 0


def test_every_choice_is_told(folder):
    told = "\n".join(load(folder, start=2).choices)
    for part in (
        "17 frames of 64x48, constant 8 fps, no audio", "uses 13 frames (2 to 14), the most of the form 4n+1",
        "4 of 17 unused", "works at 64x48 (the source's own)", "marks 6.2 % of the picture",
        "1.04 s is frame 6, shown at 1.0000 s", "edited frame 0 is edit0.png, with the source's caption",
    ):
        assert part in told


def test_defaults_of_the_count(folder):
    assert len(load(folder, BASE).frames) == 17
    assert len(load(folder, BASE, max_frames=12).frames) == 9
    assert len(load(folder, BASE, frames=13).frames) == 13
    assert len(load(folder, BASE, frames=13, max_frames=5).frames) == 13
    assert (load(folder, BASE, start=3, frames=5).frames == FRAMES[3:8]).all()
    assert (load(folder, BASE, start=3, frames=5).times == np.arange(3, 8) / 8).all()


def test_a_job_without_edited_frame_0_can_be_trained_on(folder):
    job = load(folder, BASE)
    assert job.first_edit is None
    assert any("not edited" in choice for choice in job.choices)


def test_one_still_mask_holds_for_all_frames(folder):
    write_picture(folder / "still.png", box_masks(1)[0])
    job = load(folder, mask="still.png")
    assert (job.grey_mask == box_masks(17)).all()


def test_mask_videos_and_grey_values(folder):
    grey = np.repeat((box_masks(17) // 2)[..., None], 3, axis=3)
    write_lossless(folder / "mask.mkv", grey, 8)
    assert (load(folder, mask="mask.mkv").grey_mask == grey[..., 0]).all()
    assert np.unique(grey).tolist() == [0, 127]
    encode(folder / "mask.mp4", np.repeat(box_masks(17)[..., None], 3, axis=3))
    assert ((load(folder, mask="mask.mp4").grey_mask > 127) == (box_masks(17) > 127)).mean() > 0.99


def test_masks_follow_the_frame_range(folder):
    masks = np.zeros((17, 48, 64), np.uint8)
    masks[np.arange(17), np.arange(17)] = 255
    shutil.rmtree(folder / "masks")
    write_folder(folder / "masks", masks)
    assert (load(folder, BASE, start=4, frames=9).grey_mask == masks[4:13]).all()


def test_a_folder_source_has_the_rate_that_it_is_given(folder):
    write_folder(folder / "frames", FRAMES)
    assert load(folder, BASE, source="frames").fps == 16
    job = load(folder, BASE, source="frames", fps=23.976)
    assert job.fps == Fraction(24000, 1001)
    assert (job.frames == FRAMES).all()
    assert "`fps` = 10" in error_of(folder, fps=10)


def test_resizing_and_cropping_are_the_same_for_all(folder):
    job = load(folder, size=[32, 32])
    assert job.frames.shape == (17, 32, 32, 3)
    assert job.grey_mask.shape == (17, 32, 32)
    assert job.crop == (8, 0, 48, 48)
    assert any("cut to 48x48 at (8, 0)" in choice for choice in job.choices)
    difference = job.first_edit.image.astype(int) + job.frames[0]
    assert np.abs(difference - 255).max() <= 1  # the negative of the resized is the resized negative


def test_a_crop_is_worked_on_pixel_by_pixel(folder):
    whole = load(folder)
    job = load(folder, crop=[16, 0, 32, 48])
    assert job.crop == (16, 0, 32, 48)
    assert (job.frames == whole.frames[:, :, 16:48]).all()
    assert (job.grey_mask == whole.grey_mask[:, :, 16:48]).all()
    assert (job.first_edit.image == whole.first_edit.image[:, 16:48]).all()
    assert any("works at 32x48 (the crop's own)" in choice for choice in job.choices)
    assert any("are cut to 32x48 at (16, 0)" in choice for choice in job.choices)
    assert job.identity() != whole.identity()
    assert "reaches beyond source.mkv, which is 64x48" in error_of(folder, crop=[40, 0, 32, 48])


def test_mistakes_are_told_where_a_crop_cannot_be_made_for_them(folder):
    write_picture(folder / "still.png", box_masks(1)[0])
    still = BASE.replace('"masks"', '"still.png"') + EDITS
    assert "must be 4n+1" in error_of(folder, still, frames=10, crop="mask")
    assert "must be 4n+1" in error_of(folder, still, frames=10, size=[96, 96])
    assert "expected at least" in error_of(folder, still, start=100, crop="mask")


def test_a_crop_beside_all_that_the_mask_marks_is_told_as_what_it_is(folder):
    """It was told as an all-black mask, to be painted white."""
    told = error_of(folder, crop=[40, 0, 16, 16])
    assert "`crop` = (40, 0, 16, 16): nothing that mask masks marks lies in 16x16 at (40, 0)" in told


def test_frames_without_a_mask_are_told(folder):
    for index in range(3):
        write_picture(folder / "masks" / f"{index:05d}.png", np.zeros((48, 64), np.uint8))
    assert any("marks nothing in 3 of the 17 used frames" in choice for choice in load(folder, BASE).choices)


def test_a_crop_around_the_mask_holds_all_of_it(folder):
    job = load(folder, grid=Grid(max_area=32 * 32), crop="mask")
    marked = np.argwhere((box_masks(17) > 0).any(0))
    left, top, width, height = job.crop
    assert (marked.min(0) >= (top, left)).all()
    assert (marked.max(0) < (top + height, left + width)).all()
    assert width * height < 64 * 48
    assert not any("lies outside" in choice for choice in job.choices)
    part = load(folder, crop=[0, 0, 18, 48])
    assert any("of what the mask marks lies outside" in choice for choice in part.choices)


def test_an_edited_frame_may_have_the_working_size(folder):
    write_picture(folder / "edit0.png", np.full((32, 32, 3), 7, np.uint8))
    assert (load(folder, size=[32, 32]).first_edit.image == 7).all()


@pytest.mark.parametrize("size", [(128, 96), (48, 36), (96, 73)])
def test_an_edited_frame_of_about_the_aspect_is_scaled(folder, size):
    """Image models give a picture back at a size of their own; it was refused."""
    write_picture(folder / "edit0.png", cv2.resize(FRAMES[0] ^ 255, size, interpolation=cv2.INTER_CUBIC))
    job = load(folder)
    assert np.abs(job.first_edit.image.astype(int) - (FRAMES[0] ^ 255)).mean() < 3
    assert any(f"edit0.png, scaled from {size[0]}x{size[1]}" in choice for choice in job.choices)


def test_clips_share_their_end_frames():
    assert split_clips(49, 13) == (range(13), range(12, 25), range(24, 37), range(36, 49))
    assert split_clips(17, 17) == (range(17),)
    assert split_clips(21, 9) == (range(9), range(8, 17), range(12, 21))
    with pytest.raises(ValueError, match="cannot cover"):
        split_clips(9, 13)


@pytest.mark.parametrize("frames", range(5, 60, 4))
@pytest.mark.parametrize("length", [5, 9, 13])
def test_clips_cover_every_frame(frames, length):
    if length <= frames:
        clips = split_clips(frames, length)
        assert {len(clip) for clip in clips} == {length}
        assert set().union(*clips) == set(range(frames))
        assert all(later.start < earlier.stop for earlier, later in pairwise(clips))


def test_audio_span_of_the_used_frames(folder):
    encode(folder / "source.mp4", FRAMES, rate=8, audio=True)
    job = load(folder, BASE, source="source.mp4", start=4, frames=9)
    assert job.audio.start == pytest.approx(0.5)
    assert job.audio.seconds == pytest.approx(9 / 8)


# every Nth frame


@pytest.fixture
def long(folder: Path) -> Path:
    """The job at 60 frames a second, 50 frames with audio, and a mask that moves."""
    encode(folder / "source.mp4", picture_frames(50), rate=60, audio=True)
    masks = np.zeros((50, 48, 64), np.uint8)
    masks[np.arange(50), :, np.arange(50)] = 255
    write_folder(folder / "moving", masks)
    return folder


STRIDED = BASE.replace("source.mkv", "source.mp4").replace('"masks"', '"moving"') + "start = 2\nevery = 4\n"


def test_every_nth_frame_with_its_mask_rate_and_audio(long):
    job, whole = load(long, STRIDED), load(long, STRIDED, start=0, every=1, frames=49)
    picked = np.arange(2, 50, 4)[:9]
    assert (job.frames == whole.frames[picked]).all()
    assert (job.grey_mask.argmax(2) == picked[:, None]).all()
    assert (job.fps, job.variable_rate) == (15, False)
    np.testing.assert_allclose(job.times, picked / 60, atol=1e-3)
    assert job.audio.start == pytest.approx(2 / 60, abs=1e-3)
    assert job.audio.seconds == pytest.approx(9 / 15, abs=1e-3)
    told = "\n".join(job.choices)
    assert "60 fps, audio; `every` = 4 makes it 15 fps" in told
    assert "uses 9 frames (2 to 34 in steps of `every` = 4), the most of the form 4n+1 there are; 41 of 50 unused" in told
    write_video(long / "result.mp4", job.frames, job.fps, audio_from=job.audio.path, audio_start=job.audio.start,
              audio_seconds=job.audio.seconds)
    result = read_video(long / "result.mp4")
    assert (result.fps, result.total, result.has_audio) == (15, 9, True)
    np.testing.assert_allclose(result.times, job.times - job.times[0], atol=1e-3)


def test_every_nth_frame_of_folders_and_variable_rates(long):
    write_folder(long / "frames", picture_frames(50))
    job = load(long, STRIDED, source="frames", fps=30)
    assert job.fps == Fraction(15, 2)
    assert (job.frames == picture_frames(50)[2:35:4]).all()
    np.testing.assert_allclose(job.times, np.arange(2, 35, 4) / 30)
    ticks = np.cumsum(np.arange(50) % 2 * 20 + 10)
    encode(long / "source.mp4", picture_frames(50), ticks=ticks.tolist())
    job = load(long, STRIDED, every=3)
    assert job.variable_rate
    np.testing.assert_allclose(job.times, (ticks - ticks[0])[2:50:3][: len(job.times)] / 1000, atol=2e-3)


def test_masks_of_the_strided_clip_are_taken_as_they_are(long):
    write_folder(long / "nine", box_masks(9) | np.arange(9, dtype=np.uint8)[:, None, None])
    job = load(long, STRIDED, mask="nine")
    assert job.grey_mask[:, 0, 0].tolist() == list(range(9))
    assert any("nine: 9 masks, one for each used frame" in choice for choice in job.choices)
    assert "has 9 masks, expected 50" in error_of(long, STRIDED, mask="nine", every=1)
    assert "has 9 masks, expected 50, one for each frame of source.mp4, or 5, one for each used" in error_of(
        long, STRIDED, mask="nine", frames=5)


def test_edited_frames_count_the_used_frames_and_time_is_the_sources(long):
    edit = '[[edited_frame]]\nimage = "edit8.png"\n'
    job = load(long, STRIDED + edit + "frame = 3\n" + edit.replace("8", "0") + "time = 0.43\n")
    assert [(frame.index, frame.path.name) for frame in job.edited_frames] == [(3, "edit8.png"), (6, "edit0.png")]
    assert "0.43 s is frame 6 (frame 26 of the source), shown at 0.4333 s" in "\n".join(job.choices)
    assert "for frame 14, but the clip has frames 0 to 8 (counted from `start` in steps of `every`" in error_of(
        long, STRIDED + edit + "frame = 14\n")


def test_a_strided_clip_may_be_too_short(long):
    assert "50 frames, 3 from `start` = 2 on in steps of `every` = 20; expected at least 5" in error_of(long, STRIDED, every=20)


def test_captions_from_files(folder):
    (folder / "words.txt").write_text("  a street\n at night \n", encoding="utf-8")
    job = load(folder, 'source = "source.mkv"\nmask = "masks"\ncaption_file = "words.txt"')
    assert job.caption == "a street at night"


# identity


def test_identity_is_json_and_free_of_names(folder):
    first = load(folder)
    assert json.loads(json.dumps(first.fields()))["size"] == [64, 48]
    (folder / "source.mkv").rename(folder / "b.mkv")
    second = load(folder, source="b.mkv", name="other")
    assert json.dumps(first.identity()) == json.dumps(second.identity())


@pytest.mark.parametrize(
    "overrides",
    [
        {"start": 1}, {"every": 2}, {"frames": 13}, {"size": [32, 32]}, {"caption": "x"}, {"trigger": "y,"},
        {"clip_frames": 9},
    ],
)
def test_identity_follows_fields(folder, overrides):
    assert load(folder, BASE, **overrides).identity() != load(folder, BASE).identity()


def test_identity_follows_bytes_under_the_same_names(folder):
    before = load(folder).identity()
    write_picture(folder / "edit8.png", FRAMES[8])
    edited = load(folder).identity()
    assert edited["clip"] == before["clip"]
    assert edited["edited_frames"][0] == before["edited_frames"][0]
    assert edited["edited_frames"][1] != before["edited_frames"][1]
    write_picture(folder / "masks" / "00016.png", box_masks(1)[0] ^ 255)
    masked = load(folder).identity()
    assert masked["clip"] != edited["clip"]
    whole = load(folder, keep_outside=False).identity()
    assert whole["clip"] == masked["clip"]
    assert whole["edited_frames"] != masked["edited_frames"]
    write_lossless(folder / "source.mkv", FRAMES[::-1].copy(), 8)
    assert load(folder).identity()["clip"]["frames"] != masked["clip"]["frames"]


# mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('sorce = "source.mkv"\n' + BASE, "unknown key `sorce`; did you mean `source`"),
        (BASE + EDITS + 'imgae = "x"', "unknown key `edited_frame.1.imgae`; did you mean `image`"),
        ('mask = "masks"', "missing key `source`"),
        (BASE + 'frames = "many"', "`frames` = 'many'"),
        (BASE + "start = -1", "`start` = -1"),
        (BASE + "size = [64]", "size"),
        (BASE + 'caption_file = "a.txt"', "exclude each other"),
        (BASE + '[[edited_frame]]\nimage = "edit0.png"', "exactly one of `frame`"),
        (BASE + '[[edited_frame]]\nimage = "edit0.png"\nframe = 0\ntime = 0.5', "exactly one of `frame`"),
        ("source = ", "not valid TOML"),
        (BASE + '[edited_frame]\nimage = "edit0.png"\nframe = 0', "one table, expected a list of them: write [[edited_frame]]"),
    ],
)
def test_mistakes_in_the_toml(folder, text, message):
    told = error_of(folder, text)
    assert message in told
    assert "street.toml" in told


@pytest.mark.parametrize("key", ["source", "mask", "image"])
def test_a_home_that_nobody_has(folder, key):
    text = re.sub(f'{key} = "[^"]*"', f'{key} = "~nobody-of-this-name/x.png"', BASE + EDITS)
    assert "~nobody-of-this-name/x.png: no such home folder" in error_of(folder, text)


def test_a_byte_order_mark_as_some_editors_write_it_says_nothing(folder):
    text = BASE.replace('caption = "a street"', 'caption_file = "words.txt"')
    (folder / "street.toml").write_text(text, encoding="utf-8-sig")
    (folder / "words.txt").write_text("a street", encoding="utf-8-sig")
    assert load_job(folder / "street.toml", GRID).caption == "a street"


def test_missing_toml(tmp_path):
    with pytest.raises(UserError, match=r"gone\.toml: no such file"):
        load_job(tmp_path / "gone.toml", GRID)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"source": "gone.mp4"}, "gone.mp4: no such file"),
        ({"mask": "gone"}, "gone: no such file"),
        ({"mask": "gone.png"}, "gone.png: could not be read"),
        ({"source": "edit0.png"}, "is one picture"),
        ({"frames": 21}, "has 17 frames, 17 from `start` = 0 on; expected at least 21; at most 17"),
        ({"start": 15}, "2 from `start` = 15 on; expected at least 5; too few"),
        ({"start": 99}, "0 from `start` = 99"),
        ({"frames": 12}, "`frames` = 12: must be 4n+1 with n >= 1; nearest: 9 or 13"),
        ({"frames": 1}, "nearest: 5"),
        ({"max_frames": 4}, "`max_frames` = 4"),
        ({"clip_frames": 12}, "`clip_frames` = 12: must be 4n+1"),
        ({"clip_frames": 21}, "`clip_frames` = 21: the clip has 17 frames"),
        ({"size": [60, 48]}, "multiples of 16; nearest: [48, 48] or [64, 48]"),
        ({"frames": 5}, "edit8.png is for 1.04 s, but the clip goes from 0.000 to 0.500 s"),
        ({"caption": None, "caption_file": "gone.txt"}, "gone.txt: could not be read"),
    ],
)
def test_mistakes_about_media(folder, overrides, message):
    assert message in error_of(folder, **overrides)


@pytest.mark.parametrize(("count", "found"), [(16, "has 16 masks"), (18, "has 18 masks"), (1, "has 1 masks")])
def test_masks_of_another_count(folder, count, found):
    shutil.rmtree(folder / "masks")
    write_folder(folder / "masks", box_masks(count))
    told = error_of(folder)
    assert found in told
    assert "expected 17" in told


def test_masks_of_another_size_are_never_stretched(folder):
    shutil.rmtree(folder / "masks")
    write_folder(folder / "masks", box_masks(17, 128, 96))
    assert "masks are 128x96, expected 64x48" in error_of(folder)
    assert "masks are 128x96, expected 64x48" in error_of(folder, mask="masks/00000.png")


def test_coloured_masks_are_refused(folder):
    write_picture(folder / "red.png", np.full((48, 64, 3), (255, 0, 0), np.uint8))
    assert "mask 0 is coloured" in error_of(folder, mask="red.png")


def layer(shape: np.ndarray, colour: int | tuple[int, ...], under: int = 0) -> np.ndarray:
    """BGRA: a shape painted on a transparent layer, as image editors export it."""
    picture = np.full((*shape.shape, 4), under, np.uint8)
    picture[..., :3][shape > 0] = colour
    picture[..., 3] = shape
    return picture


@pytest.mark.parametrize(("colour", "under"), [(255, 0), (0, 255), (0, 0), ((20, 30, 220), 0)])
def test_a_shape_painted_on_a_transparent_layer_is_the_mask(folder, colour, under):
    """In any one colour, with soft edges, whatever the file has under what is transparent; in a folder and as a still."""
    shapes = box_masks(17)
    shapes[:, 11, 16:32] = 100
    assert cv2.imwrite(str(folder / "still.png"), layer(shapes[0], colour, under))
    assert (load(folder, mask="still.png").grey_mask == shapes).all()
    for index, shape in enumerate(shapes):
        cv2.imwrite(str(folder / "masks" / f"{index:05d}.png"), layer(shape, colour, under))
    assert (load(folder).grey_mask == shapes).all()


def test_a_transparent_mask_of_several_colours_is_refused(folder):
    picture = layer(box_masks(1)[0], 255)
    picture[12:18, 16:32, :3] = 0
    cv2.imwrite(str(folder / "still.png"), picture)
    told = error_of(folder, mask="still.png")
    assert "still.png: has transparent pixels and several colours" in told
    assert "white on black without transparency" in told


def test_a_job_without_a_caption_is_told_what_one_says(folder):
    choices = load(folder, BASE.replace("caption", "# caption")).choices
    assert any("in one sentence who or what is seen" in choice for choice in choices)


def test_an_edited_frame_of_another_size(folder):
    write_picture(folder / "edit0.png", np.zeros((50, 64, 3), np.uint8))
    assert "edit0.png: edited frame is 64x50, expected 64x48 or 32x32, or the same aspect" in error_of(folder, size=[32, 32])


def test_an_index_outside_the_clip_and_a_double_one(folder):
    text = BASE + '[[edited_frame]]\nimage = "edit0.png"\nframe = 17\n'
    assert "edit0.png is for frame 17, but the clip has frames 0 to 16" in error_of(folder, text)
    text = BASE + EDITS + '[[edited_frame]]\nimage = "edit8.png"\nframe = 0\n'
    assert "edit8.png and edit0.png both edit frame 0" in error_of(folder, text)


@pytest.mark.parametrize("name", ["source", "mask"])
def test_truncated_video(folder, name):
    path = encode(folder / f"{name}.mp4", FRAMES)
    cut_short(path, 0.7).replace(path)
    assert f"{name}.mp4: truncated" in error_of(folder, **{name: f"{name}.mp4"})


def test_unreadable_edited_frame(folder):
    (folder / "edit0.png").write_bytes(b"no picture")
    assert "edit0.png: is unreadable or truncated" in error_of(folder)
    (folder / "edit0.png").unlink()
    assert "edit0.png: could not be read" in error_of(folder)


def test_all_mistakes_come_together(folder):
    (folder / "edit8.png").unlink()
    write_picture(folder / "edit0.png", np.zeros((50, 64, 3), np.uint8))
    write_folder(folder / "few", box_masks(3, 32, 48))
    with pytest.raises(UserErrors) as error:
        load(folder, size=[60, 48], clip_frames=6, mask="few")
    told = error.value.messages
    assert len(told) == 6
    for part in ("`size`", "`clip_frames`", "has 3 masks", "masks are 32x48", "edit8.png", "edit0.png"):
        assert any(part in message for message in told), part


def test_a_bad_source_does_not_hide_other_mistakes(folder):
    (folder / "edit8.png").unlink()
    told = error_of(folder, source="gone.mp4", mask="also_gone.mp4")
    assert all(name in told for name in ("gone.mp4", "also_gone.mp4", "edit8.png"))


def test_every_setting_is_documented():
    for kind in (JobSettings, EditedFrameSettings):
        assert all(field.description for field in kind.model_fields.values())
