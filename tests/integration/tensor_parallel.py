"""For worker scripts: a model that two ranks share, and what DeepSpeed asks about that."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from adamw_jobs import WIDTH
from torch import Tensor


class TensorParallel:
    """An ``mpu``: all ranks hold parts of one model, and each is alone with its data."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.whole = dist.new_group(range(self.world_size))
        self.alone = [dist.new_group([rank]) for rank in range(self.world_size)][self.rank]

    def get_model_parallel_rank(self) -> int:
        return self.rank

    def get_model_parallel_world_size(self) -> int:
        return self.world_size

    def get_model_parallel_group(self) -> Any:
        return self.whole

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.alone


class _SumOfGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        return inputs.view_as(inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class _SumOfOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        total = inputs.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class SharedModel(torch.nn.Module):
    """A layer that every rank has, and one of which each has a part of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(WIDTH, 5)
        torch.manual_seed(2 + dist.get_rank())
        self.part = torch.nn.Linear(5, WIDTH, bias=False)
        self.part.weight.model_parallel = True  # type: ignore[assignment]

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the loss on inputs of shape (batch, WIDTH), the same on every rank."""
        hidden = _SumOfGradients.apply(torch.tanh(self.first(inputs)))
        outputs: Tensor = _SumOfOutputs.apply(self.part(hidden))
        return (outputs.float() - inputs.float()).square().mean()
