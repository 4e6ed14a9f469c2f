"""Captions of procedural scenes: a closed vocabulary, and words that say what the pictures show."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from loraedit_ext.evaluation.captions import VOCABULARY, caption
from loraedit_ext.evaluation.rendering import render
from loraedit_ext.evaluation.scenes import Motion, Scene, SceneObject, edit, random_edit, random_scene, slowed
from loraedit_ext.evaluation.textures import Texture

WAYS = {"right": (1, 0), "down": (0, 1), "left": (-1, 0), "up": (0, -1)}


def disc(motion: Motion, pan: tuple[float, float] = (0.0, 0.0)) -> Scene:
    item = SceneObject("disc", 0.3, Texture("solid", ("red", "black")), Texture("solid", ("blue", "black")), motion)
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
    assert VOCABULARY[59:] == ("barely", "gently", "slowly", "quickly", "swiftly", "clockwise", "anticlockwise")


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
    scene = disc(Motion(angle=0.3, spin=spin))
    scene = replace(scene, objects=(replace(scene.objects[0], shape="pill"),))
    assert f"pill barely spinning {word}," in caption(scene)
    rows, columns = np.mgrid[-1:1:96j, -1:1:96j]
    angles = []
    for alpha in render(scene, 2, (96, 96)).visible[0]:
        xx, yy, xy = ((alpha * product).sum() for product in (columns**2, rows**2, rows * columns))
        angles.append(math.atan2(2 * xy, xx - yy) / 2)
    turned = (angles[1] - angles[0] + math.pi / 2) % math.pi - math.pi / 2
    assert turned == pytest.approx(spin, abs=0.05)
