"""The operators obey torch's rules for operators: schema, fake tensors, tracing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pathswitch.kernels import ops
from pathswitch.kernels.layouts import GroupSettings, StepScalars, struct_bytes
from pathswitch.kernels.paths import constant_path


def lists(numels: list[int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.rand(numel).to(dtype) for numel in numels]


@pytest.mark.parametrize("kind", ["plain", "low", "average"])
def test_adamw(kind: str) -> None:
    numels = [5, 0, 2100]
    lows = lists(numels, torch.bfloat16) if kind == "low" else []
    averages = lists(numels) if kind == "average" else []
    scalars = struct_bytes(StepScalars(1e-3, 1, 0.9, 0.1, 0.95, 0.05, 1e-8, 1e-4, 1e-3, 1.1, 0.01)).view(1, -1)
    arguments = (*(lists(numels) for _ in range(4)), lows, averages, [0, 0, 0], scalars)
    torch.library.opcheck(ops.adamw_, arguments)


def test_prepare() -> None:
    path = struct_bytes(constant_path(1.0).descriptor)
    counters, averaging = torch.zeros(2, dtype=torch.int64), torch.zeros(32, dtype=torch.uint8)
    groups = struct_bytes(GroupSettings(1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, 0)).view(1, -1)
    steps = [torch.zeros(()), torch.ones(())]
    scalars = torch.zeros(2, 64, dtype=torch.uint8)
    sums = torch.ones(1, dtype=torch.float64)
    tables = (None, None, sums, torch.ones(1), torch.zeros(1))
    torch.library.opcheck(ops.prepare_, (steps, [0, 0], path, counters, groups, averaging, *tables, scalars))
    ops.prepare_(steps, [0, 0], path, counters, groups, averaging, *tables, scalars)
    assert (counters.tolist(), float(steps[0]), float(steps[1])) == ([1, 0], 1.0, 2.0)


def test_sum_of_squares_and_digest() -> None:
    torch.library.opcheck(ops.sum_of_squares, (lists([3, 20000], torch.bfloat16),))
    torch.library.opcheck(ops.digest, (torch.rand(3000), 7))
