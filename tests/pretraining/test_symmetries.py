"""Mirrored and turned clips: pictures, poses and captions agree."""

from __future__ import annotations

import pytest
import torch

from loraedit_ext.evaluation.captions import caption
from loraedit_ext.evaluation.rendering import render
from loraedit_ext.evaluation.scenes import KINDS, Scene, random_scene
from pretraining import clips, latents, symmetries, vae
from pretraining.conditioning import Conditioner

SCENES = [random_scene(seed, kind=kind) for kind in KINDS for seed in range(3)]


@pytest.mark.parametrize("symmetry", range(symmetries.COUNT))
def test_objects_of_a_scene_are_where_they_are_in_the_picture(symmetry: int) -> None:
    for scene in SCENES:
        expected = symmetries.of_picture(torch.from_numpy(render(scene, 5, (48, 48)).visible), symmetry)
        found = torch.from_numpy(render(symmetries.of_scene(scene, symmetry), 5, (48, 48)).visible)
        assert (found - expected).abs().max() < 2e-3, scene


def test_all_symmetries_differ() -> None:
    picture = torch.arange(9.0).reshape(1, 3, 3)
    assert len({tuple(symmetries.of_picture(picture, symmetry).flatten().tolist()) for symmetry in range(8)}) == 8


def told(scene: Scene, symmetry: int) -> str:
    return caption(symmetries.of_scene(scene, symmetry))


def test_captions_say_the_new_ways() -> None:
    scene = next(scene for scene in map(random_scene, range(10_000)) if "moving up right" in caption(scene)
                 and len(scene.objects) == 1 and caption(scene).endswith("panning left"))
    ways = ["up right", "up left", "down right", "up right", "down left", "down right", "up left", "down left"]
    cameras = ["left", "right", "up", "down", "right", "left", "down", "up"]
    for symmetry, (way, camera) in enumerate(zip(ways, cameras, strict=True)):
        words = told(scene, symmetry)
        assert f"moving {way}" in words, symmetry
        assert words.endswith(f"panning {camera}"), symmetry


def test_captions_of_mirrored_scenes_spin_the_other_way() -> None:
    scene = next(scene for scene in map(random_scene, range(10_000)) if " anticlockwise" in caption(scene)
                 and len(scene.objects) == 1)
    assert [" anticlockwise" in told(scene, symmetry) for symmetry in range(8)] == [True, False] * 4
    assert [" clockwise" in told(scene, symmetry) for symmetry in range(8)] == [False, True] * 4


def test_a_ball_turns_as_its_picture_does() -> None:
    scene = next(scene for scene in map(random_scene, range(10_000)) if "ball" in caption(scene)
                 and "turning left" in caption(scene) and len(scene.objects) == 1)
    ways = ["left", "right", "up", "down", "right", "left", "down", "up"]
    for symmetry, way in enumerate(ways):
        assert f"turning {way}" in told(scene, symmetry), symmetry


def test_encoded_variants_are_the_clips_mirrored_and_turned() -> None:
    coder, conditioner = vae.build().requires_grad_(False), Conditioner()
    scenes = [(scene, motion) for scene, motion in latents.training_scenes(0, 4)][:2]
    found = latents.encode_scenes(coder, conditioner, scenes, 2, 32, variants=3)
    assert len(found) == 6
    for variant, start in ((0, 0), (1, 2), (2, 4)):
        for index, (scene, motion) in enumerate(scenes):
            video = symmetries.of_picture(clips.scene_video(scene, size=32), variant)
            first = symmetries.of_picture(clips.scene_video(scenes[0][0], size=32), variant)
            clip = found.take(torch.tensor([start + index]))
            close(clip.video, latents.encode_normalised(coder, video[None]))
            close(clip.condition, latents.encode_normalised(coder, clips.first_frame_condition(first)[None]))
            close(clip.text[0], conditioner.text(caption(symmetries.of_scene(scene, variant), motion)))
            close(clip.image, conditioner.image(first[None, :, 0]))
    assert torch.equal(found.objects[2:4], found.objects[:2].flip(-1))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.allclose(found, expected, atol=2e-3, rtol=2e-3)
