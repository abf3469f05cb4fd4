"""The kernels as torch operators ``torch.ops.pathswitch.*``, which choose the backend by the tensors' device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from pathswitch.kernels.cpu import cpu_kernels
from pathswitch.kernels.layouts import Kernels, ShardTensors, StepState


@cache
def _cuda_kernels(device_index: int) -> Kernels:
    from pathswitch.kernels.cuda import CudaKernels

    return CudaKernels(torch.device("cuda", device_index))


def backend(device: torch.device) -> Kernels:
    """Return the compiled kernels for a device; they are compiled if they are not there.

    Raises:
        KernelError: they cannot be compiled or loaded.
    """
    return cpu_kernels() if device.type == "cpu" else _cuda_kernels(device.index or 0)


@torch.library.custom_op("pathswitch::sum_of_squares", mutates_args=())
def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, float64[1], the same bits on every backend."""
    out = torch.zeros(1, dtype=torch.float64, device=tensors[0].device)
    backend(tensors[0].device).norm(tensors, out)
    return out


@sum_of_squares.register_fake
def _(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(1, dtype=torch.float64)


@torch.library.custom_op("pathswitch::digest", mutates_args=())
def digest(tensor: Tensor, first_index: int) -> Tensor:
    """Return the digest, int64[2], of a tensor's elements, the first of which has the index ``first_index``."""
    out = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    backend(tensor.device).digest(tensor, first_index, out)
    return out


@digest.register_fake
def _(tensor: Tensor, first_index: int) -> Tensor:
    return tensor.new_empty(2, dtype=torch.int64)


@torch.library.custom_op("pathswitch::prepare_", mutates_args=("steps", "counters", "scalars"))
def prepare_(
    steps: Sequence[Tensor],
    parameter_groups: Sequence[int],
    path: Tensor,
    counters: Tensor,
    groups: Tensor,
    averaging: Tensor,
    decay_lrs: Tensor | None,
    average_weights: Tensor | None,
    sums_of_squares: Tensor | None,
    inv_scale: Tensor | None,
    found_inf: Tensor | None,
    scalars: Tensor,
) -> None:
    """Count a step and write the scalars of each parameter's update; see Kernels.prepare."""
    tables = (decay_lrs, average_weights, sums_of_squares, inv_scale, found_inf)
    state = StepState(path, counters, groups, averaging, *tables)
    backend(counters.device).prepare(list(zip(steps, parameter_groups, strict=True)), state, scalars)


@torch.library.custom_op("pathswitch::adamw_", mutates_args=("weights", "exp_avgs", "exp_avg_sqs", "lows", "averages"))
def adamw_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lows: Sequence[Tensor],
    averages: Sequence[Tensor],
    rows: Sequence[int],
    scalars: Tensor,
) -> None:
    """Update a list of shards of one kind; ``lows`` and ``averages`` are empty where there are none."""
    none: list[Tensor | None] = [None] * len(grads)
    columns = (grads, weights, exp_avgs, exp_avg_sqs, lows or none, averages or none, rows)
    shards = [ShardTensors(*row) for row in zip(*columns, strict=True)]
    backend(scalars.device).adamw(shards, scalars)


class OperatorKernels:
    """The operators behind the interface of a backend."""

    def norm(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """See Kernels.norm."""
        out.copy_(sum_of_squares(tensors)) if tensors else out.zero_()

    def prepare(self, parameters: Sequence[tuple[Tensor, int]], state: StepState, scalars: Tensor) -> None:
        """See Kernels.prepare."""
        tables = (state.decay_lrs, state.average_weights, state.sums_of_squares, state.inv_scale, state.found_inf)
        steps, groups = [step for step, _ in parameters], [group for _, group in parameters]
        prepare_(steps, groups, state.path, state.counters, state.groups, state.averaging, *tables, scalars)

    def adamw(self, shards: Sequence[ShardTensors], scalars: Tensor) -> None:
        """See Kernels.adamw."""
        lows = [shard.low for shard in shards if shard.low is not None]
        averages = [shard.average for shard in shards if shard.average is not None]
        adamw_(
            [shard.grad for shard in shards],
            [shard.weight for shard in shards],
            [shard.exp_avg for shard in shards],
            [shard.exp_avg_sq for shard in shards],
            lows,
            averages,
            [shard.scalars for shard in shards],
            scalars,
        )

    def digest(self, tensor: Tensor, first_index: int, out: Tensor) -> None:
        """See Kernels.digest."""
        out += digest(tensor, first_index)
