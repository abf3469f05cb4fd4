"""The update of one parameter: every CPU library equals the reference to the bit, and both are near float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from arena import SCALARS, Arena, isas, update

from pathswitch.kernels.cpu import CpuKernels
from pathswitch.kernels.layouts import ShardTensors, StepScalars, struct_bytes
from pathswitch.kernels.reference import ReferenceKernels

GRADS = [torch.float32, torch.bfloat16, torch.float16]
LOWS = [None, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("grad", "low", "average"), list(itertools.product(GRADS, LOWS, [False, True])))
def test_cpu_equals_the_reference_to_the_bit(
    isa: str, grad: torch.dtype, low: torch.dtype | None, average: bool
) -> None:
    kernels = CpuKernels(isa)
    for numel, offset in [(0, 0), (1, 0), (7, 1), (33, 3), (16383, 0), (16384, 1), (16385, 0), (40001, 5)]:
        mine, expected = Arena(numel, grad, low, offset), Arena(numel, grad, low, offset)
        update(kernels, mine, average=average)
        update(ReferenceKernels(), expected, average=average)
        for left, right in zip(mine.buffers, expected.buffers, strict=True):
            assert torch.equal(left, right), (numel, offset)
        assert mine.guards_hold()


@pytest.mark.parametrize("isa", isas())
def test_extreme_values(isa: str) -> None:
    values = [0.0, -0.0, 1e-45, -1e-38, 1.2e-38, 65504.0, 65520.0, 1e30, 3e38, -3e38, 6e-8, 1e-7, 5.96e-8, 2.98e-8]
    for low in LOWS[1:]:
        arenas = [Arena(len(values), torch.float32, low, 0) for _ in range(2)]
        for arena, kernels in zip(arenas, (CpuKernels(isa), ReferenceKernels()), strict=True):
            arena.shard.weight.copy_(torch.tensor(values))
            arena.shard.grad.zero_()
            arena.shard.exp_avg.zero_()
            keep = StepScalars(0, 1, 0.9, 0.1, 0.95, 0.05, 1e-8, 0.0, 0.0, 1.0, 1.0)
            update(kernels, arena, keep)
            assert arena.shard.low is not None
            assert torch.equal(arena.shard.low, arena.shard.weight.to(low))  # torch rounds as IEEE 754 does
        for left, right in zip(*(arena.buffers for arena in arenas), strict=True):
            assert torch.equal(left, right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", isas())
def test_every_16_bit_number_is_read_and_written_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    arena = Arena(2**16, dtype, dtype, 0)
    arena.shard.weight.zero_()
    arena.shard.exp_avg.zero_()
    arena.shard.grad.copy_(numbers)
    # m = g, and theta = m / (0 * v + 1) = g: what is read comes out.
    update(CpuKernels(isa), arena, StepScalars(0, 1, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0, 0.0))
    assert arena.shard.low is not None
    nan = numbers.isnan()
    assert torch.equal(arena.shard.exp_avg[~nan], numbers.float()[~nan]) and bool(
        arena.shard.exp_avg[nan].isnan().all()
    )
    finite = numbers.isfinite()
    assert torch.equal(arena.shard.low[finite], numbers[finite])
    assert bool(arena.shard.low[nan].isnan().all())


def test_a_skipped_step_changes_nothing() -> None:
    for kernels in (CpuKernels(), ReferenceKernels()):
        arena = Arena(1000, torch.bfloat16, torch.bfloat16, 1)
        before = [buffer.clone() for buffer in arena.buffers]
        update(kernels, arena, StepScalars(skip=1))
        assert all(torch.equal(left, right) for left, right in zip(arena.buffers, before, strict=True))


def test_the_result_does_not_depend_on_threads_or_on_how_a_tensor_is_cut() -> None:
    whole, pieces = Arena(70001, torch.bfloat16, torch.bfloat16, 0), Arena(70001, torch.bfloat16, torch.bfloat16, 0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        update(CpuKernels(), whole)
        torch.set_num_threads(3)
        s = pieces.shard
        columns = (s.grad, s.weight, s.exp_avg, s.exp_avg_sq, s.low, s.average)
        cuts = [0, 1, 2, 2, 16390, 50000, 70001]
        shards = [
            ShardTensors(*(None if t is None else t[a:b] for t in columns), 0)  # type: ignore[arg-type]
            for a, b in itertools.pairwise(cuts)
        ]
        CpuKernels().adamw(shards, struct_bytes(SCALARS).view(1, -1))
    finally:
        torch.set_num_threads(threads)
    for left, right in zip(whole.buffers, pieces.buffers, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", GRADS)
def test_the_norm_has_the_reference_s_bits(isa: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    lists = [[1], [31, 33], [0, 512, 511], [16384, 16383, 16385, 0, 5], [300001], [17] * 300]
    for numels in lists:
        tensors = [torch.randn(numel, generator=generator).to(dtype) for numel in numels]
        mine, expected = torch.full((1,), 7.0, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        CpuKernels(isa).norm(tensors, mine)
        ReferenceKernels().norm(tensors, expected)
        assert torch.equal(mine, expected), numels
        exact = math.fsum(x * x for tensor in tensors for x in tensor.double().tolist())
        assert float(mine) == pytest.approx(exact, rel=1e-14)


def test_the_norm_of_unaligned_gradients() -> None:
    buffer = torch.randn(40000).bfloat16()
    results = []
    for start in (0, 1, 3):
        out = torch.zeros(1, dtype=torch.float64)
        shifted = torch.zeros(40008, dtype=torch.bfloat16)[start : start + 40000].copy_(buffer)
        CpuKernels().norm([shifted], out)
        results.append(float(out))
    assert len(set(results)) == 1


def test_norms_that_are_not_finite() -> None:
    for value in (math.inf, -math.inf, math.nan):
        for kernels in (CpuKernels(), ReferenceKernels()):
            out = torch.zeros(1, dtype=torch.float64)
            tensor = torch.ones(20000)
            tensor[12345] = value
            kernels.norm([tensor], out)
            assert not math.isfinite(float(out))
