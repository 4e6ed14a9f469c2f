"""Procedural scenes: what moves where, drawn from a seed, and their edits. `rendering.render` turns them into video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from loraedit_ext.evaluation.textures import PALETTE, TILES, Texture, lookalikes

Shape = Literal["disc", "square", "triangle", "hexagon", "cross", "ring", "pill", "ball"]
SHAPES: tuple[Shape, ...] = ("disc", "square", "triangle", "hexagon", "cross", "ring", "pill", "ball")
Kind = Literal["translating", "rotating", "turning", "emerging", "deforming", "mixed"]
KINDS: tuple[Kind, ...] = ("translating", "rotating", "turning", "emerging", "deforming", "mixed")

# Natural tiles that read as a surface also on a small object; the others are pictures and serve as backgrounds.
OBJECT_TILES = ("brick", "fur", "wood", "gravel", "tissue")
OBJECT_PATTERNS = ("solid", "striped", "checkered", "dotted", "shaded", "halved")
BACKGROUND_PATTERNS = ("shaded", "striped", "checkered", "wavy", "cloudy")

Vector = tuple[float, float]


@dataclass(frozen=True)
class Motion:
    """Pose of an object over the clip time t in [0, 1]. The frame's shorter side spans [-1, 1]; angles are radians.

    Attributes:
        start, travel: centre at t = 0 and displacement by t = 1 (`path` "line"); for "sway" the object swings
            along `travel` around `start`; for "arc" it circles on a radius of |travel| / 2 through `start`.
        curl: angle run through on an arc, or full swings of a sway.
        angle, spin: rotation in the image plane at t = 0 and its change by t = 1.
        growth: relative change of size by t = 1.
        wobble, wobbles: amplitude of the stretching deformation and its number of periods.
        turn, turn_axis: rotation in depth by t = 1 (pi shows the back) about an axis at this angle in the plane.
    """

    start: Vector = (0.0, 0.0)
    travel: Vector = (0.0, 0.0)
    path: Literal["line", "arc", "sway"] = "line"
    curl: float = 0.75
    angle: float = 0.0
    spin: float = 0.0
    growth: float = 0.0
    wobble: float = 0.0
    wobbles: float = 1.0
    turn: float = 0.0
    turn_axis: float = 0.0


@dataclass(frozen=True)
class SceneObject:
    """A flat cut-out, or a ball, with a texture on its front and one on the side that the first frame does not show."""

    shape: Shape
    size: float
    front: Texture
    back: Texture
    motion: Motion

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"shape {self.shape!r}: expected one of {', '.join(SHAPES)}")


@dataclass(frozen=True)
class Scene:
    """Background, its pan by t = 1, objects from back to front, and which of them an edit changes."""

    background: Texture
    pan: Vector
    objects: tuple[SceneObject, ...]
    target: int


def random_scene(
    seed: int,
    *,
    objects: int | None = None,
    kind: Kind | None = None,
    panning: bool | None = None,
    natural: bool | None = None,
) -> Scene:
    """Draw a scene; the same arguments give the same scene on every machine.

    Args:
        seed: non-negative.
        objects: one to three; None draws it. An emerging target always has a second object that hides it at first.
        kind: how the target moves; None draws it.
        panning: whether the background pans; None draws it (half of the scenes).
        natural: whether the background is a natural picture; None draws it.
    """
    rng = np.random.default_rng([seed, 0x5CE9E])
    if objects is not None and not 1 <= objects <= 3:
        raise ValueError(f"objects = {objects}: a scene holds one to three")
    count = objects or int(rng.choice([1, 2, 3], p=[0.55, 0.35, 0.1]))
    kind = kind or KINDS[rng.choice(len(KINDS), p=[0.3, 0.15, 0.2, 0.1, 0.1, 0.15])]
    panning = bool(rng.random() < 0.5) if panning is None else panning
    natural = bool(rng.random() < 0.4) if natural is None else natural
    pan = _direction(rng, 0.3, 0.8) if panning else (0.0, 0.0)
    others = tuple(_object(rng, "mixed", (0.28, 0.38)) for _ in range(count - 1))
    target = _object(rng, kind, (0.38, 0.54))
    if kind == "emerging":
        target, screen = _hidden_at_first(rng, target, others[-1] if others else None)
        scene = Scene(_background(rng, natural), pan, (*others[:-1], target, screen), len(others[:-1]))
    else:
        scene = Scene(_background(rng, natural), pan, (*others, target), len(others))
    return _in_contrast(rng, scene)


def edit(
    scene: Scene,
    *,
    index: int | None = None,
    front: Texture | None = None,
    back: Texture | None = None,
    shape: Shape | None = None,
) -> Scene:
    """The same scene with one object's look changed: everything that moves, moves as before.

    Args:
        scene: the source.
        index: the object to change; None: the scene's target.
        front, back, shape: the new look; None keeps what is there.
    """
    index = scene.target if index is None else index
    if not 0 <= index < len(scene.objects):
        raise ValueError(f"index = {index}: the scene has {len(scene.objects)} objects")
    old = scene.objects[index]
    new = replace(old, front=front or old.front, back=back or old.back, shape=shape or old.shape)
    return replace(scene, objects=(*scene.objects[:index], new, *scene.objects[index + 1 :]))


def random_edit(scene: Scene, seed: int, kinds: Sequence[Literal["color", "texture", "shape"]] = ("color",)) -> Scene:
    """An edit of the target drawn from a seed: other colours, another texture, another shape, or several of them."""
    rng = np.random.default_rng([seed, 0xED17])
    old = scene.objects[scene.target]
    front, back, shape = old.front, old.back, old.shape
    if "color" in kinds:
        unseen = lookalikes(scene.background)
        front, back = (replace(side, colors=_two_colors(rng, unseen | set(side.colors or ()))) for side in (front, back))
    if "texture" in kinds:
        front, back = (_other_kind(rng, side) for side in (front, back))
    if "shape" in kinds:
        # A ball turns as a body, a cut-out as a card: the motion must stay what it is.
        options = [name for name in SHAPES if name not in (shape, "ball")] if shape != "ball" else ["ball"]
        shape = options[rng.integers(len(options))]
    return edit(scene, front=front, back=back, shape=shape)


def another_future(scene: Scene, seed: int) -> Scene:
    """A scene with the same first frame in which everything, the background included, goes on differently."""
    rng = np.random.default_rng([seed, 0xF07])
    pan = _direction(rng, 0.3, 0.8) if rng.random() < 0.5 else (0.0, 0.0)
    return replace(scene, pan=pan, objects=tuple(_other_motion(rng, item) for item in scene.objects))


def slowed(scene: Scene, pace: float) -> Scene:
    """The same first frame and the same ways from it, gone through as far as clip time `pace` only; pans too."""
    return replace(scene, pan=_scaled(scene.pan, pace), objects=tuple(
        replace(item, motion=_slowed(item.motion, pace)) for item in scene.objects
    ))


def _slowed(motion: Motion, pace: float) -> Motion:
    """A line is left halfway, arcs and swings run through less of their angle."""
    line = motion.path == "line"
    return replace(
        motion, travel=_scaled(motion.travel, pace) if line else motion.travel, curl=motion.curl * pace,
        spin=motion.spin * pace, growth=motion.growth * pace, wobbles=motion.wobbles * pace, turn=motion.turn * pace,
    )


def _scaled(vector: Vector, factor: float) -> Vector:
    return vector[0] * factor, vector[1] * factor


def _other_motion(rng: np.random.Generator, item: SceneObject) -> SceneObject:
    """The same pose at first, another way from there, mostly towards the middle."""
    motion = _motion(rng, "mixed")
    start, travel = item.motion.start, motion.travel
    if start[0] * travel[0] + start[1] * travel[1] > 0.1:
        travel = (-travel[0], -travel[1])
    return replace(item, motion=replace(motion, start=start, travel=travel, angle=item.motion.angle))


def _other_kind(rng: np.random.Generator, texture: Texture) -> Texture:
    options = [kind for kind in OBJECT_PATTERNS + OBJECT_TILES if kind not in (texture.kind, "solid")]
    return replace(texture, kind=options[rng.integers(len(options))])


def _object(rng: np.random.Generator, kind: Kind, sizes: Vector) -> SceneObject:
    front, back = _object_texture(rng), _object_texture(rng)
    motion = _motion(rng, kind)
    shape = SHAPES[rng.integers(len(SHAPES))] if kind != "deforming" else SHAPES[rng.integers(len(SHAPES) - 1)]
    return SceneObject(shape, float(rng.uniform(*sizes)), front, back, motion)


def _motion(rng: np.random.Generator, kind: Kind) -> Motion:
    """A path that stays in view, plus what the kind asks for ("mixed": anything)."""
    travel = _direction(rng, 0.4, 1.0)
    path = ("line", "line", "arc", "sway")[rng.integers(4)]
    if path == "sway":
        travel = (0.65 * travel[0], 0.65 * travel[1])
    jitter = rng.uniform(-0.3, 0.3, 2)
    start = (-travel[0] / 2 + jitter[0], -travel[1] / 2 + jitter[1]) if path == "line" else tuple(jitter * 1.5)
    motion = Motion(
        start=(float(start[0]), float(start[1])), travel=travel, path=path, curl=float(rng.uniform(0.5, 1.0)),
        angle=float(rng.uniform(0, 2 * np.pi)), turn_axis=float(rng.uniform(0, np.pi)),
    )
    spin = float(rng.choice([-1, 1]) * rng.uniform(0.8, 2.2))
    turn = float(rng.choice([-1, 1]) * rng.uniform(0.6, 1.1) * np.pi)
    wobble, growth = float(rng.uniform(0.12, 0.28)), float(rng.uniform(-0.35, 0.45))
    chance = rng.random(4)
    if kind == "rotating" or (kind == "mixed" and chance[0] < 0.35):
        motion = replace(motion, spin=spin)
    if kind == "turning" or (kind == "mixed" and chance[1] < 0.15):
        motion = replace(motion, turn=turn)
    if kind == "deforming" or (kind == "mixed" and chance[2] < 0.15):
        motion = replace(motion, wobble=wobble, wobbles=float(rng.uniform(0.7, 1.5)))
    if chance[3] < 0.25:
        motion = replace(motion, growth=growth)
    return motion


def _hidden_at_first(
    rng: np.random.Generator, target: SceneObject, screen: SceneObject | None
) -> tuple[SceneObject, SceneObject]:
    """Place the target behind a slow, larger screen and let it travel out, so that most of it appears later."""
    screen = screen or _object(rng, "translating", (0.3, 0.4))
    place = rng.uniform(-0.3, 0.3, 2)
    out = _direction(rng, 0.9, 1.2)
    start = (float(place[0]), float(place[1]))
    peek = (start[0] + 0.2 * out[0], start[1] + 0.2 * out[1])
    screen_motion = Motion(start=start, travel=(-0.2 * out[0], -0.2 * out[1]), angle=screen.motion.angle)
    screen = replace(screen, shape="square", size=float(rng.uniform(0.44, 0.52)), motion=screen_motion)
    target_motion = replace(target.motion, start=peek, travel=out, path="line", growth=0.0)
    return replace(target, size=float(rng.uniform(0.34, 0.42)), motion=target_motion), screen


def _object_texture(rng: np.random.Generator) -> Texture:
    natural = rng.random() < 0.25
    names, frequencies = (OBJECT_TILES, (0.4, 0.6)) if natural else (OBJECT_PATTERNS, (0.7, 1.15))
    return Texture(
        names[rng.integers(len(names))], _two_colors(rng), float(rng.uniform(*frequencies)),
        angle=float(rng.uniform(0, 2 * np.pi)), offset=_pair(rng, 0.2),
    )


def _background(rng: np.random.Generator, natural: bool) -> Texture:
    if natural:
        own = rng.random() < 0.75
        kind = TILES[rng.integers(len(TILES))]
        return Texture(kind, None if own else _two_colors(rng), float(rng.uniform(0.5, 0.8)), offset=_pair(rng, 0.5))
    kind = BACKGROUND_PATTERNS[rng.integers(len(BACKGROUND_PATTERNS))]
    return Texture(
        kind, _two_colors(rng), float(rng.uniform(0.6, 1.3)),
        angle=float(rng.uniform(0, 2 * np.pi)), offset=_pair(rng, 1.0),
    )


def _in_contrast(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with other colours where an object's would be lost on the background."""
    unseen = lookalikes(scene.background)
    return replace(scene, objects=tuple(
        replace(item, front=_repainted(rng, item.front, unseen), back=_repainted(rng, item.back, unseen))
        for item in scene.objects
    ))


def _repainted(rng: np.random.Generator, texture: Texture, unseen: set[str]) -> Texture:
    kept = [name for name in texture.colors or () if name not in unseen]
    others = [name for name in PALETTE if name not in unseen and name not in kept]
    fresh = iter(rng.permutation(others).tolist())
    return replace(texture, colors=tuple(name if name in kept else next(fresh) for name in texture.colors or ()))


def _two_colors(rng: np.random.Generator, used: set[str] | None = None) -> tuple[str, str]:
    names = [name for name in PALETTE if name not in (used or ())]
    first, second = rng.choice(len(names), 2, replace=False)
    return names[first], names[second]


def _direction(rng: np.random.Generator, shortest: float, longest: float) -> Vector:
    length, angle = rng.uniform(shortest, longest), rng.uniform(0, 2 * np.pi)
    return float(length * np.cos(angle)), float(length * np.sin(angle))


def _pair(rng: np.random.Generator, limit: float) -> Vector:
    x, y = rng.uniform(-limit, limit, 2)
    return float(x), float(y)
