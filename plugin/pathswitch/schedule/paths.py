"""LR paths: the main path, the branch that leaves it, and the runs of the baselines.

A step s is the number of updates done so far, so the first update of a run uses lr(0). Every path is a frozen
dataclass of plain numbers with one method, ``schedule()``, that returns the pure function step -> lr.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import isfinite
from typing import Protocol

from pathswitch.errors import ConfigError
from pathswitch.schedule.shapes import Shape, shape_parameters

Schedule = Callable[[int], float]
Field = str | int | float | list[float]


class LRPath(Protocol):
    """What every LR path offers: its schedule, and the fields that determine it to the bit."""

    def schedule(self) -> Schedule:
        """Return the pure function step -> lr."""

    def fields(self) -> dict[str, Field]:
        """Return everything that determines the schedule, as JSON values."""


def digest(path_fields: dict[str, Field]) -> str:
    """Return the SHA-256 of the fields in canonical JSON."""
    return hashlib.sha256(json.dumps(path_fields, sort_keys=True).encode()).hexdigest()


def _check_lr(where: str, value: float, *, low: float, high: float, allowed: str) -> None:
    if not (isfinite(value) and low <= value <= high):
        raise ConfigError(where, given=value, allowed=allowed)


def _check_steps(where: str, value: int, *, low: int) -> None:
    if value < low:
        raise ConfigError(where, given=value, allowed=f"a whole number of steps >= {low}")


def _shape_fields(shape: Shape, final_lr: float) -> dict[str, Field]:
    parameters = {name: getattr(shape, name) for name in shape_parameters(type(shape))}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}
    return {"shape": shape.name, **plain, "final_lr": final_lr}


@dataclass(frozen=True)
class MainPath:
    """Warm-up, then the maximum LR for ever: the path that is never released and has no horizon."""

    max_lr: float
    init_lr: float = 0.0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        """Refuse LRs that are not finite, max_lr <= 0, init_lr outside 0..max_lr, negative warm-up."""
        if not (isfinite(self.max_lr) and self.max_lr > 0):
            raise ConfigError("[schedule] max_lr", given=self.max_lr, allowed="a finite LR > 0")
        allowed = f"0 <= init_lr <= max_lr ({self.max_lr})"
        _check_lr("[schedule] init_lr", self.init_lr, low=0.0, high=self.max_lr, allowed=allowed)
        _check_steps("[schedule] warmup_steps", self.warmup_steps, low=0)

    def schedule(self) -> Schedule:
        """Return step -> init_lr + (max_lr - init_lr) * (s + 1) / W for s < W, max_lr from then on."""
        max_lr, init_lr, warmup_steps = self.max_lr, self.init_lr, self.warmup_steps
        rise, last_warmup_step = max_lr - init_lr, warmup_steps - 1

        def lr(step: int) -> float:
            if step >= last_warmup_step:
                return max_lr
            return init_lr + rise * (step + 1) / warmup_steps

        return lr

    def scaled_to(self, max_lr: float) -> MainPath:
        """Return this path with another max_lr, and init_lr in the same proportion."""
        return MainPath(max_lr, self.init_lr * (max_lr / self.max_lr), self.warmup_steps)

    def fields(self) -> dict[str, Field]:
        """Return max_lr, init_lr and warmup_steps."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True)
class BranchPath:
    """Leaves the main path at ``fork_step`` and decays the LR completely over ``decay_steps``."""

    main: MainPath
    fork_step: int
    decay_steps: int
    shape: Shape
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a fork inside the warm-up, a decay of no steps, and a final_lr that the shape does not have."""
        _check_steps("branch decay_steps", self.decay_steps, low=1)
        if self.fork_step < self.main.warmup_steps:
            raise ConfigError(
                "[schedule] warmup_steps",
                given=self.main.warmup_steps,
                allowed=f"at most the first fork step ({self.fork_step}): a branch leaves the main path at max_lr",
            )
        allowed = f"0 <= final_lr <= max_lr ({self.main.max_lr})"
        _check_lr("branch final_lr", self.final_lr, low=0.0, high=self.main.max_lr, allowed=allowed)

    @property
    def end_step(self) -> int:
        """The step at which the LR has become exactly final_lr and the branch is released."""
        return self.fork_step + self.decay_steps

    def schedule(self) -> Schedule:
        """Return step -> the main path's LR before the fork, the decay behind it, final_lr from end_step on."""
        fork_step, decay_steps, end_step = self.fork_step, self.decay_steps, self.end_step
        main, final_lr = self.main.schedule(), self.final_lr
        curve = self.shape.curve(self.main.max_lr, final_lr)

        def lr(step: int) -> float:
            if step < fork_step:
                return main(step)
            if step >= end_step:
                return final_lr
            return curve((step - fork_step) / decay_steps)

        return lr

    def scaled_to(self, max_lr: float) -> BranchPath:
        """Return this path with another max_lr, and init_lr and final_lr in the same proportion."""
        final_lr = self.final_lr * (max_lr / self.main.max_lr)
        return BranchPath(self.main.scaled_to(max_lr), self.fork_step, self.decay_steps, self.shape, final_lr)

    def fields(self) -> dict[str, Field]:
        """Return the main path's fields, the fork and decay steps, the shape with its parameters, final_lr."""
        steps: dict[str, Field] = {"fork_step": self.fork_step, "decay_steps": self.decay_steps}
        return self.main.fields() | steps | _shape_fields(self.shape, self.final_lr)


@dataclass(frozen=True)
class DecayRun:
    """Warm-up from ``start_step`` on, then one decay down to final_lr at ``end_step`` (PTFS, re-warmed CPT)."""

    main: MainPath
    start_step: int
    end_step: int
    shape: Shape
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        """Refuse a run that is not longer than its warm-up."""
        steps = self.end_step - self.start_step
        if steps <= self.main.warmup_steps:
            raise ConfigError(
                "[schedule] warmup_steps",
                given=self.main.warmup_steps,
                allowed=f"less than the {steps} steps of a run that warms up and decays",
            )

    def schedule(self) -> Schedule:
        """Return step -> warm-up on the run's own clock, then shape((s - start - W) / (T - W)), then final_lr."""
        start_step, end_step, final_lr = self.start_step, self.end_step, self.final_lr
        warm = self.main.schedule()
        decay_start_step = start_step + self.main.warmup_steps
        decay_steps = end_step - decay_start_step
        curve = self.shape.curve(self.main.max_lr, final_lr)

        def lr(step: int) -> float:
            if step < decay_start_step:
                return warm(step - start_step)
            if step >= end_step:
                return final_lr
            return curve((step - decay_start_step) / decay_steps)

        return lr

    def fields(self) -> dict[str, Field]:
        """Return the warm-up's fields, the start and end steps, the shape with its parameters, final_lr."""
        steps: dict[str, Field] = {"start_step": self.start_step, "end_step": self.end_step}
        return self.main.fields() | steps | _shape_fields(self.shape, self.final_lr)


@dataclass(frozen=True)
class ConstantRun:
    """One constant LR (CPT at the floor)."""

    lr: float

    def schedule(self) -> Schedule:
        """Return step -> lr."""
        constant = self.lr
        return lambda step: constant

    def fields(self) -> dict[str, Field]:
        """Return the LR."""
        return {"constant_lr": self.lr}
