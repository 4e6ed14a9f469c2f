"""The engine of sweeps on one machine: trials side by side, one GPU each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from queue import SimpleQueue

from common.errors import UserError
from loraedit_ext.sweep.results import Trial
from loraedit_ext.sweep.trial import TrialRun


def slots(jobs: int | None) -> list[str | None]:
    """One entry for each trial that may run at a time: the GPU it sees, or None on a CPU.

    Raises:
        UserError: more trials at a time than GPUs.
    """
    gpus = _gpus()
    if not gpus:
        return [None] * (jobs or 1)
    if jobs and jobs > len(gpus):
        raise UserError(f"jobs = {jobs}, but there are {len(gpus)} GPUs, and a trial takes one of its own.")
    return list(gpus[:jobs])


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = [name for name in (visible or "").split(",") if name]
    count = torch.cuda.device_count()
    return named[:count] if visible is not None else [str(index) for index in range(count)]


class LocalEngine:
    """Threads that wait for the processes of trials.

    Args:
        jobs: trials at a time; None: one for each GPU, or one on a CPU.
    """

    def __init__(self, jobs: int | None) -> None:
        self.slots = slots(jobs)
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for slot in self.slots:
            self._free.put(slot)
        self._running: set[TrialRun] = set()
        self._stopping = False

    def __str__(self) -> str:
        return f"{len(self.slots)} at a time"

    def run(self, trials: Sequence[Trial], steps: Sequence[str]) -> Iterator[Trial]:
        """Yield each trial when it has ended; closing the generator ends those that run."""
        pool = ThreadPoolExecutor(len(self.slots))
        try:
            futures = {pool.submit(self._run, trial, steps): trial for trial in trials}
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        finally:
            self._stopping = True
            for run in list(self._running):
                run.stop()
            pool.shutdown(cancel_futures=True)

    def _run(self, trial: Trial, steps: Sequence[str]) -> None:
        gpu = self._free.get()
        run = TrialRun(trial, steps, self._environment(gpu))
        self._running.add(run)
        try:
            if not self._stopping:
                run.run()
        finally:
            self._running.discard(run)
            self._free.put(gpu)

    def _environment(self, gpu: str | None) -> dict[str, str]:
        environment = dict(os.environ)
        if gpu is None:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(self.slots))))
        else:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        return environment
