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


def end_with(parent: int) -> None:
    """Ask the kernel for SIGKILL at the death of the parent, a process id.

    Raises:
        OSError: the kernel refuses.
        SystemExit: it has died before the kernel was asked.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        raise SystemExit


def main(arguments: list[str]) -> None:
    """Bind this process to its parent, then become the program.

    Raises:
        OSError: the kernel refuses, or the program cannot be started.
    """
    parent, *program = arguments
    end_with(int(parent))
    os.execv(program[0], program)


if __name__ == "__main__":
    main(sys.argv[1:])
