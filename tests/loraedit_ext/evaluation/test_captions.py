"""Captions of procedural scenes: a closed vocabulary, and words that say what the pictures show."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest

from loraedit_ext.evaluation.captions import VOCABULARY, caption
from loraedit_ext.evaluation.rendering import render
from loraedit_ext.evaluation.scenes import Motion, Scene, SceneObject, Shape, edit, random_edit, random_scene, slowed
from loraedit_ext.evaluation.textures import Texture

WAYS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}


def disc(motion: Motion, pan: tuple[float, float] = (0.0, 0.0), shape: Shape = "disc") -> Scene:
    item = SceneObject(shape, 0.3, Texture("solid", ("red", "black")), Texture("solid", ("blue", "black")), motion)
    return Scene(Texture("solid", ("white", "black")), pan, (item,), 0)


def test_captions_keep_to_the_vocabulary() -> None:
    for seed in range(300):
        scene = random_scene(seed)
        for one in (scene, slowed(scene, 0.1), random_edit(scene, seed)):
            assert set(caption(one).replace(",", "").split()) <= set(VOCABULARY)
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_captions_follow_the_edit() -> None:
    blue = edit(disc(Motion()), front=Texture("solid", ("blue", "black")))
    assert caption(blue, motion=False) == "blue disc, on white background"


def test_a_words_token_never_changes() -> None:
    """The shipped weights know words by their places."""
    assert VOCABULARY.index("about") == 0
    assert VOCABULARY.index("yellow") == 58
    assert VOCABULARY[59:66] == ("barely", "gently", "slowly", "quickly", "swiftly", "clockwise", "anticlockwise")
    assert VOCABULARY[66:] == ("growing", "shrinking")


@pytest.mark.parametrize(("way", "words"), [
    (0.02, "barely moving"), (0.05, "gently moving right"), (0.1, "slowly moving right"), (0.15, "moving right"),
    (0.3, "quickly moving right"), (0.9, "swiftly moving right"),
])  # fmt: skip
def test_how_far_an_object_goes_is_said(way: float, words: str) -> None:
    assert caption(disc(Motion(travel=(way, 0.0)))) == f"red disc {words}, on white background, camera still"


def test_the_camera_goes_where_the_background_does_not() -> None:
    assert caption(disc(Motion(), pan=(0.05, 0.05))).endswith("camera slowly panning up left")


def test_a_way_that_returns_has_no_direction() -> None:
    swing = Motion(travel=(0.6, 0.0), path="sway", curl=1.0)
    circle = Motion(travel=(0.6, 0.0), path="arc", curl=math.pi)
    assert "swiftly moving about," in caption(disc(swing))
    assert "swiftly moving around," in caption(disc(circle))


@pytest.mark.parametrize("path", ["line", "arc", "sway"])
def test_the_direction_said_is_the_one_seen(path: str) -> None:
    """Of the rendered object's centre, to within a sixteenth of a turn and what pixels blur."""
    for angle in np.linspace(0.1, 2 * np.pi, 9):
        travel = 0.8 * np.cos(angle), 0.8 * np.sin(angle)
        scene = slowed(disc(Motion(travel=(float(travel[0]), float(travel[1])), path=path)), 0.3)
        seen = render(scene, 13, (96, 96)).visible[0]
        rows, columns = np.mgrid[:96, :96]
        y, x = (((axis * seen).sum((1, 2)) / seen.sum((1, 2)))[[0, -1]] for axis in (rows, columns))
        words = caption(scene).split(",")[0].split()
        said = np.sum([WAYS[word] for word in words if word in WAYS], axis=0)
        move = np.array([x[1] - x[0], y[1] - y[0]])
        assert said @ move > math.cos(math.pi / 8 + 0.05) * np.linalg.norm(said) * np.linalg.norm(move)


@pytest.mark.parametrize(("spin", "word"), [(0.6, "clockwise"), (-0.6, "anticlockwise")])
def test_the_sense_of_a_spin_is_the_one_seen(spin: float, word: str) -> None:
    """Seen on a pill: the angle of its longer axis, which grows clockwise as rows count downwards."""
    scene = disc(Motion(angle=0.3, spin=spin), shape="pill")
    assert f"pill barely moving spinning {word}," in caption(scene)
    rows, columns = np.mgrid[-1:1:96j, -1:1:96j]
    angles = []
    for alpha in render(scene, 2, (96, 96)).visible[0]:
        xx, yy, xy = ((alpha * product).sum() for product in (columns**2, rows**2, rows * columns))
        angles.append(math.atan2(2 * xy, xx - yy) / 2)
    turned = (angles[1] - angles[0] + math.pi / 2) % math.pi - math.pi / 2
    assert turned == pytest.approx(spin, abs=0.05)


def test_every_change_of_pose_is_said_with_how_far_it_carries_the_outline() -> None:
    """Of an object of size 0.3: a spin of 0.25 by 0.075, a turn of 0.5 by 0.15, a growth of -0.15 by 0.045, and so on."""
    motion = Motion(travel=(0.1, 0.0), spin=-0.25, turn=0.5, turn_axis=-math.pi / 2, growth=-0.15, wobble=0.1)
    words = "slowly moving right slowly spinning anticlockwise turning right gently shrinking gently wobbling"
    assert caption(disc(motion)).startswith(f"red disc {words}, on")
    assert caption(disc(Motion(spin=0.02, growth=0.03))).startswith("red disc barely moving, on")


def said_turn(scene: Scene) -> np.ndarray:
    """Where a caption says that the only object turns, a unit vector."""
    words = caption(scene).split(",")[0].split("turning ")[1].split()
    way = np.sum([WAYS[word] for word in words if word in WAYS], axis=0)
    return way / np.linalg.norm(way)


@pytest.mark.parametrize("turn", [0.08, -0.08])
@pytest.mark.parametrize("axis", [0.2, 1.1, 2.0, 2.9])
def test_a_ball_turns_to_where_its_side_is_seen_to_go(turn: float, axis: float) -> None:
    """Measured in the middle of the ball, to within a sixteenth of a turn and what pixels blur."""
    scene = disc(Motion(angle=0.4, turn=turn, turn_axis=axis), shape="ball")
    front = Texture("gravel", ("white", "black"), 0.5)
    scene = replace(scene, objects=(replace(scene.objects[0], size=0.9, front=front, back=front),))
    before, after = ((255 * frame.mean(-1)).astype(np.uint8) for frame in render(scene, 2, (128, 128)).video)
    flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 3, 15, 3, 5, 1.2, 0)
    move = flow[52:76, 52:76].mean((0, 1))
    assert np.dot(said_turn(scene), move) > math.cos(math.pi / 8 + 0.15) * np.linalg.norm(move)
    assert np.linalg.norm(move) > 2


@pytest.mark.parametrize("axis", [0.2, 1.1, 2.0, 2.9])
def test_a_card_gets_narrow_along_its_turn(axis: float) -> None:
    scene = disc(Motion(angle=0.4, turn=1.2, turn_axis=axis))
    columns, rows = np.meshgrid(np.linspace(-1, 1, 96), np.linspace(-1, 1, 96))
    (x, y), alpha = said_turn(scene), render(scene, 2, (96, 96)).visible[0, 1]
    along, across = ((alpha * (columns * a + rows * b) ** 2).sum() for a, b in ((x, y), (-y, x)))
    assert along < 0.5 * across
