"""The tensors of one shard inside larger ones, and the instruction sets that this machine can run."""

from __future__ import annotations

import torch
from torch import Tensor

from pathswitch.kernels.build import best_isa
from pathswitch.kernels.layouts import Kernels, ShardTensors, StepScalars, struct_bytes

SCALARS = StepScalars(1e-3, 0.37, 0.9, 0.1, 0.95, 0.05, 1e-8, 1e-4, 1e-3, 1.1, 0.01)
GUARD = 3.0


def isas() -> list[str]:
    """The instruction sets of this machine: what it has not, it cannot run."""
    order = ["portable", "avx2", "avx512"]
    return order[: order.index(best_isa()) + 1]


class Arena:
    """The tensors of one shard inside larger ones, at any offset, with guards on both sides."""

    def __init__(self, numel: int, grad: torch.dtype, low: torch.dtype | None, offset: int, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.numel, self.offset = numel, offset
        self.buffers: list[Tensor] = []
        weight, exp_avg, exp_avg_sq, average = (self._piece(torch.float32) for _ in range(4))
        weight.normal_(generator=self.generator)
        exp_avg.normal_(0, 0.01, generator=self.generator)
        exp_avg_sq.uniform_(0, 1e-3, generator=self.generator)
        average.copy_(weight)
        gradient = self._piece(grad)
        gradient.copy_(torch.randn(numel, generator=self.generator))
        out = None if low is None else self._piece(low)
        self.shard = ShardTensors(gradient, weight, exp_avg, exp_avg_sq, out, average, 0)

    def _piece(self, dtype: torch.dtype) -> Tensor:
        buffer = torch.full((self.numel + 16,), GUARD, dtype=dtype)
        self.buffers.append(buffer)
        return buffer[self.offset : self.offset + self.numel]

    def guards_hold(self) -> bool:
        edges = [torch.cat([b[: self.offset], b[self.offset + self.numel :]]) for b in self.buffers]
        return all(bool((edge == GUARD).all()) for edge in edges)


def update(kernels: Kernels, arena: Arena, scalars: StepScalars = SCALARS, *, average: bool = True) -> list[Tensor]:
    s = arena.shard
    shard = s if average else ShardTensors(s.grad, s.weight, s.exp_avg, s.exp_avg_sq, s.low, None, 0)
    kernels.adamw([shard], struct_bytes(scalars).view(1, -1))
    return arena.buffers
