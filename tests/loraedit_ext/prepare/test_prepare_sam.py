"""SAM 2 follows what prepare.py is told of: prompts, both directions, the edit beyond the object; random weights alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.sam2_video.configuration_sam2_video import Sam2VideoConfig
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession, Sam2VideoModel
from transformers.models.sam2_video.processing_sam2_video import Sam2VideoProcessor

import prepare as verb
from common.errors import UserError, UserErrors
from dataset.images import read_image, write_png
from dataset.job import load_job
from dataset.resize import Grid, box_around
from dataset.video_writer import write_images
from loraedit_ext.difference import changed
from loraedit_ext.prepare.draft import Draft, Drawn
from loraedit_ext.prepare.given import read_clip, read_given
from loraedit_ext.prepare.job import _follower, prepare
from loraedit_ext.prepare.outlines import track_of
from loraedit_ext.prepare.prompts import Prompt, prompts_of
from loraedit_ext.prepare.regions import filled, from_box, from_picture, widened
from loraedit_ext.prepare.request import Request, grouped
from loraedit_ext.prepare.sam import Sam2
from tests.loraedit_ext.prepare.test_page import NOTHING

ROOT = Path(__file__).parents[3]
SIDE, HEIGHT, WIDTH = 64, 48, 80
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
SIZE = (HEIGHT, WIDTH)
PROMPTS = {
    2: Prompt(box=(10, 8, 30, 20), background=((70, 40),)),
    5: Prompt(clicks=((20, 30), (24, 31)), background=((3, 4),)),
}


def tiny_config() -> Sam2VideoConfig:
    """As small as the classes allow."""
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [SIDE, SIDE], "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 1, 1], "global_attention_blocks": [3],
    }  # fmt: skip
    return Sam2VideoConfig(
        image_size=SIDE, initializer_range=0.2, memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[4, 4], memory_encoder_hidden_size=128,
        mask_downsampler_embed_dim=128, memory_fuser_num_layers=1, memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=32,
        vision_config={
            "model_type": "sam2_vision_model", "backbone_config": backbone, "fpn_hidden_size": 128,
            "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        prompt_encoder_config={"hidden_size": 128, "image_size": SIDE, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip


@pytest.fixture(scope="session")
def tiny_sam(tmp_path_factory) -> Path:
    """A random checkpoint in transformers' layout, that sees an object everywhere."""
    folder = tmp_path_factory.mktemp("sam") / "tiny"
    torch.manual_seed(1)
    model = Sam2VideoModel(tiny_config())
    torch.nn.init.constant_(model.mask_decoder.pred_obj_score_head.proj_out.bias, 100.0)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    return folder


@pytest.fixture
def copied(tiny_sam, tmp_path) -> Path:
    """A copy of it, to be spoilt."""
    return Path(shutil.copytree(tiny_sam, tmp_path / "copied"))


@pytest.fixture(scope="session")
def sam(tiny_sam) -> Sam2:
    return Sam2(tiny_sam)


def change_weight(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Another value of one tensor, or none."""
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name: value}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def blind(folder: Path) -> Path:
    """Weights that see no object anywhere, but where a painted shape says so."""
    change_weight(folder, "mask_decoder.pred_obj_score_head.proj_out.bias", torch.tensor([-100.0]))
    return folder


def clip(frames: int = 7) -> np.ndarray:
    """Smooth noise, uint8 (F, H, W, 3)."""
    small = np.random.default_rng(0).integers(0, 256, (frames, 6, 10, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(frame).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)) for frame in small])


def disc(x: float, y: float, radius: float) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def box(left: int, top: int, width: int, height: int) -> np.ndarray:
    return from_box((left, top, width, height), SIZE).shape


def direct(sam: Sam2, frames: np.ndarray, prompts: dict[int, Prompt]) -> np.ndarray:
    """The same by the library's own processor, without its picture part, which needs torchvision, and its own iterator."""
    processor = Sam2VideoProcessor.__new__(Sam2VideoProcessor)
    processor.target_size, processor.point_pad_value = SIDE, -10
    pictures = torch.from_numpy(frames).movedim(-1, 1).float() / 255
    pictures = torch.nn.functional.interpolate(pictures, (SIDE, SIDE), mode="bilinear", antialias=True)
    pictures = (pictures - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    session = Sam2VideoInferenceSession(pictures, HEIGHT, WIDTH, dtype=torch.float32)
    for frame, prompt in sorted(prompts.items()):
        told = {"input_masks": prompt.shape}
        if prompt.shape is None:
            points = [list(map(float, point)) for point in (*prompt.clicks, *prompt.background)]
            labels = [1] * len(prompt.clicks) + [0] * len(prompt.background)
            told = {"input_points": [[points]], "input_labels": [[labels]]}
        if prompt.box is not None:
            left, top, width, height = prompt.box
            told["input_boxes"] = [[[float(left), float(top), float(left + width - 1), float(top + height - 1)]]]
        processor.add_inputs_to_inference_session(session, frame, 7, **told)
        sam.model(session, frame_idx=frame)
    found = np.zeros(frames.shape[:3], bool)
    for reverse in (False, True):
        for output in sam.model.propagate_in_video_iterator(session, start_frame_idx=min(prompts), reverse=reverse):
            logits = torch.nn.functional.interpolate(output.pred_masks, SIZE, mode="bilinear")
            found[output.frame_idx] = (logits[0, 0] > 0).numpy()
    return found


def test_it_does_what_transformers_own_processor_and_iterator_do(sam):
    outlines = sam.outlines(clip(), PROMPTS)
    assert outlines.shape == (7, HEIGHT, WIDTH)
    assert outlines.dtype == bool
    assert np.array_equal(outlines, direct(sam, clip(), PROMPTS))
    assert np.array_equal(outlines, sam.outlines(clip(), PROMPTS)), "and again the same"


def test_the_weights_of_these_tests_tell_frames_prompts_and_directions_apart(sam):
    """Else the comparison above would prove nothing."""
    outlines = sam.outlines(clip(), PROMPTS)
    assert all(0.02 < outline.mean() < 0.98 for outline in outlines)
    assert not any(np.array_equal(outline, other) for outline, other in pairwise(outlines))
    moved = PROMPTS | {2: replace(PROMPTS[2], box=(40, 8, 30, 20))}
    assert not np.array_equal(sam.outlines(clip(), moved)[2], outlines[2])
    for gone in PROMPTS:
        alone = sam.outlines(clip(), {frame: prompt for frame, prompt in PROMPTS.items() if frame != gone})
        assert not any(np.array_equal(alone[frame], outlines[frame]) for frame in (0, gone, 6)), "memory reaches both ends"


def test_a_painted_shape_is_kept_in_its_frame_and_told_to_the_model(sam):
    shape = disc(60, 12, 9)
    outlines = sam.outlines(clip(), {3: Prompt(shape=shape)})
    assert np.array_equal(outlines[3], shape)
    expected = direct(sam, clip(), {3: Prompt(shape=shape)})
    assert np.array_equal(np.delete(outlines, 3, 0), np.delete(expected, 3, 0))
    assert (expected[3] & shape).sum() > 0.8 * (expected[3] | shape).sum(), "the library sees it where it is, not transposed"


def test_pictures_are_squared_and_normalised_as_the_checkpoint_says(sam):
    """Against Pillow's bilinear filter, which smooths when it makes smaller as the library's does."""
    picture = clip()[0]
    given = sam._session(clip()).get_frame(0)
    expected = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR)) / 255
    expected = (expected - MEAN) / STD
    assert given.shape == (3, SIDE, SIDE)
    assert np.abs(given.movedim(0, -1).numpy() - expected).max() < 0.02


def test_a_found_edit_is_a_box_which_clicks_replace_and_a_drawn_one_keeps():
    regions = {0: from_box((10, 8, 30, 20), SIZE)}
    found = Request(Path("s"), Path("o"), sam=Path("m"))
    assert (prompts_of(found, regions)[0].box, prompts_of(found, regions)[0].clicks) == ((10, 8, 30, 20), ())
    clicked = replace(found, clicks={0: ((5, 6),)}, background={0: ((1, 2),)})
    assert (prompts_of(clicked, regions)[0].box, prompts_of(clicked, regions)[0].clicks) == (None, ((5, 6),))
    drawn = prompts_of(replace(clicked, boxes={0: (10, 8, 30, 20)}), regions)[0]
    assert (drawn.box, drawn.clicks, drawn.background) == ((10, 8, 30, 20), ((5, 6),), ((1, 2),))
    shape = disc(20, 20, 9)
    painted = prompts_of(replace(found, painted={0: Path("p.png")}), {0: from_picture(shape)})[0]
    assert (painted.shape is shape, painted.box) == (True, None)


def test_clicks_that_say_nothing_or_contradict_a_painted_shape_are_told_together():
    asked = Request(Path("s"), Path("o"), sam=Path("m"), painted={1: Path("p.png")})
    asked = replace(asked, clicks={1: ((5, 6),)}, background={4: ((1, 2),)})
    with pytest.raises(UserErrors) as caught:
        prompts_of(asked, {1: from_picture(disc(20, 20, 9))})
    assert "frame 1: has a painted region and clicks" in str(caught.value)
    assert "Add --click 4:X,Y" in str(caught.value)


def test_a_hat_goes_with_the_head_by_shift_and_size():
    """The head is the object, the hat the edit: on, and well above the head."""
    heads = np.stack([disc(20, 30, 8), disc(45, 26, 8), np.zeros(SIZE, bool), disc(50, 28, 4)])
    hat = box(16, 4, 9, 22)
    tracked = track_of(heads, [0], {0: hat})
    assert np.array_equal(tracked.shapes[0], heads[0] | hat)
    beyond = hat & ~widened(heads[0], 0.0)
    assert box_around(beyond) == (16, 4, 9, 10)
    assert np.array_equal(tracked.shapes[1], heads[1] | np.roll(beyond, (-4, 25), (0, 1)))
    assert not tracked.shapes[2].any()
    assert np.allclose(box_around(tracked.shapes[3] & ~heads[3]), (50 - 4 / 2, 28 - 26 / 2, 9 / 2, 10 / 2), atol=0.6)
    assert np.array_equal(tracked.shapes & heads, heads)


def test_an_edit_of_the_object_itself_leaves_exact_outlines():
    """What the margin holds anyway is not dragged along."""
    outlines = np.stack([disc(20, 24, 9), disc(50, 24, 9) & ~box(50, 0, 30, 48)])
    tracked = track_of(outlines, [0], {0: disc(20, 24, 11)})
    assert np.array_equal(tracked.shapes[0], disc(20, 24, 11))
    assert np.array_equal(tracked.shapes[1], outlines[1])


def test_each_frame_has_the_edit_that_is_nearest():
    outlines = np.stack([disc(40, 30, 8)] * 5)
    small, large = box(38, 6, 4, 8), box(30, 2, 20, 12)
    shapes = track_of(outlines, [0, 4], {0: small, 4: large}).shapes
    assert [box_around(shape & ~outlines[0])[2] for shape in shapes] == [4, 4, 4, 20, 20]


def test_outlines_that_change_at_once_are_doubtful_seen_from_the_first_prompt():
    radii = [4, 12, 12, 12, 0, 12, 12]
    outlines = np.stack([disc(40, 24, radius) if radius else np.zeros(SIZE, bool) for radius in radii])
    tracked = track_of(outlines, [2], {})
    assert np.array_equal(tracked.shapes, outlines)
    assert tracked.doubtful() == [0, 5]
    assert tracked.agreement[[1, 2, 3, 6]].tolist() == [1, 1, 1, 1]
    assert track_of(outlines, [2, 5], {}).doubtful() == [0], "what was asked for is not doubted"


def test_holes_are_filled():
    ring = disc(40, 24, 12) & ~disc(40, 24, 6)
    assert np.array_equal(filled(ring | box(2, 2, 5, 5)), disc(40, 24, 12) | box(2, 2, 5, 5))


@pytest.fixture
def folder(tmp_path) -> Path:
    """A source of nine frames, and the first with a disc of it edited."""
    write_images(tmp_path / "source", clip(9))
    edited = clip(9)[0].copy()
    edited[disc(30, 20, 9)] = 255 - edited[disc(30, 20, 9)]
    write_png(tmp_path / "edited.png", edited)
    return tmp_path


def asked(folder: Path, sam: Path, **more) -> Request:
    return Request(folder / "source", folder / "job", sam=sam, **more)


def masks_of(folder: Path) -> np.ndarray:
    return load_job(folder / "job" / "job.toml", Grid()).grey_mask == 255


def test_masks_are_the_outlines_with_their_margin(folder, tiny_sam, sam):
    lines = prepare(asked(folder, tiny_sam, clicks={4: ((30, 20), (31, 21))}, background={4: ((2, 3),)}, margin=0.0))
    outlines = sam.outlines(clip(9), {4: Prompt(clicks=((30, 20), (31, 21)), background=((2, 3),))})
    assert np.array_equal(masks_of(folder), np.stack([widened(outline, 0.0) for outline in outlines]))
    assert "clicks    frame 4: 2 on the object, 1 off it" in lines


@pytest.mark.parametrize("clicks", [{}, {0: ((70, 40),)}])
def test_a_found_edit_is_held_and_followed_with_its_object(folder, tiny_sam, sam, clicks):
    """Before the margin, which would hide it: outlines of random weights are everywhere."""
    request = asked(folder, tiny_sam, edited={0: folder / "edited.png"}, clicks=clicks)
    read = read_clip(request)
    given = read_given(request, read)
    edited, regions = given.edited, given.regions
    edit = changed(read.frames[0], edited[0])
    outlines = sam.outlines(read.frames, {0: Prompt(clicks=clicks[0]) if clicks else Prompt(box=box_around(edit))})
    assert (edit & ~outlines[0]).sum() > 20
    tracked = _follower(request, read, edited, regions, None)()
    assert tracked.shapes[0][edit].all()
    assert np.array_equal(tracked.shapes, track_of(outlines, [0], {0: filled(edit)}).shapes)


def test_from_an_edited_picture_to_a_job(folder, tiny_sam):
    lines = prepare(asked(folder, tiny_sam, edited={0: folder / "edited.png"}))
    assert masks_of(folder)[0][disc(30, 20, 9)].all()
    assert not any("outside the mask" in line for line in lines)
    assert any(line.startswith("region    frame 0: ") for line in lines)


def test_masks_painted_by_hand_are_kept(folder, tiny_sam):
    request = asked(folder, tiny_sam, clicks={0: ((30, 20),)})
    prepare(request)
    path = folder / "job" / "mask" / "00003.png"
    write_png(path, np.full((*SIZE, 3), 255, np.uint8))
    lines = prepare(request)
    assert any("mask/00003.png as changed by hand" in line for line in lines)
    assert masks_of(folder)[3].all()


def test_frames_without_the_object_are_told(folder, copied):
    write_png(folder / "shape.png", disc(30, 20, 9).astype(np.uint8) * 255)
    lines = prepare(asked(folder, blind(copied), painted={2: folder / "shape.png"}))
    assert [bool(mask.any()) for mask in masks_of(folder)] == [index == 2 for index in range(9)]
    assert any("nothing is marked in frames 0-1, 3-8: SAM 2 sees no object there" in line for line in lines), lines


def test_a_prompt_without_an_object_is_told(folder, copied):
    with pytest.raises(UserError, match=r"frame 3: SAM 2 finds no object .* --click 3:X,Y"):
        prepare(asked(folder, blind(copied), boxes={3: (10, 8, 30, 20)}))


def no_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "clip"}')


def no_mean(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{}")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def one_weight_less(folder: Path) -> None:
    change_weight(folder, "no_memory_embedding", None)


@pytest.mark.parametrize(("spoil", "words"), [
    (no_checkpoint, "no such folder; .* `hf download facebook/sam2.1-hiera-large"),
    (no_config, "lacks config.json"),
    (other_model, "model_type 'clip', expected 'sam2_video'"),
    (no_mean, "lacks image_mean and image_std"),
    (no_weights, "cannot be read as SAM 2"),
    (one_weight_less, r"1 weights are missing \(no_memory_embedding\)"),
])  # fmt: skip
def test_a_folder_that_holds_no_sam_2_is_told_before_anything_is_written(folder, copied, spoil, words):
    spoil(copied)
    with pytest.raises(UserError, match=words):
        prepare(asked(folder, copied, clicks={0: ((30, 20),)}))
    assert not (folder / "job").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"sam": None}, "--click, --not: .* there is no --sam"),
    ({"clicks": {0: ((WIDTH, 3),)}}, "--click 0:80,3: is outside the picture of 80x48"),
    ({"background": {0: ((3, -1),)}}, "--not 0:3,-1: is outside the picture of 80x48"),
    ({"clicks": {9: ((3, 4),)}}, "--click 9:3,4: the clip has frames 0 to 8"),
    ({"clicks": {}, "background": {0: ((3, 4),)}}, "--not of frame 0: says only what is not the object"),
])  # fmt: skip
def test_clicks_that_cannot_be_meant_are_told(folder, tiny_sam, change, words):
    with pytest.raises(UserError, match=words):
        prepare(replace(asked(folder, tiny_sam, clicks={0: ((30, 20),)}), **change))
    assert not (folder / "job").exists()


def test_the_verb_gathers_clicks_by_frame(folder, tiny_sam, capsys):
    code = verb.main(["--source", str(folder / "source"), "--out", str(folder / "job"), "--sam", str(tiny_sam),
                      "--click", "30,20", "--click", "31,21", "--not", "3,4", "--click", "6:30,20"])  # fmt: skip
    told = capsys.readouterr().out
    assert code == 0
    assert "frame 0: 2 on the object, 1 off it" in told
    assert "frame 6: 1 on the object, 0 off it" in told
    assert grouped([(3, "a"), (0, "b"), (3, "c")]) == {3: ("a", "c"), 0: ("b",)}
    assert read_image(folder / "job" / "mask" / "00000.png").any()


@pytest.mark.parametrize("click", ["3", "3,4,5", "x,4", "2:3"])
def test_a_click_that_is_none_is_refused(click, capsys):
    with pytest.raises(SystemExit) as ended:
        verb.main(["--source", "x", "--out", "y", "--click", click])
    assert ended.value.code == 2
    assert f"--click: {click}: expected two whole numbers" in capsys.readouterr().err


def test_without_sam_its_model_is_not_loaded():
    """prepare.py stays as quick as it was."""
    code = "import sys, prepare, loraedit_ext.prepare.job; "
    code += "print([name for name in sys.modules if 'sam2_video' in name or name == 'loraedit_ext.prepare.sam'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def page_of(folder: Path, sam: Path | None) -> Draft:
    return Draft(Request(folder / "source", folder / "job", sam=sam))


def drawn(**marks) -> Drawn:
    return Drawn(**(NOTHING | marks))


def test_the_page_shows_the_outline_of_a_frame_as_the_job_will_have_it(folder, tiny_sam, sam):
    draft, clicks, background = page_of(folder, tiny_sam), {4: ((30, 20), (31, 21))}, {4: ((2, 3),), 2: ((70, 40),)}
    told = drawn(clicks=clicks, background=background, boxes={2: (10, 8, 30, 20)})
    for frame, prompt in ((4, Prompt(None, None, clicks[4], background[4])), (2, PROMPTS[2])):
        shown = cv2.imdecode(np.frombuffer(draft.outline(frame, told), np.uint8), cv2.IMREAD_UNCHANGED)[..., 3] > 0
        assert np.array_equal(shown, direct(sam, clip(9), {frame: prompt})[frame])
        assert 0 < shown.mean() < 1
    loaded = draft._sam
    draft.prepare(told)
    assert draft._sam is loaded
    drawn_masks = masks_of(folder)
    prepare(asked(folder, tiny_sam, clicks=clicks, background=background, boxes={2: (10, 8, 30, 20)}))
    assert np.array_equal(masks_of(folder), drawn_masks)


def test_an_outline_that_cannot_be_shown_is_told(folder, tiny_sam, copied):
    with pytest.raises(UserError, match="frame 4: needs --sam, and a box or a click"):
        page_of(folder, tiny_sam).outline(4, drawn(clicks={3: ((30, 20),)}))
    with pytest.raises(UserError, match="frame 3: needs --sam, and a box or a click"):
        page_of(folder, None).outline(3, drawn(boxes={3: (10, 8, 30, 20)}))
    with pytest.raises(UserError, match="there is no --sam"):
        page_of(folder, None).outline(3, drawn(clicks={3: ((30, 20),)}))
    with pytest.raises(UserError, match="outside the picture"):
        page_of(folder, tiny_sam).outline(3, drawn(clicks={3: ((300, 20),)}))
    with pytest.raises(UserError, match="frame 3: SAM 2 finds no object"):
        page_of(folder, blind(copied)).outline(3, drawn(clicks={3: ((30, 20),)}))
