"""Branches of every shape, and parameters with gradients, for tests of PathSwitchAdamW."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from pathswitch.kernels.layouts import StepScalars
from pathswitch.kernels.optimizer import PathSwitchAdamW
from pathswitch.schedule import BranchPath, MainPath, make_shape

SHAPES = {
    "linear": {},
    "cosine": {},
    "one_minus_sqrt": {},
    "exponential": {},
    "polynomial": {"power": 1.7},
    "knee": {"explore": 0.3},
    "harmonic": {},
    "multi_step": {"milestones": (0.3, 0.5, 0.9), "factors": (0.5, 0.2, 0.1)},
}
SIZES = [(300, 7), (7,), (1,), (16385,), (0,)]


def branch(name: str, decay_steps: int = 17) -> BranchPath:
    shape, main = make_shape(name, SHAPES[name]), MainPath(3e-3, 1e-4, warmup_steps=5)
    final_lr = {"harmonic": 3e-5, "multi_step": 3e-4}.get(name, 0.0)
    return BranchPath(main, fork_step=9, decay_steps=decay_steps, shape=shape, final_lr=final_lr)


def parameters(dtype: torch.dtype = torch.float32, sizes: Any = SIZES) -> list[Parameter]:
    torch.manual_seed(3)
    return [Parameter(torch.randn(size).to(dtype)) for size in sizes]


def set_gradients(step: int, *lists: list[Parameter], scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for same in zip(*lists, strict=True):
        gradient = torch.randn(same[0].shape, generator=generator) * 10.0 ** (step % 4 - 2) * scale
        for p in same:
            p.grad = gradient.to(p.dtype)


def lr_of_last_step(optimizer: PathSwitchAdamW) -> float:
    assert optimizer._device_state is not None
    return StepScalars.from_buffer_copy(optimizer._device_state.scalars[0].numpy().tobytes()).lr
