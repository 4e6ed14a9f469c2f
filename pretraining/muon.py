"""Muon: momentum whose matrix updates are orthogonalised, so that every direction of a weight learns at one rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pretraining import replicas

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: singular values end near 1 after five rounds
_ROUNDS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Approximate U V^T of matrix = U S V^T by Newton-Schulz rounds.

    Args:
        matrix: (..., rows, columns), float32; leading dimensions are a batch.

    Returns:
        the same shape, float32, singular values between about 0.6 and 1.3.
    """
    if matrix.shape[-2] > matrix.shape[-1]:
        return orthogonalise(matrix.mT).mT
    matrix = matrix / (torch.linalg.matrix_norm(matrix, keepdim=True) + 1e-7)
    return _by_gram(matrix) if matrix.shape[-1] >= 4 * matrix.shape[-2] else _directly(matrix)


def _directly(matrix: Tensor) -> Tensor:
    """The rounds as published, in bf16: twice as fast, and their error is within the tolerance anyway."""
    first, second, third = _QUINTIC
    matrix = matrix.bfloat16()
    for _ in range(_ROUNDS):
        gram = matrix @ matrix.mT
        matrix = first * matrix + (second * gram + third * gram @ gram) @ matrix
    return matrix.float()


def _by_gram(matrix: Tensor) -> Tensor:
    """The rounds on the small Gram matrix of a long matrix (a convolution's): a fraction of the products."""
    first, second, third = _QUINTIC
    gram = matrix @ matrix.mT
    total = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device).expand_as(gram)
    for _ in range(_ROUNDS):
        factor = second * gram + third * gram @ gram
        factor.diagonal(dim1=-2, dim2=-1).add_(first)
        total = factor @ total
        gram = factor @ gram @ factor.mT
    return total @ matrix


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolution weights (output channels against everything else).

    The update is scaled by 0.2 sqrt(longer side), which gives it AdamW's usual size (Liu et al. 2025), so one learning
    rate serves both optimizers. Of several processes each orthogonalises its share; gradients must be averaged before.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float | Tensor, momentum: float = 0.9, decay: float = 0.0) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Apply one Nesterov update; weights of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault((weight.shape[0], weight.numel() // weight.shape[0]), []).append(weight)
            updates = [self._directions(weights, shape, group["momentum"]) for shape, weights in by_shape.items()]
            _orthogonalise_shared(updates)
            for weights, update in zip(by_shape.values(), updates, strict=True):
                update.mul_(group["lr"] * 0.2 * max(update.shape[1:]) ** 0.5)
                changes = [change.view_as(weight) for weight, change in zip(weights, update, strict=True)]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["decay"])
                torch._foreach_sub_(weights, changes)

    def _directions(self, weights: list[nn.Parameter], shape: tuple[int, int], momentum: float) -> Tensor:
        """(weights, *shape), float32: where to go, before it is orthogonalised."""
        for weight in weights:
            if "momentum" not in self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        gradients, means = [weight.grad for weight in weights], [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, means, momentum)
        return torch.stack([direction.reshape(shape) for direction in directions]).float()


def _orthogonalise_shared(stacks: list[Tensor]) -> None:
    """Orthogonalise every matrix in place; each process does its share, dealt out over all stacks."""
    dealt = 0
    for stack in stacks:
        mine = slice((replicas.rank() - dealt) % replicas.count(), None, replicas.count())
        dealt += len(stack)
        found = orthogonalise(stack[mine])
        stack.zero_()[mine] = found
    replicas.add(stacks)


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters that Muon takes (true matrices and convolutions) and the rest, for AdamW."""
    matrices, rest = [], []
    for weight in module.parameters():
        if weight.requires_grad:
            rows = weight.shape[0] if weight.ndim else 1
            wide = weight.ndim >= 2 and min(rows, weight.numel() // max(rows, 1)) >= 8
            (matrices if wide else rest).append(weight)
    return matrices, rest
