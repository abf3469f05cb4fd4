"""Megatron counts samples, a plan counts steps: the exact way from one to the other, batch-size ramp-up included."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil
from typing import Any

from pathswitch.errors import ConfigError, ScheduleError


@dataclass(frozen=True)
class BatchSchedule:
    """The number of samples of every step: constant, or growing with the samples consumed.

    Stage k begins at the first step that finds ``thresholds[k]`` samples consumed; its steps have ``sizes[k]`` samples.
    """

    stages: tuple[tuple[int, int, int], ...]
    """(first step, samples consumed before it, samples per step) of each stage."""

    def samples_after(self, step: int) -> int:
        """Return the samples that the first ``step`` steps consume."""
        first_step, samples, size = self.stages[bisect_right(self.stages, step, key=lambda stage: stage[0]) - 1]
        return samples + (step - first_step) * size

    def steps_after(self, samples: int) -> int:
        """Return after how many steps this many samples are consumed.

        Raises:
            ScheduleError: no step ends there: the samples were consumed with other batch sizes.
        """
        first_step, before, size = self.stages[bisect_right(self.stages, samples, key=lambda stage: stage[1]) - 1]
        steps, rest = divmod(samples - before, size)
        if rest:
            raise ScheduleError(
                f"{samples} samples consumed: with the batch sizes of this job a step ends at {samples - rest} and at "
                f"{samples - rest + size}, not there; was the global batch size changed on the way?"
            )
        return first_step + steps


def constant_batches(size: int) -> BatchSchedule:
    """Return the schedule of a constant global batch size, in samples."""
    return BatchSchedule(((0, 0, size),))


def growing_batches(thresholds_and_sizes: Iterable[tuple[int, int]]) -> BatchSchedule:
    """Return the schedule in which a step that finds (threshold) samples consumed has (size) samples.

    Args:
        thresholds_and_sizes: in the order of their thresholds, the first of which is 0.
    """
    stages: list[tuple[int, int, int]] = []
    for threshold, size in thresholds_and_sizes:
        if not stages:
            stages.append((0, 0, size))
            continue
        first_step, samples, previous = stages[-1]
        steps = max(0, ceil((threshold - samples) / previous))
        if steps == 0:  # the stage before was passed over within one step
            stages[-1] = (first_step, samples, size)
        else:
            stages.append((first_step + steps, samples + steps * previous, size))
    return BatchSchedule(tuple(stages))


def rampup_batches(start_size: int, increment: int, rampup_samples: int, size: int) -> BatchSchedule:
    """Return Megatron's --rampup-batch-size: sizes grow by ``increment`` over ``rampup_samples``, all in samples."""
    increments = (size - start_size) // increment
    if increments == 0 or rampup_samples == 0:
        return constant_batches(size)
    samples_per_increment = rampup_samples / increments  # a float in Megatron too, whose int(c / this) is the stage

    def threshold(stage: int) -> int:
        samples = max(0, ceil(stage * samples_per_increment) - 1)
        while int(samples / samples_per_increment) < stage:
            samples += 1
        return samples

    return growing_batches((threshold(k), start_size + k * increment) for k in range(increments + 1))


def batches_of(args: Any, calculator: Any) -> BatchSchedule:
    """Return the batch schedule of Megatron's arguments.

    Args:
        args: Megatron's arguments.
        calculator: its calculator of micro-batches, which has read --step-batch-size-schedule; None elsewhere.

    Raises:
        ConfigError: the samples of a step would depend on the number of ranks.
    """
    if getattr(args, "decrease_batch_size_if_needed", False):
        allowed = "batches whose samples do not depend on the number of ranks"
        raise ConfigError("Megatron's arguments", given="--decrease-batch-size-if-needed", allowed=allowed)
    if getattr(args, "step_batch_size_schedule", None):
        return growing_batches(calculator.schedule)
    if rampup := getattr(args, "rampup_batch_size", None):
        start_size, increment, samples = map(int, rampup)
        return rampup_batches(start_size, increment, samples, args.global_batch_size)
    return constant_batches(args.global_batch_size)
