"""The CPU backend: csrc/cpu.cpp, compiled for this machine's vector instructions, on torch's number of threads."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_int32, c_int64, c_uint64, c_void_p
from functools import cache

import torch
from torch import Tensor

from pathswitch.errors import KernelError
from pathswitch.kernels.build import best_isa, cpu_library
from pathswitch.kernels.layouts import (
    NORM_TILE,
    TYPES,
    Parameter,
    Shard,
    ShardTensors,
    Span,
    StepState,
    norm_input,
    shard_structs,
    span_structs,
)

_TYPE_NUMBERS = {None: -1} | {dtype: number for number, dtype in enumerate(TYPES)}


class CpuKernels:
    """The kernels on CPU tensors, from the library compiled for one instruction set."""

    def __init__(self, isa: str | None = None) -> None:
        """Load the library for ``isa`` (this machine's best if not given), and compile it before if it is not there.

        Raises:
            KernelError: there is no compiler, or it failed.
        """
        path = cpu_library(best_isa() if isa is None else isa)
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise KernelError(f"{path} cannot be loaded: {error}; remove it, and it is compiled here") from None
        self._prepare, self._adamw, self._norm = library.ps_prepare, library.ps_adamw, library.ps_norm
        self._sum_tiles, self._digest = library.ps_sum_tiles, library.ps_digest
        self._prepare.argtypes = [c_void_p, c_int64, *[c_void_p] * 6]
        self._adamw.argtypes = [c_void_p, c_int64, c_int64, c_int32, c_int32, c_int32, c_void_p, c_int32]
        self._norm.argtypes = [c_void_p, c_int64, c_int32, c_void_p, c_int32]
        self._sum_tiles.argtypes = [c_void_p, c_int64, c_void_p]
        self._digest.argtypes = [c_void_p, c_int64, c_int32, c_uint64, c_void_p, c_int32]
        for function in (self._prepare, self._adamw, self._norm, self._sum_tiles, self._digest):
            function.restype = None

    def norm(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """See Kernels.norm."""
        spans, tiles = span_structs(tensors)
        partials = torch.empty(tiles, dtype=torch.float64)
        if spans:
            number, threads = _TYPE_NUMBERS[tensors[0].dtype], torch.get_num_threads()
            self._norm((Span * len(spans))(*spans), len(spans), number, partials.data_ptr(), threads)
        self._sum_tiles(partials.data_ptr(), tiles, out.data_ptr())

    def prepare(self, parameters: Sequence[tuple[Tensor, int]], state: StepState, scalars: Tensor) -> None:
        """See Kernels.prepare."""
        structs = (Parameter * len(parameters))(*(Parameter(step.data_ptr(), group) for step, group in parameters))
        tensors = (state.path, state.counters, state.groups, state.averaging)
        addresses = (tensor.data_ptr() for tensor in tensors)
        self._prepare(structs, len(structs), *addresses, byref(norm_input(state)), scalars.data_ptr())

    def adamw(self, shards: Sequence[ShardTensors], scalars: Tensor) -> None:
        """See Kernels.adamw."""
        structs, tiles = shard_structs(shards, NORM_TILE)
        if not structs:
            return
        grad, low, average = shards[0].kind
        numbers = (_TYPE_NUMBERS[grad], _TYPE_NUMBERS[low], int(average))
        array = (Shard * len(structs))(*structs)
        self._adamw(array, len(structs), tiles, *numbers, scalars.data_ptr(), torch.get_num_threads())

    def digest(self, tensor: Tensor, first_index: int, out: Tensor) -> None:
        """See Kernels.digest."""
        size = tensor.element_size()
        threads = torch.get_num_threads()
        self._digest(tensor.data_ptr(), tensor.numel(), size, first_index, out.data_ptr(), threads)


@cache
def cpu_kernels() -> CpuKernels:
    """Return this machine's CPU kernels.

    Raises:
        KernelError: there is no compiler, or it failed.
    """
    return CpuKernels()
