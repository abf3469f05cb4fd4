"""The last blocks of tensors with 2^31 to 2^33 elements: only what they touch is there, at its own address."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from problems import Problem, Size, adamw_problem, digest_problem, norm_problem
from ptx.memory import Region, Space
from torch import Tensor

from pathswitch.kernels.cuda import KERNELS, Launch, adamw_launches, digest_launches, norm_launches
from pathswitch.kernels.layouts import ADAMW_TILE, NORM_TILE, ShardTensors

FAR_SIZES = tuple(2**power + extra for power in (31, 32, 33) for extra in (1025, 4096))
DIGEST_COLUMNS = 1024


@dataclass(frozen=True)
class FarTensor:
    """What a launch asks of a tensor, without its memory."""

    address: int
    elements: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        """Return the address of the first element."""
        return self.address

    def numel(self) -> int:
        """Return the number of elements."""
        return self.elements

    def element_size(self) -> int:
        """Return the bytes of an element."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Far:
    """Some blocks of one launch on huge tensors."""

    numel: int
    launches: list[Launch]
    blocks: Sequence[int]
    memory: Space
    found: Problem
    expected: Problem


def far_problems(kernel: str) -> Iterator[Far]:
    """Yield the problems of a kernel at each size."""
    from gates import ADAMW_NAMES, DIGEST_NAMES, NORM_NAMES

    for numel in FAR_SIZES:
        if kernel in ADAMW_NAMES:
            yield _far_adamw(ADAMW_NAMES[kernel], numel)
        elif kernel in NORM_NAMES:
            yield _far_norm(NORM_NAMES[kernel], numel)
        elif kernel in DIGEST_NAMES:
            yield _far_digest(DIGEST_NAMES[kernel], numel)
        else:
            assert kernel in KERNELS  # it does not grow with the tensors


def _place(number: int, window: Tensor, first: int, numel: int) -> tuple[FarTensor, int]:
    """Return a huge tensor whose element ``first`` is the window's first, and the window's address."""
    address = (number + 1) << 40
    return FarTensor(address, numel, window.dtype), address + first * window.element_size()


def _space(found: Problem, addresses: dict[str, int]) -> Space:
    contents = {name: found.tensors[name].reshape(-1).view(torch.uint8).numpy() for name in addresses}
    return Space([Region(name, address, contents[name]) for name, address in addresses.items()])


def _both(make: Any) -> tuple[Problem, Problem]:
    found, expected = make(), make()
    expected.expect()
    return found, expected


def _far_adamw(variant: Any, numel: int) -> Far:
    """The huge shard comes second: its tiles begin behind another's."""
    first = (numel - 1) // ADAMW_TILE * ADAMW_TILE
    found, expected = _both(lambda: adamw_problem(variant, [Size(numel - first)]))
    rows = found.tensors["scalars"]
    far, addresses = {}, {"scalars": rows.data_ptr()}
    for number, name in enumerate(name for name in found.tensors if name != "scalars"):
        far[name[0]], addresses[name] = _place(number, found.tensors[name], first, numel)
    shard: Any = ShardTensors(far["g"], far["w"], far["m"], far["v"], far.get("l"), far.get("a"), 0)
    before = replace(shard, grad=FarTensor(64 << 40, 5000, shard.grad.dtype))
    launches = list(adamw_launches([before, shard], rows))
    return Far(numel, launches, [launches[0].grid - 1], _space(found, addresses), found, expected)


def _far_norm(dtype: torch.dtype, numel: int) -> Far:
    first = (numel - 1) // NORM_TILE * NORM_TILE
    found, expected = _both(lambda: norm_problem(dtype, [(numel - first, 0)]))
    far, address = _place(0, found.tensors["x0"], first, numel)
    tiles = first // NORM_TILE + 1
    partials, last = _place(1, found.tensors["partials"], tiles - 1, tiles)
    huge: Any = (far, partials)
    launches = list(norm_launches([huge[0]], huge[1], found.tensors["out"]))[:1]
    expected.buffers.pop("out")
    found.buffers.pop("out")
    return Far(numel, launches, [tiles - 1], _space(found, {"x0": address, "partials": last}), found, expected)


def _far_digest(size: int, numel: int) -> Far:
    """One block for each 1024 elements, so that the last one visits the last of them alone."""
    first = (numel - 1) // DIGEST_COLUMNS * DIGEST_COLUMNS
    found, expected = _both(lambda: digest_problem(size, numel - first, first, 0))
    far, address = _place(0, found.tensors["x"], first, numel)
    out, huge = found.tensors["out"], (far,)
    blocks = first // DIGEST_COLUMNS + 1
    launches = [replace(launch, grid=blocks) for launch in digest_launches(huge[0], 0, out)]  # type: ignore[arg-type]
    return Far(numel, launches, [blocks - 1], _space(found, {"x": address, "out": out.data_ptr()}), found, expected)
