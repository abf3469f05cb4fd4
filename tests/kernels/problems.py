"""Problems for the kernels: the tensors of some launches, once for a device and once for the reference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pathswitch.kernels.cuda import (
    Launch,
    adamw_launches,
    digest_launches,
    norm_launches,
    norm_tiles,
    prepare_launches,
)
from pathswitch.kernels.device_state import DeviceState
from pathswitch.kernels.layouts import (
    AverageSettings,
    GroupSettings,
    ShardTensors,
    StepScalars,
    StepState,
    struct_bytes,
)
from pathswitch.kernels.paths import DevicePath
from pathswitch.kernels.reference import ReferenceKernels

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
TYPES = [F32, BF16, F16]
Variant = tuple[torch.dtype, torch.dtype | None, bool]  # gradient, low precision, average
VARIANTS: list[Variant] = list(itertools.product(TYPES, [None, *TYPES], [False, True]))
GUARD_BYTES = 32
SCALARS = StepScalars(1e-3, 0.37, 0.9, 0.1, 0.95, 0.05, 1e-8, 1e-4, 1e-3, 1.1, 0.01)
OTHER_SCALARS = StepScalars(2e-3, 1.0, 0.8, 0.2, 0.99, 0.01, 1e-6, 0.0, 5e-4, 1.0, 1.0)
SKIPPED = StepScalars(skip=1)


@dataclass
class Problem:
    """Tensors, and what is to be done to them.

    Attributes:
        tensors: all that the kernels may touch, by name; every byte of them, and no other.
        buffers: the memory that they lie in, with guards.
        launches: the launches of the CUDA backend.
        expect: does the same with the reference, to the same tensors.
        blank: names of tensors that hold nothing yet.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    launches: Callable[[], Iterator[Launch]] = lambda: iter(())
    expect: Callable[[], None] = lambda: None
    blank: set[str] = field(default_factory=set)
    guard_bytes: int = GUARD_BYTES

    def add(self, name: str, content: Tensor, offset: int = 0) -> Tensor:
        """Add a tensor with this content, ``offset`` elements behind an address that is a multiple of 64."""
        size, guard = content.element_size(), self.guard_bytes
        buffer = torch.full((offset * size + content.numel() * size + guard,), 0x5A, dtype=torch.uint8)
        piece = buffer[offset * size : offset * size + content.numel() * size].view(content.dtype)
        piece = piece.view(content.shape).copy_(content)
        self.tensors[name], self.buffers[name] = piece, buffer
        return piece


def differences(found: Problem, expected: Problem) -> list[str]:
    """Return the names of the tensors whose bits, or guards, differ."""
    return [name for name in found.buffers if not torch.equal(found.buffers[name], expected.buffers[name])]


@dataclass(frozen=True)
class Size:
    """One shard: elements; offsets of grad, low, float32 tensors and average in elements; the row of its scalars."""

    numel: int
    grad: int = 0
    low: int = 0
    floats: int = 0
    average: int = 0
    row: int = 0


# Around each boundary: a vector of 4, a block's width of vectors (1024), a tile (2048); aligned and not.
SIZES = (
    *(Size(n, row=n % 2) for n in (1, 3, 4, 5, 1023, 1024, 1025, 1424, 2047, 2048, 2049, 4096, 4097)),
    *(Size(0), Size(2049, grad=1), Size(1424, low=1), Size(2051, grad=2, low=3, row=1), Size(1029, floats=1)),
    *(Size(100, row=2), Size(1030, average=1), Size(4099, grad=1, low=1, floats=3)),
)


def adamw_problem(variant: Variant, sizes: Sequence[Size] = SIZES, guard_bytes: int = GUARD_BYTES) -> Problem:
    """Return an update of shards in one list, with three rows of scalars, the last of which says skip."""
    grad, low, average = variant
    problem, random = Problem(guard_bytes=guard_bytes), torch.Generator().manual_seed(1)
    rows = problem.add("scalars", torch.stack([struct_bytes(row) for row in (SCALARS, OTHER_SCALARS, SKIPPED)]))
    shards = []
    for number, size in enumerate(sizes):
        weight = torch.randn(size.numel, generator=random)
        gradient = torch.randn(size.numel, generator=random).to(grad)
        moments = 0.01 * torch.randn(size.numel, generator=random), 1e-3 * torch.rand(size.numel, generator=random)
        floats = [
            problem.add(f"{name}{number}", t, size.floats) for name, t in zip("wmv", (weight, *moments), strict=True)
        ]
        shards.append(
            ShardTensors(
                problem.add(f"g{number}", gradient, size.grad),
                *floats,
                None if low is None else problem.add(f"l{number}", torch.zeros(size.numel, dtype=low), size.low),
                problem.add(f"a{number}", weight + 1, size.floats + size.average) if average else None,
                size.row,
            )
        )
    problem.launches = lambda: adamw_launches(shards, rows)
    problem.expect = lambda: ReferenceKernels().adamw(shards, rows)
    return problem


def norm_problem(dtype: torch.dtype, sizes: Sequence[tuple[int, int]] = (), guard_bytes: int = GUARD_BYTES) -> Problem:
    """Return a norm of tensors of these (elements, offset), around the boundaries of rows, runs and tiles if none."""
    around = (1, 31, 0, 32, 33, 511, 512, 513, 16383, 16384, 16385)
    sizes = sizes or [*((n, 0) for n in around), *((n, 1) for n in around), (33000, 2), (20000, 3)]
    problem, random = Problem(guard_bytes=guard_bytes), torch.Generator().manual_seed(2)
    tensors = [
        problem.add(f"x{number}", torch.randn(numel, generator=random).to(dtype), offset)
        for number, (numel, offset) in enumerate(sizes)
    ]
    partials = problem.add("partials", torch.zeros(norm_tiles(tensors), dtype=torch.float64))
    out = problem.add("out", torch.zeros(1, dtype=torch.float64))
    problem.blank = {"partials", "out"}
    problem.launches = lambda: norm_launches(tensors, partials, out)

    def expect() -> None:
        ReferenceKernels().norm(tensors, out)
        tiles = [piece for tensor in tensors for piece in torch.split(tensor, 16384) if piece.numel()]
        for number, tile in enumerate(tiles):
            ReferenceKernels().norm([tile], partials[number : number + 1])

    problem.expect = expect
    return problem


def sum_problem(tiles: int, guard_bytes: int = GUARD_BYTES) -> Problem:
    """Return the sum of a norm's tiles, each with one element."""
    problem, random = Problem(guard_bytes=guard_bytes), torch.Generator().manual_seed(4)
    elements = torch.randn(tiles, generator=random)
    partials = problem.add("partials", elements.double().square())
    out = problem.add("out", torch.zeros(1, dtype=torch.float64))
    problem.blank = {"out"}
    singles = list(elements.split(1)) if tiles else []
    problem.launches = lambda: iter(list(norm_launches(singles or [elements], partials, out))[-1:])
    problem.expect = lambda: ReferenceKernels().norm(singles, out)
    return problem


def digest_problem(size: int, numel: int, first_index: int, offset: int, guard_bytes: int = GUARD_BYTES) -> Problem:
    """Return the digest of elements of 2 or 4 bytes."""
    problem, random = Problem(guard_bytes=guard_bytes), torch.Generator().manual_seed(3)
    bits = torch.randint(-(2 ** (8 * size - 1)), 2 ** (8 * size - 1), (numel,), generator=random)
    tensor = problem.add("x", bits.to(torch.int32 if size == 4 else torch.int16), offset)
    out = problem.add("out", torch.tensor([3, -5]))
    problem.launches = lambda: digest_launches(tensor, first_index, out)
    problem.expect = lambda: ReferenceKernels().digest(tensor, first_index, out)
    return problem


DIGESTS = [
    *((size, n, first, 0) for size in (2, 4) for n, first in ((1, 0), (5000, 0), (4096, 1024), (3, 1022))),
    *((size, n, first, off) for size in (2, 4) for n, first, off in ((5000, 777, 1), (2047, 3, 3), (9, 2**40 + 5, 2))),
]
GROUPS = (
    GroupSettings(lr_multiple=1.0, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, max_norm=1.0, norm=0),
    GroupSettings(lr_multiple=0.5, beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.0, max_norm=0.0, norm=0),
    GroupSettings(lr_multiple=2.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, max_norm=5.0, norm=1),
)


@dataclass(frozen=True)
class Preparation:
    """One preparation: which path at which step, the gradients' state, how many parameters, the average's weights."""

    name: str
    path: DevicePath
    step: int
    sums_of_squares: tuple[float, ...] | None = (9.0, 400.0)
    inv_scale: float | None = 0.5
    found_inf: float | None = None
    count: int = 8
    average: tuple[AverageSettings, tuple[float, ...]] = (AverageSettings(weight=0.01), ())


def prepare_problem(spec: Preparation, guard_bytes: int = GUARD_BYTES) -> Problem:
    """Return the preparation of a step."""
    problem = Problem(guard_bytes=guard_bytes)
    settings, weights = spec.average
    device = DeviceState(torch.device("cpu"), settings, weights)
    device.write_path(spec.path)
    device.write_step(spec.step)
    device.write_groups(GROUPS)
    held = device.step_state
    state = StepState(
        path=problem.add("path", held.path),
        counters=problem.add("counters", held.counters),
        groups=problem.add("groups", held.groups),
        averaging=problem.add("averaging", held.averaging),
        decay_lrs=held.decay_lrs,
        average_weights=held.average_weights,
    )
    for name, values, dtype in (
        ("sums_of_squares", spec.sums_of_squares, torch.float64),
        ("inv_scale", None if spec.inv_scale is None else [spec.inv_scale], F32),
        ("found_inf", None if spec.found_inf is None else [spec.found_inf], F32),
    ):
        if values is not None:
            setattr(state, name, problem.add(name, torch.tensor(values, dtype=dtype)))
    for name, table in (("decay_lrs", held.decay_lrs), ("average_weights", held.average_weights)):
        if table is not None:
            problem.tensors[name] = table
    numbers = [0, 1, 17, 18, 20, 21, 22, 99_999]  # also around the average's table
    steps = [problem.add(f"step{i}", torch.tensor(float(numbers[i % len(numbers)]))) for i in range(spec.count)]
    parameters = [(step, i % len(GROUPS)) for i, step in enumerate(steps)]
    scalars = problem.add("scalars", torch.zeros(spec.count, len(struct_bytes(SCALARS)), dtype=torch.uint8))
    problem.launches = lambda: prepare_launches(parameters, state, scalars)
    problem.expect = lambda: ReferenceKernels().prepare(parameters, state, scalars)
    # Two problems have their tables at two addresses: they are compared by what they hold.
    del problem.buffers["path"], problem.buffers["averaging"]
    return problem
