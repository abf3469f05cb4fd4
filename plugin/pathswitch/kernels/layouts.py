"""The structs of csrc/maths.h and csrc/kernels.cuh, and the tensors that hold them.

Everything that a step needs lies in tensors on the parameters' device, so that a captured CUDA graph reads it anew in
each replay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

MAX_SPANS, MAX_SHARDS, MAX_PARAMETERS = 128, 48, 128
ADAMW_TILE, NORM_TILE = 2048, 16384  # elements
DIGEST_COLUMNS = 1024  # elements of a block
NEVER = 2**63 - 1
TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class PathDescriptor(Structure):
    """A path's LR as a function of the step, 64 bytes."""

    _fields_ = [
        ("max_lr", c_double),
        ("init_lr", c_double),
        ("final_lr", c_double),
        ("warmup_steps", c_int64),
        ("fork_step", c_int64),
        ("decay_steps", c_int64),
        ("decay_lrs", c_void_p),
        ("reserved", c_int64),
    ]


class Counters(Structure):
    """Updates done on the path, and updates left out."""

    _fields_ = [("step", c_int64), ("skipped_steps", c_int64)]


class GroupSettings(Structure):
    """What the parameters of one group have in common."""

    _fields_ = [
        ("lr_multiple", c_double),
        ("beta1", c_double),
        ("beta2", c_double),
        ("eps", c_double),
        ("weight_decay", c_double),
        ("max_norm", c_double),
        ("norm", c_int64),
        ("reserved", c_int64),
    ]


class AverageSettings(Structure):
    """The running average's weight in each step."""

    _fields_ = [("weights", c_void_p), ("start_step", c_int64), ("n_weights", c_int64), ("weight", c_double)]


class StepScalars(Structure):
    """What the update of one parameter needs besides its four numbers."""

    _fields_ = [
        ("lr", c_double),
        ("grad_scale", c_float),
        ("beta1", c_float),
        ("one_minus_beta1", c_float),
        ("beta2", c_float),
        ("one_minus_beta2", c_float),
        ("eps", c_float),
        ("shrinkage", c_float),
        ("step_size", c_float),
        ("inv_sqrt_correction2", c_float),
        ("average_weight", c_float),
        ("skip", c_int32),
        ("reserved", c_int32 * 3),
    ]


class NormInput(Structure):
    """The gradients' sums of squares and their scale."""

    _fields_ = [
        ("sums_of_squares", c_void_p),
        ("n_norms", c_int64),
        ("inv_scale", c_void_p),
        ("found_inf", c_void_p),
    ]


class Span(Structure):
    """A contiguous piece of a tensor list."""

    _fields_ = [("data", c_void_p), ("numel", c_int64), ("first_tile", c_int64)]


class Shard(Structure):
    """The tensors of one piece of an update."""

    _fields_ = [
        ("grad", c_void_p),
        ("weight", c_void_p),
        ("exp_avg", c_void_p),
        ("exp_avg_sq", c_void_p),
        ("low", c_void_p),
        ("average", c_void_p),
        ("numel", c_int64),
        ("first_tile", c_int64),
        ("scalars", c_int64),
    ]


class Parameter(Structure):
    """A parameter's count of updates, and its group."""

    _fields_ = [("step", c_void_p), ("group", c_int64)]


class Spans(Structure):
    """A list of spans that fits into a kernel's parameters."""

    _fields_ = [("count", c_int64), ("items", Span * MAX_SPANS)]


class Shards(Structure):
    """A list of shards that fits into a kernel's parameters."""

    _fields_ = [("count", c_int64), ("items", Shard * MAX_SHARDS)]


class Parameters(Structure):
    """A list of parameters that fits into a kernel's parameters."""

    _fields_ = [("count", c_int64), ("items", Parameter * MAX_PARAMETERS)]


@dataclass(frozen=True)
class ShardTensors:
    """One piece of an update: contiguous tensors of the same number of elements.

    Attributes:
        grad: float32, bfloat16 or float16.
        weight: float32, as are the moments and the average.
        exp_avg: the first moment.
        exp_avg_sq: the second moment.
        low: where the new weight goes in the model's precision; None if it has none of its own.
        average: the running average, or None.
        scalars: the row of the parameter's scalars.
    """

    grad: Tensor
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    low: Tensor | None
    average: Tensor | None
    scalars: int

    @property
    def kind(self) -> tuple[torch.dtype, torch.dtype | None, bool]:
        """What one launch has in common: the gradients' type, the low precision's, and whether there is an average."""
        return self.grad.dtype, None if self.low is None else self.low.dtype, self.average is not None


@dataclass
class StepState:
    """What ``prepare`` reads and counts, on the parameters' device.

    Attributes:
        path: uint8[64], a PathDescriptor.
        counters: int64[2], Counters.
        groups: uint8[n, 64], GroupSettings.
        averaging: uint8[32], AverageSettings.
        decay_lrs: float64[decay_steps] that the path points to, or None.
        average_weights: float64[n_weights] that the averaging points to, or None.
        sums_of_squares: float64[k], summed over all ranks; None: gradients are neither clipped nor checked.
        inv_scale: float32[1], 1 over the loss scale; None: 1.
        found_inf: float32[1], not 0 where somebody has found gradients that are not finite; or None.
    """

    path: Tensor
    counters: Tensor
    groups: Tensor
    averaging: Tensor
    decay_lrs: Tensor | None = None
    average_weights: Tensor | None = None
    sums_of_squares: Tensor | None = None
    inv_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Kernels(Protocol):
    """What every backend can do, to tensors of its own device."""

    def norm(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """Set ``out`` (float64[1]) to the sum of the squares of all elements; the tensors have one type."""

    def prepare(self, parameters: Sequence[tuple[Tensor, int]], state: StepState, scalars: Tensor) -> None:
        """Count a step for each (step tensor, group) and write its scalars, a row of uint8[n, 64] each.

        Where gradients are not finite it counts nothing but the skipped step, and marks all scalars.
        """

    def adamw(self, shards: Sequence[ShardTensors], scalars: Tensor) -> None:
        """Update shards of one kind."""

    def digest(self, tensor: Tensor, first_index: int, out: Tensor) -> None:
        """Add the digest of a piece that begins at element ``first_index`` to ``out`` (int64[2])."""


def struct_bytes(struct: Structure) -> Tensor:
    """Return a struct's bytes as a tensor uint8[sizeof]."""
    return torch.frombuffer(bytearray(struct), dtype=torch.uint8)


def pointer(tensor: Tensor | None) -> int | None:
    """Return a tensor's address, None for no tensor."""
    return None if tensor is None else tensor.data_ptr()


def norm_input(state: StepState) -> NormInput:
    """Return the gradients' sums of squares and scale as a struct."""
    sums = state.sums_of_squares
    n_norms = 0 if sums is None else sums.numel()
    return NormInput(pointer(sums), n_norms, pointer(state.inv_scale), pointer(state.found_inf))


def shard_structs(shards: Sequence[ShardTensors], tile: int) -> tuple[list[Shard], int]:
    """Return the structs of the shards that have elements, and the number of their tiles."""
    structs, tiles = [], 0
    for s in shards:
        if numel := s.grad.numel():
            addresses = (
                s.grad.data_ptr(),
                s.weight.data_ptr(),
                s.exp_avg.data_ptr(),
                s.exp_avg_sq.data_ptr(),
                pointer(s.low),
                pointer(s.average),
            )
            structs.append(Shard(*addresses, numel, tiles, s.scalars))
            tiles += -(-numel // tile)
    return structs, tiles


def span_structs(tensors: Sequence[Tensor]) -> tuple[list[Span], int]:
    """Return the structs of the tensors that have elements, and the number of their tiles in a norm."""
    structs, tiles = [], 0
    for tensor in tensors:
        if numel := tensor.numel():
            structs.append(Span(tensor.data_ptr(), numel, tiles))
            tiles += -(-numel // NORM_TILE)
    return structs, tiles


SCALARS_BYTES = ctypes.sizeof(StepScalars)
