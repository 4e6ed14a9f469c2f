"""Host memory that a GPU copies from and to: page-locked as far as the system allows it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from common.errors import first_line

_log = logging.getLogger(__name__)


class HostAllocator:
    """Allocates host memory, page-locked if it is for a GPU.

    Args:
        device: whose copies it serves.
        purpose: setting that needs the memory, named in the warning.

    Attributes:
        allocated: bytes so far.
    """

    def __init__(self, device: torch.device, purpose: str) -> None:
        self.purpose = purpose
        self.allocated = 0
        self._pinned = device.type == "cuda"

    def allocate(self, size: int) -> Tensor:
        """`size` bytes. If the system refuses to page-lock more, ordinary memory from then on, with one warning.

        Torch rounds page-locked memory up to a power of two.
        """
        memory = self._page_locked(size) if self._pinned else None
        if memory is None:
            memory = torch.empty(size, dtype=torch.uint8)
        self.allocated += size
        return memory

    def _page_locked(self, size: int) -> Tensor | None:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            self._pinned = False
            _log.warning(
                "%s: the system page-locks %.1f GB of host memory and no more (%s). The rest is copied from and to "
                "ordinary memory, which is slower; `python -m loraedit_ext.doctor` says what can be done.",
                self.purpose, self.allocated / 1e9, first_line(error),
            )
            return None
