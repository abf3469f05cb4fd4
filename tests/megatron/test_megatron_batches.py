"""Steps and samples against Megatron's own calculators, walked update by update."""

from __future__ import annotations

from typing import Any

import pytest
from megatron.core import num_microbatches_calculator as megatron

from pathswitch.errors import ConfigError, ScheduleError
from pathswitch_megatron.batches import BatchSchedule, batches_of, constant_batches, growing_batches, rampup_batches


def walk(calculator: Any, steps: int) -> list[int]:
    """Samples consumed before each step, by Megatron's own loop."""
    consumed = [0]
    for _ in range(steps):
        calculator.update(consumed[-1], consistency_check=False)
        consumed.append(consumed[-1] + calculator.get_current_running_global_batch_size())
    return consumed


def assert_equal(batches: BatchSchedule, consumed: list[int]) -> None:
    assert [batches.samples_after(step) for step in range(len(consumed))] == consumed
    assert [batches.steps_after(samples) for samples in consumed] == list(range(len(consumed)))


@pytest.mark.skipif(
    not hasattr(megatron, "RampupBatchsizeNumMicroBatchesCalculator"),
    reason="this Megatron core has no --rampup-batch-size any more; 0.12 to 0.18 have",
)
@pytest.mark.parametrize(
    ("start", "increment", "samples", "size"),
    [
        (8, 8, 64, 24),
        (2, 2, 1000, 64),
        (16, 8, 7, 48),
        (1, 1, 10, 4),
        (32, 32, 975_000, 1024),
        (6, 6, 100, 24),
        (8, 8, 0, 8),
    ],
)
def test_rampup(start: int, increment: int, samples: int, size: int) -> None:
    if size == start:
        assert rampup_batches(start, increment, samples, size) == constant_batches(size)
        return
    calculator = megatron.RampupBatchsizeNumMicroBatchesCalculator(size, 1, 1, False, 1, start, increment, samples)
    assert_equal(rampup_batches(start, increment, samples, size), walk(calculator, 3000))


class Steps:
    """Megatron's rule for --step-batch-size-schedule: the last threshold that is not above the samples consumed."""

    def __init__(self, schedule: list[tuple[int, int]]) -> None:
        self.schedule, self.size = schedule, 0

    def update(self, consumed: int, consistency_check: bool) -> None:
        self.size = [size for threshold, size in self.schedule if threshold <= consumed][-1]

    def get_current_running_global_batch_size(self) -> int:
        return self.size


@pytest.mark.parametrize("schedule", [[(0, 4)], [(0, 4), (10, 8), (100, 6)], [(0, 50), (10, 7), (20, 9), (1000, 11)]])
def test_step_schedule(schedule: list[tuple[int, int]]) -> None:
    assert_equal(growing_batches(schedule), walk(Steps(schedule), 500))
    if hasattr(megatron, "StepBatchsizeNumMicroBatchesCalculator"):
        text = " ".join(f"{threshold}:{size}" for threshold, size in schedule)
        calculator = megatron.StepBatchsizeNumMicroBatchesCalculator(1, 1, False, 1, text)
        assert_equal(growing_batches(calculator.schedule), walk(calculator, 500))


def test_samples_that_no_step_ends_with() -> None:
    with pytest.raises(ScheduleError, match=r"33 samples consumed: .* ends at 32 and at 48"):
        rampup_batches(8, 8, 64, 24).steps_after(33)


def test_arguments() -> None:
    class Args:
        global_batch_size = 24
        rampup_batch_size: Any = None
        decrease_batch_size_if_needed = False

    args = Args()
    assert batches_of(args, None) == constant_batches(24)
    args.rampup_batch_size = ["8", "8", "64"]
    assert batches_of(args, None) == rampup_batches(8, 8, 64, 24)
    args.decrease_batch_size_if_needed = True
    with pytest.raises(ConfigError, match="decrease-batch-size-if-needed"):
        batches_of(args, None)
