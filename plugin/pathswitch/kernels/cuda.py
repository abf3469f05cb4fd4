"""The CUDA backend: which kernels a call launches, and their launch through the CUDA driver.

The driver's own interface needs neither the CUDA runtime nor a compiled extension: one image serves every torch
and Python, whether nvcc or NVRTC has made it. What is launched is a pure function of the tensors: tests give the same
launches to a driver of their own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from ctypes import Structure, byref, c_char_p, c_int32, c_int64, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pathswitch.errors import KernelError
from pathswitch.kernels.build import device_image
from pathswitch.kernels.layouts import (
    ADAMW_TILE,
    DIGEST_COLUMNS,
    MAX_PARAMETERS,
    MAX_SHARDS,
    MAX_SPANS,
    NORM_TILE,
    SCALARS_BYTES,
    TYPES,
    Parameter,
    Parameters,
    Shards,
    ShardTensors,
    Spans,
    StepState,
    norm_input,
    shard_structs,
    span_structs,
)

THREADS = 256
PREPARE_THREADS = 32
MAX_GRID = 2**31 - 1
DIGEST_BLOCKS = 4096
LOW_NAMES: dict[torch.dtype | None, str] = {None: "none"} | dict(TYPES.items())
KERNELS = (
    "ps_prepare",
    *(f"ps_adamw_{g}_{low}{a}" for g in TYPES.values() for low in LOW_NAMES.values() for a in ("", "_average")),
    *(f"ps_norm_{kind}" for kind in TYPES.values()),
    *("ps_sum_tiles", "ps_digest_32", "ps_digest_16"),
)


@dataclass(frozen=True)
class Launch:
    """A kernel by name, its blocks, the threads of each, and its arguments as ctypes values."""

    kernel: str
    grid: int
    block: int
    arguments: tuple[Any, ...]


def norm_launches(tensors: Sequence[Tensor], partials: Tensor, out: Tensor) -> Iterator[Launch]:
    """Yield the launches of Kernels.norm; ``partials`` is float64 with an element for each tile of 16384."""
    spans, tiles = span_structs(tensors)
    for first in range(0, len(spans), MAX_SPANS):
        piece = spans[first : first + MAX_SPANS]
        before = piece[0].first_tile
        after = spans[first + MAX_SPANS].first_tile if first + MAX_SPANS < len(spans) else tiles
        arguments = (_list(Spans, piece), c_int64(before), c_void_p(partials.data_ptr()))
        yield Launch(f"ps_norm_{TYPES[tensors[0].dtype]}", after - before, THREADS, arguments)
    yield Launch("ps_sum_tiles", 1, THREADS, (c_void_p(partials.data_ptr()), c_int64(tiles), _address(out)))


def norm_tiles(tensors: Sequence[Tensor]) -> int:
    """Return the number of a norm's tiles."""
    return sum(-(-tensor.numel() // NORM_TILE) for tensor in tensors)


def prepare_launches(parameters: Sequence[tuple[Tensor, int]], state: StepState, scalars: Tensor) -> Iterator[Launch]:
    """Yield the launches of Kernels.prepare; the last one counts the step."""
    structs = [Parameter(step.data_ptr(), group) for step, group in parameters]
    tensors = (state.path, state.counters, state.groups, state.averaging)
    for first in range(0, max(len(structs), 1), MAX_PARAMETERS):
        rows = scalars.data_ptr() + first * SCALARS_BYTES
        is_last = first + MAX_PARAMETERS >= len(structs)
        yield Launch(
            "ps_prepare",
            1,
            PREPARE_THREADS,
            (
                _list(Parameters, structs[first : first + MAX_PARAMETERS]),
                *map(_address, tensors),
                norm_input(state),
                c_void_p(rows),
                c_int32(is_last),
            ),
        )


def adamw_launches(shards: Sequence[ShardTensors], scalars: Tensor) -> Iterator[Launch]:
    """Yield the launches of Kernels.adamw."""
    for first in range(0, len(shards), MAX_SHARDS):
        structs, tiles = shard_structs(shards[first : first + MAX_SHARDS], ADAMW_TILE)
        if structs:
            grad, low, average = shards[0].kind
            name = f"ps_adamw_{TYPES[grad]}_{LOW_NAMES[low]}{'_average' if average else ''}"
            yield Launch(name, tiles, THREADS, (_list(Shards, structs), _address(scalars)))


def digest_launches(tensor: Tensor, first_index: int, out: Tensor) -> Iterator[Launch]:
    """Yield the launches of Kernels.digest."""
    if numel := tensor.numel():
        blocks = (first_index + numel - 1) // DIGEST_COLUMNS - first_index // DIGEST_COLUMNS + 1
        arguments = (_address(tensor), c_int64(numel), c_uint64(first_index), _address(out))
        yield Launch(f"ps_digest_{8 * tensor.element_size()}", min(blocks, DIGEST_BLOCKS), THREADS, arguments)


class Driver:
    """The CUDA driver with the kernels of one image."""

    def __init__(self, image: bytes, library: str = "libcuda.so.1") -> None:
        """Load the image and all its kernels now: within the capture of a graph nothing may be loaded.

        Raises:
            KernelError: there is no driver, or it does not take the image.
        """
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise KernelError(f"the CUDA driver cannot be loaded: {error}") from None
        self._image, handle = image, c_void_p()
        self._call("cuInit", c_uint(0))
        self._call("cuLibraryLoadData", byref(handle), c_char_p(image), None, None, c_uint(0), None, None, c_uint(0))
        self._kernels = {name: self._find(handle, name) for name in KERNELS}

    def launch(self, launch: Launch, stream: int) -> None:
        """Launch a kernel on a stream of the current context.

        Raises:
            KernelError: the driver refuses, or an earlier kernel has failed.
        """
        if launch.grid > MAX_GRID:
            raise KernelError(f"{launch.kernel}: {launch.grid} blocks; allowed: at most {MAX_GRID}")
        pointers = (c_void_p * len(launch.arguments))(*(ctypes.addressof(value) for value in launch.arguments))
        sizes = (launch.grid, 1, 1, launch.block, 1, 1, 0)
        arguments = (self._kernels[launch.kernel], *map(c_uint, sizes), c_void_p(stream), pointers, None)
        self._call("cuLaunchKernel", *arguments, where=f" of {launch.kernel}, {launch.grid} x {launch.block} threads")

    def _find(self, handle: c_void_p, name: str) -> c_void_p:
        kernel = c_void_p()
        self._call("cuLibraryGetKernel", byref(kernel), handle, c_char_p(name.encode()), where=f" of {name}")
        return kernel

    def _call(self, function: str, *arguments: Any, where: str = "") -> None:
        if not hasattr(self._library, function):
            raise KernelError(f"the CUDA driver has no {function}; allowed: a driver for CUDA 12.0 or later")
        if code := getattr(self._library, function)(*arguments):
            name = c_char_p()
            self._library.cuGetErrorName(code, byref(name))
            raise KernelError(f"CUDA: {function}{where}: {(name.value or b'unknown').decode()} ({code})")


class CudaKernels:
    """The kernels on the tensors of one GPU, on torch's current stream."""

    def __init__(self, device: torch.device) -> None:
        """Load the kernels for this GPU, and compile them before if they are not there.

        Raises:
            KernelError: they cannot be compiled or loaded.
        """
        self._device = device
        major, minor = torch.cuda.get_device_capability(device)
        self._driver = Driver(device_image(f"{major}{minor}").read_bytes())

    def norm(self, tensors: Sequence[Tensor], out: Tensor) -> None:
        """See Kernels.norm."""
        partials = torch.empty(norm_tiles(tensors), dtype=torch.float64, device=self._device)
        self._launch(norm_launches(tensors, partials, out))

    def prepare(self, parameters: Sequence[tuple[Tensor, int]], state: StepState, scalars: Tensor) -> None:
        """See Kernels.prepare."""
        self._launch(prepare_launches(parameters, state, scalars))

    def adamw(self, shards: Sequence[ShardTensors], scalars: Tensor) -> None:
        """See Kernels.adamw."""
        self._launch(adamw_launches(shards, scalars))

    def digest(self, tensor: Tensor, first_index: int, out: Tensor) -> None:
        """See Kernels.digest."""
        self._launch(digest_launches(tensor, first_index, out))

    def _launch(self, launches: Iterator[Launch]) -> None:
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream().cuda_stream
            for launch in launches:
                self._driver.launch(launch, stream)


def _address(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())


def _list(kind: Any, items: Sequence[Structure]) -> Structure:
    """Return a list struct with these items."""
    result = kind(count=len(items))
    for index, item in enumerate(items):
        result.items[index] = item
    return result  # type: ignore[no-any-return]
