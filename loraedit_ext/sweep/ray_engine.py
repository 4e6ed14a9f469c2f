"""The engine of sweeps over many hosts: Ray places the trials, and starts those again whose worker was killed.

Trials, folders and records are those of the local engine; the folders lie on a file system that all hosts share.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from common.errors import UserError
from common.files import write_json_atomic, write_text_atomic
from loraedit_ext.sweep.results import RECORD, Trial
from loraedit_ext.sweep.trial import TrialRun

LOCAL = "local"
"""Address of a Ray of its own on this machine, which ends with the sweep and listens on no network."""
RETRIES = 3
"""Times that a trial is started again whose worker was killed."""
GRACE = 60
"""Seconds that interrupted trials have to write their records."""
VISIBLE = 120
"""Seconds within which a file of another host must be seen here; NFS remembers for about a minute that there was none."""
STORE = 80_000_000
"""Bytes of Ray's object store, near its least: nothing but records passes through it."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_task_oom_retries": str(RETRIES),
}
"""No usage reports; trials that Ray's memory monitor kills are retried as often as others, not for ever."""
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What keeps Ray on 127.0.0.1, on Linux too: it translates a `_node_ip_address` of 127.0.0.1 to the network's."""


class StepKilled(Exception):
    """A step was ended by SIGKILL, as by the kernel when memory runs out; not by its own doing."""


class RayEngine:
    """Connects to Ray when it is made.

    Args:
        address: `host:port` of a cluster, `auto` for the one this host belongs to, or `local`.
        jobs: trials at a time; None: as many as there are GPUs, or CPUs where there are none.

    Raises:
        UserError: Ray is not installed, or there is no such cluster.
    """

    def __init__(self, address: str, jobs: int | None) -> None:
        self.address, self.jobs = address, jobs
        self._ray = _connect(address, jobs)
        self.resources = share(node["Resources"] for node in self._ray.nodes() if node["Alive"])

    def __str__(self) -> str:
        kind = "GPU" if self.resources.get("num_gpus") else "CPU"
        count = int(self._ray.cluster_resources().get(kind, 0))
        hosts = sum(node["Alive"] for node in self._ray.nodes())
        return f"{min(count, self.jobs or count)} at a time by Ray ({self.address}: {hosts} host(s), {count} {kind}s)"

    def run(self, trials: Sequence[Trial], steps: Sequence[str]) -> Iterator[Trial]:
        """Yield each trial when it has ended; closing the generator ends those that run, and the connection."""
        ray = self._ray
        task = ray.remote(run_trial).options(
            max_retries=RETRIES, retry_exceptions=[StepKilled], **self.resources
        )
        waiting, running = list(reversed(trials)), {}
        try:
            while waiting or running:
                while waiting and len(running) < (self.jobs or len(trials)):
                    trial = waiting.pop()
                    running[task.remote(trial, list(steps))] = trial
                (done,), _ = ray.wait(list(running))
                trial = running.pop(done)
                self._settle(trial, done, steps)
                yield trial
        finally:
            for reference in running:
                ray.cancel(reference)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=GRACE)
            ray.shutdown()
            for trial in running.values():
                mark_interrupted(trial)

    def _settle(self, trial: Trial, reference: Any, steps: Sequence[str]) -> None:
        """Have the record of an ended trial here, also if nobody was left to write it."""
        try:
            expected = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            record = trial.record()
            if record.get("status") == "failed":
                return  # its own account is better: the last attempt's step, killed
            done = record.get("done", [])
            failed = next(step for step in steps if step not in done)
            trial.folder.mkdir(parents=True, exist_ok=True)
            write_text_atomic(trial.log(failed), f"Ray gave the trial up: {error}\n")
            write_json_atomic(trial.folder / RECORD, trial.facts() | record | {
                "done": done, "status": "failed", "failed": failed, "exit_status": None,
            })  # fmt: skip
            return
        deadline = time.monotonic() + VISIBLE
        while not {key: expected[key] for key in ("status", "attempts", "host")}.items() <= trial.record().items():
            if time.monotonic() > deadline:
                raise UserError(f"{trial.folder}: the trial has ended on {expected['host']}, but its record is not seen "
                                "here. output_dir must lie on a file system that all hosts share, at the same path.")
            time.sleep(1)


def mark_interrupted(trial: Trial) -> None:
    """Correct the record of a trial whose worker was ended before it could: a cancelled task gets one exception, and code
    that Python runs in between, such as a finaliser, may swallow it."""
    record = trial.record()
    if record.get("status") == "running":
        write_json_atomic(trial.folder / RECORD, record | {"status": "interrupted"})


def run_trial(trial: Trial, steps: Sequence[str]) -> dict[str, Any]:
    """What Ray runs on a worker: the steps of a trial, with the GPU that Ray lets the worker see; returns the record.

    Raises:
        StepKilled: a step was killed; Ray tries again.
    """
    record = TrialRun(trial, steps, os.environ).run()
    if record["status"] == "failed" and record["exit_status"] == -signal.SIGKILL:
        raise StepKilled(f"{trial.name}: {record['failed']}.py was killed")
    return record


def share(nodes: Iterable[Mapping[str, float]]) -> dict[str, int]:
    """What a trial asks for: a GPU with its share of the CPUs, or one CPU where no host has a GPU.

    Args:
        nodes: the resources of each host.
    """
    with_gpus = [resources for resources in nodes if resources.get("GPU", 0) >= 1]
    if not with_gpus:
        return {"num_cpus": 1}
    return {"num_gpus": 1, "num_cpus": min(int(node.get("CPU", 0) // node["GPU"]) for node in with_gpus)}


def _connect(address: str, jobs: int | None) -> Any:
    """Import Ray and connect, or start it on this machine alone; returns the package."""
    is_local = address == LOCAL
    # Ray reads these while it is imported.
    for name, value in (ENVIRONMENT | (LOOPBACK if is_local else {})).items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "engine = 'ray' needs Ray, which is not installed. Run: pip install -c requirements.lock "
            "-r requirements-ray.txt (on every host)."
        ) from error
    own = {"num_cpus": jobs, "object_store_memory": STORE, "include_dashboard": False} if is_local else {}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"address = {address!r}: no connection to Ray: {error} Start it with `ray start --head` on one host and "
            "`ray start --address=HOST:PORT` on the others, or set address = 'local' (docs/clusters.md)."
        ) from error
    signal.signal(signal.SIGTERM, handler)  # Ray's would leave without ending the trials
    return ray
