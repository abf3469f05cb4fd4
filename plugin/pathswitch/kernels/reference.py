"""The kernels in plain torch: the update in the paper's letters, on any device, with the bits of the other backends.

No operation is fused here and none is contracted there, so each rounds as IEEE 754 says. It is what the fast backends
are tested against, and an explicit choice where nothing can be compiled.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pathswitch.kernels.layouts import (
    DIGEST_COLUMNS,
    NORM_TILE,
    AverageSettings,
    GroupSettings,
    PathDescriptor,
    ShardTensors,
    StepScalars,
    StepState,
    struct_bytes,
)

NORM_COLUMNS, NORM_ROWS, NORM_LANES = 32, 16, 256
CHUNK = 1 << 20  # elements that are processed at a time where whole copies would be needed
Keys = NDArray[np.uint64]
Struct = TypeVar("Struct", bound=ctypes.Structure)


class ReferenceKernels:
    """The kernels in torch operations; scalars are computed on the host, so CUDA waits for each step."""

    def norm(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """See Kernels.norm."""
        partials = [_norm_tiles(tensor) for tensor in tensors if tensor.numel()]
        tiles = torch.cat(partials) if partials else out.new_zeros(0)
        rows = _padded(tiles, NORM_LANES).view(-1, NORM_LANES)
        lanes = out.new_zeros(NORM_LANES)
        for row in rows:
            lanes = lanes + row
        out.copy_(_sum_by_halves(lanes))

    def prepare(self, parameters: Sequence[tuple[Tensor, int]], state: StepState, scalars: Tensor) -> None:
        """See Kernels.prepare."""
        inv_scale = 1.0 if state.inv_scale is None else float(state.inv_scale)
        sums = None if state.sums_of_squares is None else state.sums_of_squares.tolist()
        norms = None if sums is None else [_sqrt(total) * inv_scale for total in sums]
        found_inf = state.found_inf is not None and float(state.found_inf) != 0
        if found_inf or (norms is not None and not all(map(math.isfinite, norms))):
            state.counters[1] += 1
            scalars.copy_(struct_bytes(StepScalars(skip=1)).expand_as(scalars))
            return
        step = int(state.counters[0])
        lr = path_lr(_struct(PathDescriptor, state.path), state.decay_lrs, step)
        averaging = _struct(AverageSettings, state.averaging)
        groups = [_struct(GroupSettings, row) for row in state.groups]
        for row, (adam_step, group) in zip(scalars, parameters, strict=True):
            updates_done = int(adam_step)
            adam_step += 1
            clip = clip_coefficient(groups[group], norms)
            weight = average_weight(averaging, state.average_weights, updates_done)
            result = step_scalars(groups[group], lr, clip * inv_scale, weight, updates_done + 1)
            row.copy_(struct_bytes(result))
        state.counters[0] += 1

    def adamw(self, shards: Sequence[ShardTensors], scalars: Tensor) -> None:
        """See Kernels.adamw."""
        rows = [_struct(StepScalars, row) for row in scalars]
        for shard in shards:
            if not (s := rows[shard.scalars]).skip:
                adamw(shard.grad, shard.weight, shard.exp_avg, shard.exp_avg_sq, s)
                if shard.average is not None:
                    update_average(shard.average, shard.weight, s)
                if shard.low is not None:
                    shard.low.copy_(shard.weight)

    def digest(self, tensor: Tensor, first_index: int, out: Tensor) -> None:
        """See Kernels.digest."""
        integers = tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16).view(-1)
        mask = 0xFFFFFFFF if tensor.element_size() == 4 else 0xFFFF
        keys = _column_keys().to(tensor.device)
        for start in range(0, integers.numel(), CHUNK):
            bits = integers[start : start + CHUNK].to(torch.int64) & mask
            first_block, head = divmod(first_index + start, DIGEST_COLUMNS)
            blocks = _padded(torch.nn.functional.pad(bits, (head, 0)), DIGEST_COLUMNS).view(-1, DIGEST_COLUMNS)
            for lane in range(2):
                sums = (blocks * keys[lane]).sum(1)
                out[lane] += (sums * _block_keys(first_block, len(blocks), lane).to(tensor.device)).sum()


def adamw(grad: Tensor, weight: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, s: StepScalars) -> None:
    """Update a parameter in place; all but ``grad`` float32 (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

    With g the clipped gradient, t the update's number, eta the path's LR and lambda the weight decay:
    m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2;
    theta = theta - (eta lambda theta + eta / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)).
    """
    g = grad.float() * s.grad_scale
    exp_avg.mul_(s.beta1).add_(g * s.one_minus_beta1)
    exp_avg_sq.mul_(s.beta2).add_(g * s.one_minus_beta2 * g)
    # torch's float32 square root is not rounded correctly on every CPU; through float64 it is.
    root = exp_avg_sq.double().sqrt().float()
    denominator = root.mul_(s.inv_sqrt_correction2).add_(s.eps)
    weight.sub_(weight * s.shrinkage + (exp_avg / denominator).mul_(s.step_size))


def update_average(average: Tensor, weight: Tensor, s: StepScalars) -> None:
    """Move the running average towards the weights by this step's share; a share of 1 copies them."""
    if s.average_weight == 1.0:
        average.copy_(weight)
    else:
        average.add_((weight - average).mul_(s.average_weight))


def path_lr(path: PathDescriptor, decay_lrs: Tensor | None, step: int) -> float:
    """Return the LR of the update number ``step`` (from 0 on), the same double as the schedule's."""
    if step < path.fork_step:
        if step >= path.warmup_steps - 1:
            return float(path.max_lr)
        return float(path.init_lr + (path.max_lr - path.init_lr) * (step + 1) / path.warmup_steps)
    decayed_steps = step - path.fork_step
    if decayed_steps >= path.decay_steps:
        return float(path.final_lr)
    assert decay_lrs is not None
    return float(decay_lrs[decayed_steps])


def average_weight(average: AverageSettings, weights: Tensor | None, updates_done: int) -> float:
    """Return the running average's weight in the update of a parameter that has had ``updates_done``."""
    index = updates_done - average.start_step
    if index < 0:
        return 0.0
    if weights is None:
        return float(average.weight)
    return float(weights[index]) if index < average.n_weights else 0.0


def clip_coefficient(group: GroupSettings, norms: Sequence[float] | None) -> float:
    """Return min(1, max_norm / (norm + 1e-6)) for a group whose gradients are clipped, else 1."""
    if norms is None or group.max_norm <= 0:
        return 1.0
    return float(min(1.0, group.max_norm / (norms[group.norm] + 1e-6)))


def step_scalars(
    group: GroupSettings, path_lr: float, grad_scale: float, average_weight: float, adam_step: int
) -> StepScalars:
    """Return the scalars of a parameter's update number ``adam_step`` (from 1 on)."""
    lr = group.lr_multiple * path_lr
    return StepScalars(
        lr=lr,
        grad_scale=grad_scale,
        beta1=group.beta1,
        one_minus_beta1=1.0 - group.beta1,
        beta2=group.beta2,
        one_minus_beta2=1.0 - group.beta2,
        eps=group.eps,
        shrinkage=lr * group.weight_decay,
        step_size=lr / (1.0 - _power(group.beta1, adam_step)),
        inv_sqrt_correction2=1.0 / math.sqrt(1.0 - _power(group.beta2, adam_step)),
        average_weight=average_weight,
    )


def _power(base: float, exponent: int) -> float:
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def _sqrt(value: float) -> float:
    return math.sqrt(value) if value >= 0 else math.nan


def _mix(z: Keys) -> Keys:
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)


def _keys(first: int, count: int, lane: int, multiplier: int) -> Keys:
    numbers = np.arange(first, first + count, dtype=np.uint64) * np.uint64(2) + np.uint64(lane + 1)
    return _mix(numbers * np.uint64(multiplier))


@cache
def _column_keys() -> Tensor:
    keys = [_keys(0, DIGEST_COLUMNS, lane, 0x9E3779B97F4A7C15) >> np.uint64(32) for lane in (0, 1)]
    return torch.from_numpy(np.stack(keys).view(np.int64))


def _block_keys(first: int, count: int, lane: int) -> Tensor:
    keys = _keys(first, count, lane, 0xD1342543DE82EF95) | np.uint64(1)
    return torch.from_numpy(keys.view(np.int64))


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, -tensor.numel() % multiple))


def _sum_by_halves(tensor: Tensor) -> Tensor:
    while (half := tensor.shape[-1] // 2) > 0:
        tensor = tensor[..., :half] + tensor[..., half:]
    return tensor


def _norm_tiles(tensor: Tensor) -> Tensor:
    """Return the sum of squares of each tile of 16384 elements."""
    tiles = []
    for piece in torch.split(tensor.view(-1), CHUNK):
        squares = _padded(piece.double().square(), NORM_TILE).view(-1, NORM_ROWS, NORM_COLUMNS)
        sums = torch.zeros_like(squares[:, 0])
        for row in range(NORM_ROWS):
            sums = sums + squares[:, row]
        runs = _sum_by_halves(sums).view(-1, NORM_TILE // (NORM_ROWS * NORM_COLUMNS))
        tiles.append(_sum_by_halves(runs).view(-1))
    return torch.cat(tiles)


def _struct(kind: type[Struct], row: Tensor) -> Struct:
    return kind.from_buffer_copy(row.cpu().numpy().tobytes())
