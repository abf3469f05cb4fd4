"""LR paths as the kernels read them: 64 bytes, and a table with the LR of each step of a decay."""

from __future__ import annotations

from dataclasses import dataclass

from pathswitch.errors import ConfigError
from pathswitch.kernels.layouts import NEVER, PathDescriptor
from pathswitch.schedule import BranchPath, ConstantRun, DecayRun, LRPath, MainPath


@dataclass(frozen=True)
class DevicePath:
    """A path's descriptor without its table's address, the table, and the step that the device counts from."""

    descriptor: PathDescriptor
    decay_lrs: list[float]
    first_step: int


def constant_path(lr: float) -> DevicePath:
    """Return a path of one LR."""
    return DevicePath(PathDescriptor(max_lr=lr, final_lr=lr, fork_step=NEVER), [], 0)


def device_path(path: LRPath) -> DevicePath:
    """Return a path as the kernels read it: warm-up from its formula, the decay step by step from its schedule.

    Raises:
        ConfigError: it is no path of the schedule.
    """
    if isinstance(path, ConstantRun):
        return constant_path(path.lr)
    if isinstance(path, MainPath):
        return DevicePath(_descriptor(path, path.max_lr, NEVER, 0), [], 0)
    if isinstance(path, BranchPath):
        return _decaying(path, path.main, path.fork_step, path.end_step, first_step=0)
    if isinstance(path, DecayRun):
        fork_step = path.start_step + path.main.warmup_steps
        return _decaying(path, path.main, fork_step, path.end_step, first_step=path.start_step)
    allowed = "a MainPath, BranchPath, DecayRun or ConstantRun of pathswitch.schedule"
    raise ConfigError("PathSwitchAdamW.follow path", given=type(path).__name__, allowed=allowed)


def _decaying(
    path: BranchPath | DecayRun, main: MainPath, fork_step: int, end_step: int, *, first_step: int
) -> DevicePath:
    lr = path.schedule()
    table = [lr(step) for step in range(fork_step, end_step)]
    descriptor = _descriptor(main, path.final_lr, fork_step - first_step, len(table))
    return DevicePath(descriptor, table, first_step)


def _descriptor(main: MainPath, final_lr: float, fork_step: int, decay_steps: int) -> PathDescriptor:
    return PathDescriptor(
        max_lr=main.max_lr,
        init_lr=main.init_lr,
        final_lr=final_lr,
        warmup_steps=main.warmup_steps,
        fork_step=fork_step,
        decay_steps=decay_steps,
    )
