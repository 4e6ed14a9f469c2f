"""DeepSpeed, and nothing of it elsewhere: processes, the split into stages, the engine.

Defects of its pipelines are avoided rather than patched: one float tensor with gradient crosses a
boundary (`models.layers.freeze`), clipping is ours (`loraedit_ext.training.optim.GradientGuard`), full state is ours
(`loraedit_ext.training.state`), and its config holds no precision section.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.layers import PipelineLayer

_ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What a launcher would tell a process that has no others; there is nobody to meet at any port."""
_TIMEOUT = timedelta(hours=6)
"""How long a process waits for the others, which all do while the main one encodes, perhaps on its CPU. DeepSpeed's own limit
is 10 minutes."""


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int
    local_rank: int
    size: int
    device: torch.device
    local_size: int = 1
    """Processes on this host."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            torch.distributed.barrier()

    def broadcast(self, value: Any) -> Any:
        """The main process's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def owns(self, number: int) -> bool:
        """Whether a piece of work that is dealt out by turns is this process's."""
        return number % self.size == self.rank

    def share(self, value: Tensor, number: int) -> Tensor:
        """What the owner of a piece of work made of it, everywhere.

        Args:
            value: the result; where another process owns it, a tensor of its shape and dtype, which is overwritten.
        """
        if self.size == 1:
            return value
        shared = value.contiguous()
        torch.distributed.broadcast(shared, src=number % self.size)
        return shared


def alone(device: torch.device | None = None) -> World:
    """A process that has no others, on `device`, by default a GPU if there is one."""
    return World(0, 0, 1, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def together() -> Iterator[World]:
    """Join the launcher's process group; started with plain `python`, do without a group, and without DeepSpeed."""
    if "RANK" in os.environ:
        with distributed() as world:
            yield world
    else:
        yield alone()


@contextlib.contextmanager
def distributed() -> Iterator[World]:
    """Join the launcher's process group, or be a group of one when started with plain `python`.

    Every rank leaves through a barrier: without it a good run can end with a crash in the teardown.
    """
    alone = dict(_ALONE) if "RANK" not in os.environ else {}
    if not torch.cuda.is_available() and "DS_ACCELERATOR" not in os.environ:
        alone["DS_ACCELERATOR"] = "cpu"
    os.environ |= alone
    try:
        world = _join(alone="RANK" in alone)
        yield world
        world.barrier()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in alone:
            os.environ.pop(name, None)


def _join(alone: bool) -> World:
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    local_rank = int(os.environ["LOCAL_RANK"])
    if accelerator.device_name() == "cpu":
        # Else DeepSpeed compiles a C++ all-reduce at start (a minute, and fatal without ninja) that we never use.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = torch.device("cpu")
    else:
        accelerator.set_device(local_rank)
        device = torch.device(accelerator.device_name(local_rank))
    backend = accelerator.communication_backend_name()
    if alone:
        # In memory instead of at a port, which another run may take at the same moment, and which all hosts could reach.
        store, own = torch.distributed.HashStore(), None if device.type == "cpu" else device
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1, device_id=own)
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=_TIMEOUT)
    return _world(device)


def _world(device: torch.device) -> World:
    """What the launcher says of this process. Of the number on this host torchrun and DeepSpeed speak differently."""
    local_size = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    rank, local_rank, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return World(rank, local_rank, size, device, int(local_size))


def planned_world(stages: int) -> World:
    """The world of a run that is planned but not started: the launcher's, or else as few processes as the stages need, here."""
    cpu = torch.device("cpu")
    return _world(cpu) if "RANK" in os.environ else World(0, 0, stages, cpu, stages)


def split(layers: Sequence[PipelineLayer], stages: int, method: str, cuts: Sequence[int]) -> list[int]:
    """Bounds of each stage: stage k owns layers bounds[k] to bounds[k+1].

    Raises:
        UserError: a stage would hold no transformer block, so nothing to train.
    """
    from deepspeed.runtime.utils import partition_balanced, partition_uniform

    if method == "manual":
        bounds = [0, *cuts, len(layers)]
    elif method == "uniform":
        bounds = partition_uniform(num_items=len(layers), num_parts=stages)
    else:
        bounds = partition_balanced(weights=[sum(p.numel() for p in layer.parameters()) for layer in layers],
                                    num_parts=stages)
    for stage in range(stages):
        if min(bounds[stage + 1], len(layers) - 1) <= max(bounds[stage], 1):
            raise UserError(
                f"pipeline stage {stage} of {stages} would hold layers {bounds[stage]}..{bounds[stage + 1] - 1} and no "
                f"transformer block, so nothing to train. Lower pipeline_stages (the model has {len(layers) - 2} "
                "blocks) or set partition_split."
            )
    return bounds


def check_world(world: World, stages: int) -> int:
    """Replicas (data parallelism) that `pipeline_stages` leaves."""
    if world.size % stages:
        raise UserError(
            f"pipeline_stages = {stages} does not divide the {world.size} processes. Start a multiple of {stages}, "
            f"e.g. deepspeed --num_gpus {stages} train.py ..."
        )
    return world.size // stages


class Engine:
    """A DeepSpeed pipeline engine over the layers of this process's stage."""

    def __init__(
        self,
        layers: Sequence[PipelineLayer],
        bounds: list[int],
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
        micro_batch_size: int,
        accumulation: int,
        compute_dtype: torch.dtype,
    ) -> None:
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": micro_batch_size,
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": 0.0,
            "steps_per_print": 1 << 30,
            "pipeline": {"use_reentrant": False},
        }
        with _quiet():
            module = _stage_module(layers, bounds, loss, compute_dtype)
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self.device = self.engine.device
        self._shapes: Any = None

    @property
    def stage(self) -> int:
        return self.engine.grid.get_pipe_parallel_rank()

    @property
    def replica(self) -> int:
        return self.engine.grid.get_data_parallel_rank()

    def sum_over_stages(self, value: Tensor) -> Tensor:
        """Sum a scalar over the pipeline stages of this replica."""
        if self.engine.num_stages > 1:
            torch.distributed.all_reduce(value, group=self.engine.grid.get_pipe_parallel_group())
        return value

    def gather_stages(self, value: Any) -> list[Any]:
        """A picklable value of every pipeline stage of this replica, first stage first; there alone, elsewhere nothing.

        NCCL sends it through the GPU, so only the process that wants the values makes room for them.
        """
        stages = self.engine.num_stages
        if stages == 1:
            return [value]
        found: list[Any] | None = [None] * stages if self.stage == 0 else None
        first = self.engine.grid.stage_to_global(0)
        torch.distributed.gather_object(value, found, dst=first, group=self.engine.grid.get_pipe_parallel_group())
        return found or []

    def train_step(self, batches: Iterator[Any], shapes: Any) -> float:
        """One optimizer step; the mean loss over micro-batches and replicas.

        Args:
            batches: this replica's micro-batches.
            shapes: anything that changes when the batches' shapes do, the same on every rank.
        """
        self._expect(shapes)
        loss = float(self.engine.train_batch(data_iter=batches))
        # DeepSpeed keeps the last outputs and loss, and its hooks on these keep the engine: a circle through C++ that no
        # garbage collector sees. A process that trains again would keep the model and the threads of every run before.
        outputs = self.engine.pipe_buffers["outputs"]
        outputs[:] = [None] * len(outputs)
        self.engine.loss = None
        return loss

    def evaluate(self, batches: Iterator[Any], count: int, shapes: Any) -> float:
        """Mean loss over `count` micro-batches, without gradients."""
        self._expect(shapes)
        return float(self.engine.eval_batch(batches, num_micro_batches=count))

    def predict(self, inputs: tuple[Tensor, ...], shape: tuple[int, ...], shapes: Any) -> Tensor:
        """The model's output for one micro-batch, fp32, on every process of this replica, without gradients.

        Args:
            inputs: of the first layer; every process has them.
            shape: of the output.
            shapes: as for `train_step`.
        """
        self._expect(shapes)
        # The labels only keep DeepSpeed's bookkeeping to scalars: without a loss it sums up whole outputs.
        output = torch.zeros(shape, device=self.device)
        _, found = self.engine.eval_batch(
            iter([(inputs, (output,))]), return_logits=True, num_micro_batches=1
        )
        output = output if found is None else found.float()
        if self.engine.num_stages > 1:
            last = self.engine.grid.stage_to_global(self.engine.num_stages - 1)
            torch.distributed.broadcast(output, src=last, group=self.engine.grid.get_pipe_parallel_group())
        return output

    def _expect(self, shapes: Any) -> None:
        if self._shapes is not None and self._shapes != shapes:
            self.engine.reset_activation_shape()
        self._shapes = shapes


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to the compute dtype; fp32 means none."""
    enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype=dtype if enabled else None, enabled=enabled)


def _stage_module(
    layers: Sequence[PipelineLayer], bounds: list[int], loss: Callable[..., Tensor], dtype: torch.dtype
) -> nn.Module:
    from deepspeed.runtime.pipe.module import PipelineModule

    class StageModule(PipelineModule):
        """DeepSpeed's module with the split decided by us, before any weight is read."""

        def _partition_layers(self, method: str = "") -> None:
            self.parts = bounds
            stage = self._grid.get_stage_id()
            self._set_bounds(start=bounds[stage], stop=bounds[stage + 1])

        def forward(self, inputs: Any) -> Any:
            first = inputs[0] if isinstance(inputs, tuple) else inputs
            with autocast(first.device, dtype):
                return super().forward(inputs)

    return StageModule(layers=list(layers), num_stages=len(bounds) - 1, loss_fn=loss, activation_checkpoint_interval=0)


def stage_of(world: World, stages: int) -> int:
    """The pipeline stage of this process in DeepSpeed's layout: the data axis varies fastest."""
    return world.rank // (world.size // stages)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """DeepSpeed prints its partition to stdout; ours is in the plan."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
