"""Which sample trains when: a schedule that depends on nothing but its arguments, and batches for DeepSpeed.

The schedule is a pure function of the step, so a run resumes in the middle, and on another number of stages,
replicas or micro-batches, with exactly the samples it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dataset.triple import EncodedTriple

Batch = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""Inputs of the first pipeline layer, and labels for the loss."""


@dataclass(frozen=True)
class Draw:
    """One training sample: its number within the training stage, which seeds its noise, and its triple."""

    number: int
    name: str


class SampleSchedule:
    """Distributes the steps of a training stage over groups of samples by weight, and the samples in turn.

    All samples of one step come from one group, because the micro-batches of a step must share a shape.

    Args:
        groups: names of the triples of each group.
        mix: weight of each group; a weighted round robin gives each its share at every point of the run.
        steps: optimizer steps.
        samples_per_step: micro-batch size x accumulation x replicas.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[str]], mix: Mapping[str, float], steps: int, samples_per_step: int
    ) -> None:
        self.groups = groups
        self.samples_per_step = samples_per_step
        self.group_of_step: list[str] = []
        self._turn_of_step: list[int] = []
        turns = dict.fromkeys(mix, 0)
        total = sum(mix.values())
        for step in range(steps):
            group = max(mix, key=lambda name: mix[name] / total * (step + 1) - turns[name])
            self.group_of_step.append(group)
            self._turn_of_step.append(turns[group])
            turns[group] += 1

    def __len__(self) -> int:
        return len(self.group_of_step)

    def draws(self, step: int) -> list[Draw]:
        """The samples of a step, over all micro-batches and replicas."""
        names = self.groups[self.group_of_step[step]]
        first = self._turn_of_step[step] * self.samples_per_step
        return [
            Draw(step * self.samples_per_step + index, names[(first + index) % len(names)])
            for index in range(self.samples_per_step)
        ]


@dataclass(frozen=True)
class Share:
    """Which part of a step's samples one replica gets, in which micro-batches."""

    micro_batch_size: int
    accumulation: int
    replica: int
    replicas: int

    @property
    def samples_per_step(self) -> int:
        return self.micro_batch_size * self.accumulation * self.replicas

    def micro_batches(self, draws: Sequence[Draw]) -> Iterator[Sequence[Draw]]:
        """This replica's micro-batches, interleaved so that replicas and accumulation are interchangeable."""
        for micro in range(self.accumulation):
            start = (micro * self.replicas + self.replica) * self.micro_batch_size
            yield draws[start : start + self.micro_batch_size]


class PipelineLoader:
    """Batches of one training stage for DeepSpeed's pipeline engine.

    First and last pipeline stage each iterate on their own; both derive the same noise from the draw's number.
    """

    def __init__(
        self,
        schedule: SampleSchedule,
        samples: Mapping[str, EncodedTriple],
        share: Share,
        collate: Callable[[Sequence[EncodedTriple], Sequence[int]], Batch],
    ) -> None:
        self.schedule = schedule
        self.samples = samples
        self.share = share
        self.collate = collate

    def step(self, step: int) -> Iterator[Batch]:
        """The micro-batches of this replica for one optimizer step."""
        for draws in self.share.micro_batches(self.schedule.draws(step)):
            yield self.collate([self.samples[d.name] for d in draws], [d.number for d in draws])
