"""Procedural scenes: repeatable, exact masks, exact edits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from loraedit_ext.evaluation.captions import caption
from loraedit_ext.evaluation.rendering import Rendered, render
from loraedit_ext.evaluation.scenes import (
    KINDS,
    SHAPES,
    Motion,
    Scene,
    SceneObject,
    another_future,
    edit,
    random_edit,
    random_scene,
    slowed,
)
from loraedit_ext.evaluation.textures import PALETTE, PATTERNS, TILES, Texture, lookalikes, sample

SEEDS = range(40)
EDITS = (("color",), ("texture",), ("shape",), ("color", "texture", "shape"))


def plain(color: str, other: str = "black") -> Texture:
    return Texture("solid", (color, other))


def one_object(shape: str = "square", motion: Motion | None = None, size: float = 0.5, **looks: Texture) -> Scene:
    """A single red object on a plain background."""
    front, back = looks.get("front", plain("red")), looks.get("back", plain("blue"))
    item = SceneObject(shape, size, front, back, motion or Motion())
    return Scene(looks.get("background", plain("white")), (0.0, 0.0), (item,), 0)


def same(first: Rendered, second: Rendered) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_a_seed_fixes_scene_and_pixels() -> None:
    for seed in SEEDS:
        assert random_scene(seed) == random_scene(seed)
    assert same(render(random_scene(3)), render(random_scene(3)))
    assert random_scene(3) != random_scene(4)


def test_a_drawn_scene_never_changes_between_versions() -> None:
    """Committed benchmark lists name seeds: what a seed means is part of the format."""
    scene = random_scene(1)
    item = scene.objects[scene.target]
    assert caption(scene, motion=False) == "yellow wooden hexagon, on stars background"
    assert item.size == pytest.approx(0.429903)


def test_video_is_float32_in_range_and_of_the_size_asked_for() -> None:
    for seed in SEEDS:
        rendered = render(random_scene(seed), frames=5, size=(32, 48))
        assert rendered.video.shape == (5, 32, 48, 3)
        assert {array.dtype for array in vars(rendered).values()} == {np.dtype(np.float32)}
        assert all(array.min() >= 0 and array.max() <= 1 for array in vars(rendered).values())


@pytest.mark.parametrize("kinds", EDITS)
def test_an_edit_changes_nothing_outside_the_objects_visible_union(kinds: tuple[str, ...]) -> None:
    changed = 0
    for seed in SEEDS:
        scene = random_scene(seed)
        edited = random_edit(scene, seed, kinds)
        before, after = render(scene), render(edited)
        outside = (before.visible[scene.target] == 0) & (after.visible[scene.target] == 0)
        assert np.array_equal(before.video[outside], after.video[outside])
        changed += not np.array_equal(before.video, after.video)
    assert changed >= 0.9 * len(SEEDS)  # a target may be hidden behind others, or have left the frame


@pytest.mark.parametrize("kinds", [("color",), ("texture",)])
def test_recolouring_and_retexturing_leave_the_masks_alone(kinds: tuple[str, ...]) -> None:
    scene = random_scene(5)
    before, after = render(scene), render(random_edit(scene, 1, kinds))
    assert np.array_equal(before.alpha, after.alpha)
    assert np.array_equal(before.visible, after.visible)


def test_removing_an_object_changes_nothing_outside_its_mask() -> None:
    for seed in SEEDS:
        scene = random_scene(seed, objects=2)
        alone = replace(scene, objects=scene.objects[:1], target=0)
        whole, part = render(scene), render(alone)
        outside = whole.alpha[1] == 0
        assert np.array_equal(whole.video[outside], part.video[outside])


def test_shares_of_objects_and_background_sum_to_one() -> None:
    for seed in SEEDS:
        rendered = render(random_scene(seed, objects=3))
        background = np.prod(1 - rendered.alpha, axis=0)
        np.testing.assert_allclose(rendered.visible.sum(0) + background, 1, atol=1e-5)
        assert np.array_equal(rendered.visible[-1], rendered.alpha[-1])  # nothing lies before the front object


def test_mask_covers_the_area_that_geometry_says() -> None:
    square = render(one_object("square"), frames=1, size=(128, 128)).alpha[0, 0]
    disc = render(one_object("disc"), frames=1, size=(128, 128)).alpha[0, 0]
    pixel_area = (2 / 128) ** 2
    assert square.sum() * pixel_area == pytest.approx((2 * 0.85 * 0.5) ** 2, rel=0.01)
    assert disc.sum() * pixel_area == pytest.approx(np.pi * 0.5**2, rel=0.01)


def test_an_object_moves_as_its_motion_says() -> None:
    alpha = render(one_object("disc", Motion(start=(-0.5, 0), travel=(1.0, 0)), size=0.3), frames=5).alpha[0]
    columns = (alpha.sum(1) * np.arange(64)).sum(1) / alpha.sum((1, 2))
    np.testing.assert_allclose(np.diff(columns), 8.0, atol=0.05)  # a unit is 32 pixels, in four steps


def test_turning_shows_the_back_only_later() -> None:
    for shape in ("square", "ball"):
        video = render(one_object(shape, Motion(turn=np.pi)), frames=13).video
        first, last = video[0, 32, 32], video[-1, 32, 32]
        np.testing.assert_allclose(first, (0.88, 0.14, 0.14), atol=0.01)
        np.testing.assert_allclose(last, (0.14, 0.28, 0.88), atol=0.01)


def test_an_emerging_target_is_hidden_at_first() -> None:
    shares = []
    for seed in SEEDS:
        scene = random_scene(seed, kind="emerging")
        visible = render(scene).visible[scene.target]
        shares.append((visible[0].sum(), visible.sum((1, 2)).max()))
        assert len(scene.objects) >= 2
    at_first, at_most = np.array(shares).mean(0)
    assert at_first < 0.4 * at_most


def test_panning_moves_the_background_and_staying_does_not() -> None:
    for seed in SEEDS:
        still = render(random_scene(seed, panning=False))
        clear = still.visible.sum(0).max(0) == 0
        assert np.array_equal(still.video[0][clear], still.video[-1][clear])
    scene = replace(one_object(), background=Texture("shaded", ("black", "white")), pan=(0.5, 0.0))
    video = render(scene, frames=2).video
    np.testing.assert_allclose(video[0, 2, 20], video[1, 2, 36], atol=1e-5)  # a quarter of the width


def test_another_future_shares_the_first_frame_only() -> None:
    for seed in SEEDS:
        scene = random_scene(seed)
        first, second = render(scene), render(another_future(scene, seed))
        np.testing.assert_allclose(first.video[0], second.video[0], atol=1e-4)
        assert np.abs(first.video[-1] - second.video[-1]).max() > 0.1


def test_no_object_is_lost_on_its_background_before_or_after_an_edit() -> None:
    for seed in range(300):
        scene = random_scene(seed)
        for shown in (scene, random_edit(scene, seed, ("color",))):
            colors = [name for item in shown.objects for side in (item.front, item.back) for name in side.colors or ()]
            assert not lookalikes(scene.background) & set(colors), seed


def test_colours_that_a_texture_shows_are_lookalikes_and_plain_others_are_not() -> None:
    assert {"white", "black", "gray"} <= lookalikes(plain("white"))  # gray: the mean of white and black
    assert not {"red", "green", "blue", "cyan", "yellow"} & lookalikes(plain("white"))
    assert "orange" in lookalikes(plain("red", "blue"))
    assert not {"green", "yellow", "white"} & lookalikes(plain("red", "blue"))
    assert "black" in lookalikes(Texture("stars", None))
    for first in PALETTE:
        for second in set(PALETTE) - {first}:
            assert len(PALETTE) - len(lookalikes(plain(first, second))) >= 4  # an edit needs two that are not there yet


def test_a_slowed_scene_is_the_beginning_of_the_scene_drawn_out() -> None:
    for seed in SEEDS:
        scene = random_scene(seed)
        whole, half = render(scene, frames=25), render(slowed(scene, 0.5), frames=13)
        np.testing.assert_allclose(half.alpha, whole.alpha[:, :13], atol=1e-3)
        np.testing.assert_allclose(half.video, whole.video[:13], atol=1e-2)
        assert slowed(scene, 1.0) == scene


@pytest.mark.parametrize("kind", KINDS)
def test_options_are_obeyed(kind: str) -> None:
    for seed in range(10):
        scene = random_scene(seed, objects=2, kind=kind, panning=True, natural=True)
        motion = scene.objects[scene.target].motion
        assert len(scene.objects) == 2
        assert scene.pan != (0.0, 0.0)
        assert scene.background.kind in TILES
        assert (motion.spin != 0) >= (kind == "rotating")
        assert (motion.turn != 0) >= (kind == "turning")
        assert (motion.wobble != 0) >= (kind == "deforming")


def test_textures_repeat_and_stay_in_range() -> None:
    axis = np.linspace(-5, 5, 64, dtype=np.float32)
    for kind in PATTERNS + TILES:
        colors = sample(Texture(kind, ("red", "green")), axis[None], axis[:, None])
        assert colors.shape == (64, 64, 3)
        assert colors.dtype == np.float32
        assert colors.min() >= 0
        assert colors.max() <= 1


def test_details_are_wide_enough_for_the_vae() -> None:
    """Nearly all of a frame's energy lies below a quarter of the sampling rate."""
    shares = []
    for seed in SEEDS:
        grey = render(random_scene(seed), frames=1).video[0].mean(-1)
        power = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
        frequency = np.abs(np.fft.fftfreq(64))
        low = np.maximum.outer(frequency, frequency) < 0.25
        shares.append(power[low].sum() / power.sum())
    assert np.mean(shares) > 0.97


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Texture("tartan", ("red", "blue")), "tartan"),
        (lambda: Texture("striped", None), "two colours"),
        (lambda: Texture("solid", ("red", "mauve")), "mauve"),
        (lambda: one_object("star"), "star"),
        (lambda: random_scene(0, objects=4), "objects = 4"),
        (lambda: edit(one_object(), index=1), "index = 1"),
        (lambda: render(one_object(), frames=0), "frames = 0"),
    ],
)
def test_what_does_not_exist_is_refused(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_every_shape_renders_and_can_be_edited_into() -> None:
    for shape in SHAPES:
        assert render(edit(one_object(), shape=shape), frames=1).alpha.sum() > 100
