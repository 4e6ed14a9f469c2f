"""HDR video as the standard-range picture that a model knows: light by ITU-R BT.2100, highlights rolled off, colours of BT.709.

Without it the codes of a phone's HDR clip would be taken for those of BT.709, and the picture would be pale.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import cv2
import numpy as np

Transfer = Literal["PQ", "HLG"]
PEAK = 1000.0
"""cd/m2 of the display that HLG is shown on (BT.2100, nominal); brighter light of PQ becomes white."""
WHITE = 203.0
"""cd/m2 of a white sheet of paper in HDR (BT.2408), the standard range's white."""
_GAMMA = 2.4  # of a standard display (BT.1886)
_LUMA = np.array([[0.2627, 0.6780, 0.0593]], np.float32)  # of BT.2020's primaries
_BRIGHTEST = 10_000.0  # that PQ can say
_TO_BT709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)
"""Linear light of BT.2020's primaries to BT.709's (inverse of BT.2087's)."""
_M1, _M2, _C1, _C2, _C3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128  # of PQ
_ROOTS = np.linspace(0, 1, 65536)  # where tables have entries: even in the root of the light, so that dark ones lie dense
_SYSTEM_GAIN = (PEAK * np.maximum(_ROOTS, 1e-3) ** 0.4).astype(np.float32)
_SHOWN = np.round(255 * _ROOTS ** (2 / _GAMMA)).astype(np.uint8)


def to_standard(codes: np.ndarray, transfer: Transfer) -> np.ndarray:
    """A frame as BT.709 shows it.

    What lies below a tenth of a display's peak stays what it was, brighter light is rolled off by BT.2390's curve, whose
    pixels keep the ratio of their channels. Colours outside of BT.709 are cut off.

    Args:
        codes: uint16 (H, W, 3), R'G'B' of BT.2100 over the full range.
        transfer: the curve that they follow.

    Returns:
        uint8 (H, W, 3).
    """
    light = _curve(transfer)[codes]
    if transfer == "HLG":  # of the scene; a display's follows from it with the luminance's gamma of 1.2
        light *= _looked_up(cv2.transform(light, _LUMA), _SYSTEM_GAIN, 1.0)[..., None]
    light = np.maximum(cv2.transform(light, _TO_BT709), 0)
    light *= _looked_up(light.max(axis=-1), _roll_off(), _BRIGHTEST)[..., None]
    return _looked_up(light, _SHOWN, WHITE)


def _looked_up(light: np.ndarray, table: np.ndarray, top: float) -> np.ndarray:
    """What a table from 0 to `top` has for each; powers, worked out anew, would take twice as long."""
    place = np.sqrt(light * np.float32((len(table) - 1) ** 2 / top))
    return table[np.minimum(place, len(table) - 1, out=place).astype(np.uint16)]


@lru_cache
def _curve(transfer: Transfer) -> np.ndarray:
    """float32 (65536,): light of each code; of PQ in cd/m2, of HLG relative to the scene's largest."""
    code = np.arange(65536) / 65535
    if transfer == "PQ":
        return _pq_light(code).astype(np.float32)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(code <= 0.5, code**2 / 3, (np.exp((code - c) / a) + b) / 12).astype(np.float32)


def _pq_light(code: np.ndarray) -> np.ndarray:
    """cd/m2 of PQ codes in [0, 1]."""
    root = code ** (1 / _M2)
    return 10_000 * (np.maximum(root - _C1, 0) / (_C2 - _C3 * root)) ** (1 / _M1)


def _pq_code(light: np.ndarray) -> np.ndarray:
    power = (light / 10_000) ** _M1
    return ((_C1 + _C2 * power) / (1 + _C3 * power)) ** _M2


@lru_cache
def _roll_off() -> np.ndarray:
    """By what light up to `_BRIGHTEST` is multiplied, so that `PEAK` and more comes to `WHITE` (BT.2390, 5.4.1)."""
    light = np.maximum(_BRIGHTEST * _ROOTS**2, 1e-6)
    top, white = _pq_code(np.array([PEAK, WHITE]))
    knee, level = 1.5 * white / top - 0.5, np.minimum(_pq_code(light) / top, 1)
    t = (level - knee) / (1 - knee)
    bent = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * white / top
    return np.where(level < knee, 1, _pq_light(np.maximum(bent, 0) * top) / light).astype(np.float32)
