"""The benchmark's fixed lists of edits of procedural scenes, and their exact ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from common.errors import UserError
from common.files import hash_json, write_text_atomic
from dataset.images import image_files, read_image
from dataset.job import hash_pixels
from loraedit_ext.evaluation.captions import caption
from loraedit_ext.evaluation.rendering import Rendered, render
from loraedit_ext.evaluation.scenes import Scene, random_edit, random_scene
from loraedit_ext.evaluation.tasks import edit_boxes, to_uint8, write_task

EditKind = Literal["recolour", "retexture", "reshape"]
MotionKind = Literal["translating", "rotating", "turning", "emerging"]

EDITS: dict[EditKind, Literal["color", "texture", "shape"]] = {
    "recolour": "color", "retexture": "texture", "reshape": "shape",
}  # fmt: skip
FRAMES = 13
SIZE = (128, 128)
REFERENCES = (6, 12)
"""Later frames that the user has edited too."""
OBJECT = 0.5
"""Share of a pixel from which on it counts as the object's."""
IDENTITY = "task.sha256"
"""File beside the job: what its media were rendered from."""
CHANGED = 24
"""Grey levels of a channel by which truth and source differ where the edit can be told from the source."""


@dataclass(frozen=True)
class SuiteTask:
    """One edit of the benchmark: a scene drawn from a seed, with what it was drawn to show."""

    edit: EditKind
    motion: MotionKind
    several: bool
    """More objects than the motion needs: two, or three where the target emerges from behind another."""
    panning: bool
    seed: int
    """Of scene and edit; pretraining never draws it."""

    @property
    def name(self) -> str:
        count, camera = "several" if self.several else "one", "panning" if self.panning else "static"
        return f"{self.edit}-{self.motion}-{count}-{camera}-{self.seed}"

    @property
    def objects(self) -> int:
        return 1 + self.several + (self.motion == "emerging")

    @property
    def open_background(self) -> bool:
        """Whether the first frame leaves open what the background will be: the camera pans, or others move."""
        return self.panning or self.objects > 1

    @property
    def scene(self) -> Scene:
        return random_scene(self.seed, objects=self.objects, kind=self.motion, panning=self.panning)

    @property
    def edited(self) -> Scene:
        return random_edit(self.scene, self.seed, (EDITS[self.edit],))


def _tasks(rows: Sequence[tuple[EditKind, MotionKind, bool, bool, int]]) -> tuple[SuiteTask, ...]:
    return tuple(SuiteTask(*row) for row in rows)


# Seeds are the first from 1000 (5000) on whose object stays in view, is neither tiny nor most of the picture, and whose
# edit is plain to see; no model had a say.
BENCHMARK = _tasks([
    ("recolour", "translating", False, False, 1000), ("recolour", "translating", True, True, 1001),
    ("recolour", "rotating", True, False, 1002), ("recolour", "rotating", False, True, 1003),
    ("recolour", "turning", False, False, 1004), ("recolour", "turning", True, True, 1008),
    ("recolour", "emerging", True, False, 1011), ("recolour", "emerging", False, True, 1012),
    ("retexture", "translating", True, False, 1013), ("retexture", "translating", False, True, 1014),
    ("retexture", "rotating", False, False, 1015), ("retexture", "rotating", True, True, 1016),
    ("retexture", "turning", True, False, 1038), ("retexture", "turning", False, True, 1047),
    ("retexture", "emerging", False, False, 1048), ("retexture", "emerging", True, True, 1049),
    ("reshape", "translating", False, False, 1050), ("reshape", "translating", True, True, 1051),
    ("reshape", "rotating", True, False, 1052), ("reshape", "rotating", False, True, 1054),
    ("reshape", "turning", False, False, 1151), ("reshape", "turning", True, True, 1286),
    ("reshape", "emerging", True, False, 1288), ("reshape", "emerging", False, True, 1293),
])  # fmt: skip
"""The benchmark: three edits x four motions x still and panning camera, half of them with more objects."""
# Seeds are the first from 2000 on that meet the bounds of its test, and again no model had a say.
REPLICATION = _tasks([
    ("recolour", "translating", True, False, 2000), ("recolour", "translating", False, True, 2001),
    ("recolour", "rotating", False, False, 2002), ("recolour", "rotating", True, True, 2003),
    ("recolour", "turning", True, False, 2012), ("recolour", "turning", False, True, 2015),
    ("recolour", "emerging", False, False, 2017), ("recolour", "emerging", True, True, 2018),
    ("retexture", "translating", False, False, 2019), ("retexture", "translating", True, True, 2020),
    ("retexture", "rotating", True, False, 2021), ("retexture", "rotating", False, True, 2022),
    ("retexture", "turning", False, False, 2036), ("retexture", "turning", True, True, 2037),
    ("retexture", "emerging", True, False, 2038), ("retexture", "emerging", False, True, 2040),
    ("reshape", "translating", True, False, 2041), ("reshape", "translating", False, True, 2042),
    ("reshape", "rotating", False, False, 2043), ("reshape", "rotating", True, True, 2044),
    ("reshape", "turning", True, False, 2107), ("reshape", "turning", False, True, 2332),
    ("reshape", "emerging", False, False, 2338), ("reshape", "emerging", True, True, 2340),
])  # fmt: skip
"""The other half of the design (one object where the benchmark has several), drawn after the claims were made on the first."""
VALIDATION = _tasks([
    ("recolour", "translating", False, False, 5000), ("recolour", "turning", True, True, 5016),
    ("recolour", "emerging", True, False, 5018), ("retexture", "rotating", True, True, 5019),
    ("retexture", "turning", True, False, 5025), ("reshape", "translating", True, True, 5026),
    ("reshape", "rotating", True, False, 5028), ("reshape", "emerging", False, True, 5031),
])  # fmt: skip
"""For choosing defaults; shares no scene with the benchmark."""
QUICK = tuple(BENCHMARK[index] for index in (0, 3, 12, 23))
"""Four of the benchmark, with every edit and motion, two still and two panning."""
GUARD = QUICK[:2]
"""Two of the quick ones, for the test that guards the pipeline."""

LISTS = {
    "benchmark": BENCHMARK, "replication": REPLICATION, "both": (*BENCHMARK, *REPLICATION), "validation": VALIDATION,
    "quick": QUICK, "guard": GUARD,
}  # fmt: skip


def chosen(wanted: str | Sequence[str]) -> tuple[SuiteTask, ...]:
    """The tasks of a list, or those of these names.

    Raises:
        UserError: there is no such list or task.
    """
    if isinstance(wanted, str) and wanted in LISTS:
        return LISTS[wanted]
    known = {task.name: task for task in (*BENCHMARK, *REPLICATION, *VALIDATION)}
    names = [wanted] if isinstance(wanted, str) else wanted
    if unknown := [name for name in names if name not in known]:
        raise UserError(
            f"suite.tasks: no list or task `{unknown[0]}`. Lists: {', '.join(LISTS)}; tasks are named like "
            f"`{BENCHMARK[0].name}`."
        )
    return tuple(known[name] for name in names)


class TaskMedia:
    """The pixels of a task: what the user has, and the truth that the user has not.

    Videos are uint8 (F, H, W, 3); regions bool (F, H, W).
    """

    def __init__(self, task: SuiteTask) -> None:
        self.task = task
        self._before, self._after = _render(task.scene), _render(task.edited)

    @cached_property
    def source(self) -> np.ndarray:
        return to_uint8(self._before.video)

    @cached_property
    def truth(self) -> np.ndarray:
        return to_uint8(self._after.video)

    @cached_property
    def preserve(self) -> np.ndarray:
        """True outside the box around the object."""
        return edit_boxes(self._before, self._after, self.task.scene.target) == 0

    @cached_property
    def object(self) -> np.ndarray:
        """True where the edited object is seen."""
        return self._after.visible[self.task.scene.target] > OBJECT

    @cached_property
    def identity(self) -> str:
        """Hash of pixels, captions and which frames are references: a change of the renderer makes another task."""
        words = [caption(scene, motion=False) for scene in (self.task.scene, self.task.edited)]
        return hash_json([*map(hash_pixels, (self.source, self.truth, self.preserve)), words, REFERENCES])

    @cached_property
    def changed(self) -> np.ndarray:
        """True where the edit plainly changes the picture: look, or where the object is."""
        return np.abs(self.truth.astype(np.int16) - self.source).max(-1) >= CHANGED


def _render(scene: Scene) -> Rendered:
    return render(scene, FRAMES, SIZE)


def write(task: SuiteTask, folder: Path) -> str:
    """Write the task as a user would bring it, unless it is there already; returns its identity."""
    identity = TaskMedia(task).identity
    marker = folder / IDENTITY
    if not marker.is_file() or marker.read_text(encoding="utf-8") != identity:
        write_task(folder, task.name, task.scene, task.edited, FRAMES, SIZE, REFERENCES)
        write_text_atomic(marker, identity)
    return identity


def read_frames(folder: Path) -> np.ndarray:
    """A folder of pictures as uint8 (F, H, W, 3)."""
    return np.stack([read_image(file) for file in image_files(folder)])
