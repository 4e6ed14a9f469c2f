"""Edited pictures that lie off their frames, as image models give them back, are brought into line; others are left alone."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from dataset.images import read_image
from loraedit_ext.evaluation.textures import ATLAS_PATH
from loraedit_ext.prepare.alignment import moved, slip

SIDE = 384
FRAME = cv2.resize(read_image(ATLAS_PATH), (SIDE, SIDE), interpolation=cv2.INTER_AREA)  # photographs side by side
EDITED = FRAME.copy()
EDITED[120:230, 90:240] = (250, 40, 30)


def put_off(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """As it comes back: moved, with made-up content at the borders, and saved as JPEG."""
    off = cv2.warpAffine(image, matrix, (SIDE, SIDE), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
    data = cv2.imencode(".jpg", off, [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    return cv2.imdecode(data, cv2.IMREAD_COLOR)


@pytest.mark.parametrize("matrix", [
    [[1, 0, 3.5], [0, 1, -2]], [[1.015, 0, 0], [0, 1.015, 0]], [[0.99, 0, 4], [0, 1, 1]], [[1.01, 0.01, 0], [-0.01, 1.01, 2]],
], ids=["shifted", "zoomed", "stretched", "turned"])
def test_a_picture_that_lies_off_is_brought_into_line(matrix):
    off = put_off(EDITED, np.array(matrix, float))
    found = slip(FRAME, off)
    corners = np.array([[0, 0, 1], [SIDE, 0, 1], [0, SIDE, 1], [SIDE, SIDE, 1]], float)
    there = corners @ cv2.invertAffineTransform(np.array(matrix, float)).T
    assert np.linalg.norm(corners @ found.matrix.T - there, axis=1).max() < 0.3
    assert found.pixels == pytest.approx(np.linalg.norm(there - corners[:, :2], axis=1).max(), abs=0.3)
    inner = np.s_[12:-12, 12:-12]
    error = [np.abs(image.astype(int) - EDITED)[inner].mean() for image in (off, moved(FRAME, off, found.matrix))]
    assert error[1] < 0.5 * error[0]


def test_what_comes_in_at_the_border_is_the_frames():
    whole = np.full_like(FRAME, 255)
    out = moved(FRAME, whole, np.array([[1, 0, 10], [0, 1, 0]], float))
    assert (out[:, :10] == FRAME[:, :10]).all()
    assert (out[:, 13:-3] == 255).all()


@pytest.mark.parametrize("other", [
    FRAME, EDITED, put_off(EDITED, np.eye(2, 3)), put_off(EDITED, np.array([[1, 0, 0.4], [0, 1, 0]])),
    put_off(EDITED, np.array([[1, 0, 60.0], [0, 1, 0]])), FRAME[::-1], 255 - FRAME, np.full_like(FRAME, 128),
], ids=["itself", "in line", "saved", "by less than a pixel", "far off", "another", "inverted", "plain"])
def test_others_are_left_alone(other):
    assert slip(FRAME, other) is None
