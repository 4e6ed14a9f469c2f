"""Short captions of procedural scenes in a closed vocabulary."""

from __future__ import annotations

import math

import numpy as np

from loraedit_ext.evaluation.rendering import centre
from loraedit_ext.evaluation.scenes import SHAPES, Motion, Scene, SceneObject, Vector
from loraedit_ext.evaluation.textures import PALETTE, PATTERNS, TILES, Texture

_TILE_WORDS = {"wood": "wooden", "fur": "furry", "flag": "starry"}
_MOTION_WORDS = ("moving", "spinning", "turning", "wobbling", "left", "right", "up", "down", "around", "about")
_OTHER_WORDS = ("on", "background", "camera", "panning", "still")
_PACES = ((0.03, "barely"), (0.06, "gently"), (0.11, "slowly"), (0.2, ""), (0.35, "quickly"), (math.inf, "swiftly"))
"""Length of the way below which a word holds, in half shorter sides of the frame: 2, 4, 7, 13 and 22 pixels of 128."""
_LEAST_WAY = _PACES[0][0]
_CARD_TURNS = {"left": "right", "up left": "down right", "up": "down", "up right": "down left"}
_LEAST_CHANGE = 0.01  # of an outline, in the same units

VOCABULARY: tuple[str, ...] = (
    *sorted({
        *PALETTE, *SHAPES, *PATTERNS, *(_TILE_WORDS.get(name, name) for name in TILES), *_MOTION_WORDS, *_OTHER_WORDS
    }),
    *(word for _, word in _PACES if word), "clockwise", "anticlockwise", "growing", "shrinking",
)
"""Every word that a caption may contain, commas apart. A word's place is its token, so later words stand last."""


def caption(scene: Scene, motion: bool = True) -> str:
    """Describe a scene: its objects from front to back, the background, the camera.

    Args:
        scene: what to describe.
        motion: also say how things move; without it the caption holds for the first frame alone.

    Returns:
        for example "red striped disc slowly moving up left, blue ball spinning clockwise right, on wavy green
        background, camera still".
    """
    phrases = [_object(item, motion) for item in reversed(scene.objects)]
    phrases.append(f"on {_look(scene.background)} background")
    if motion:
        phrases.append(_camera(scene.pan))
    return ", ".join(phrases)


def _object(item: SceneObject, motion: bool) -> str:
    phrase = f"{_look(item.front)} {item.shape}"
    return _joined(phrase, _way(item.motion), *_changes(item)) if motion else phrase


def _look(texture: Texture) -> str:
    """Colour and texture in words; the second colour stays unsaid, as people leave it."""
    words = [] if texture.colors is None else [texture.colors[0]]
    if texture.kind != "solid":
        words.append(_TILE_WORDS.get(texture.kind, texture.kind))
    return " ".join(words)


def _way(motion: Motion) -> str:
    """How far it goes in the clip, and where."""
    x, y = centre(motion, np.linspace(0, 1, 13, dtype=np.float32))
    way = float(np.hypot(np.diff(x), np.diff(y)).sum())
    net = float(x[-1] - x[0]), float(y[-1] - y[0])
    straight = math.hypot(*net) > 0.7 * way
    place = _direction(net) if straight else "around" if motion.path == "arc" else "about"
    return _joined(_pace(way), "moving", place if way > _LEAST_WAY else "")


def _changes(item: SceneObject) -> list[str]:
    """Every change of pose, each with how far it carries the outline."""
    motion = item.motion
    stretch = motion.wobble * math.sin(2 * math.pi * min(motion.wobbles, 0.25))
    changes = [
        (motion.spin, "spinning clockwise" if motion.spin > 0 else "spinning anticlockwise"),
        (motion.turn, f"turning {_turning(item)}"),
        (motion.growth, "growing" if motion.growth > 0 else "shrinking"),
        (stretch, "wobbling"),
    ]
    carried = [(abs(amount) * item.size, words) for amount, words in changes]
    return [_joined(_pace(far), words) for far, words in carried if far > _LEAST_CHANGE]


def _turning(item: SceneObject) -> str:
    """Where the side that is seen goes as an object turns in depth; of a card, which looks the same turned back, one of two."""
    across = item.motion.angle + item.motion.turn_axis + math.pi / 2
    sign = math.copysign(1, item.motion.turn)
    direction = _direction((sign * math.cos(across), sign * math.sin(across)))
    return direction if item.shape == "ball" else _CARD_TURNS.get(direction, direction)


def _camera(pan: Vector) -> str:
    """The camera goes where the background does not."""
    if pan == (0.0, 0.0):
        return "camera still"
    return _joined("camera", _pace(math.hypot(*pan)), "panning", _direction((-pan[0], -pan[1])))


def _pace(way: float) -> str:
    return next(word for limit, word in _PACES if way < limit)


def _direction(vector: Vector) -> str:
    eighth = round(math.atan2(vector[1], vector[0]) / (math.pi / 4)) % 8
    return ("right", "down right", "down", "down left", "left", "up left", "up", "up right")[eighth]


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)
