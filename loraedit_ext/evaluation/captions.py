"""Short captions of procedural scenes in a closed vocabulary."""

from __future__ import annotations

import math

from loraedit_ext.evaluation.scenes import SHAPES, Motion, Scene, SceneObject, Vector
from loraedit_ext.evaluation.textures import PALETTE, PATTERNS, TILES, Texture

_TILE_WORDS = {"wood": "wooden", "fur": "furry", "flag": "starry"}
_MOTION_WORDS = ("moving", "spinning", "turning", "wobbling", "left", "right", "up", "down", "around", "about")
_OTHER_WORDS = ("on", "background", "camera", "panning", "still")

VOCABULARY: tuple[str, ...] = tuple(sorted({
    *PALETTE, *SHAPES, *PATTERNS, *(_TILE_WORDS.get(name, name) for name in TILES), *_MOTION_WORDS, *_OTHER_WORDS
}))
"""Every word that a caption may contain; captions separate phrases by commas."""


def caption(scene: Scene, motion: bool = True) -> str:
    """Describe a scene: its objects from front to back, the background, the camera.

    Args:
        scene: what to describe.
        motion: also say how things move; without it the caption holds for the first frame alone.

    Returns:
        for example "red striped disc moving left, blue ball turning up, on wavy green background, camera still".
    """
    phrases = [_object(item, motion) for item in reversed(scene.objects)]
    phrases.append(f"on {_look(scene.background)} background")
    if motion:
        phrases.append("camera still" if scene.pan == (0.0, 0.0) else f"camera panning {_camera(scene.pan)}")
    return ", ".join(phrases)


def _object(item: SceneObject, motion: bool) -> str:
    phrase = f"{_look(item.front)} {item.shape}"
    return f"{phrase} {_movement(item.motion)}" if motion else phrase


def _look(texture: Texture) -> str:
    """Colour and texture in words; the second colour stays unsaid, as people leave it."""
    words = [] if texture.colors is None else [texture.colors[0]]
    if texture.kind != "solid":
        words.append(_TILE_WORDS.get(texture.kind, texture.kind))
    return " ".join(words)


def _movement(motion: Motion) -> str:
    """The most striking change of pose, then where it goes."""
    verb = "turning" if motion.turn else "spinning" if motion.spin else "wobbling" if motion.wobble else "moving"
    place = {"line": _direction(motion.travel), "arc": "around", "sway": "about"}[motion.path]
    return f"{verb} {place}"


def _camera(pan: Vector) -> str:
    """The camera goes where the background does not."""
    return _direction((-pan[0], -pan[1]))


def _direction(vector: Vector) -> str:
    quarter = round(math.atan2(vector[1], vector[0]) / (math.pi / 2)) % 4
    return ("right", "down", "left", "up")[quarter]
