"""Runs a program that ends when its parent does: `python with_parent.py PARENT_PID PROGRAM ARGUMENT ...` (Linux).

A killed process cannot end its children, and a trainer that outlives its sweep would write beside the one that replaces it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
"""prctl(2); kept over execve."""


def command(program: list[str]) -> list[str]:
    """The command line that runs `program` as a child of this process, and no longer than this thread lives."""
    return [sys.executable, "-I", str(Path(__file__).resolve()), str(os.getpid()), *program]


def main(arguments: list[str]) -> None:
    """Ask the kernel for SIGKILL at the parent's death, then become the program.

    Raises:
        OSError: the kernel refuses, or the program cannot be started.
    """
    parent, *program = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    # It may have died before the kernel was asked.
    if os.getppid() == int(parent):
        os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
