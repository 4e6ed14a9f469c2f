"""The families of models that the project knows: apart from the configuration, so that `--help` need not wait for torch."""

from __future__ import annotations

from typing import Literal

Family = Literal["wan", "hunyuan-video"]
