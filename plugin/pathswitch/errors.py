"""One error family: every message says what was given, what is allowed, and where."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class PathSwitchError(Exception):
    """Base of every error that pathswitch raises on purpose.

    Deliberately not a subclass of TypeError: DeepSpeed swallows a TypeError that leaves ``lr_scheduler.step()``
    and then calls ``step(train_batch_size)``, which would move the clock by a whole batch.
    """


class ConfigError(PathSwitchError):
    """A plan, a ds_config or an argument holds a value that is not allowed."""

    def __init__(self, where: str, *, given: object, allowed: str) -> None:
        """Compose ``<where>: given <given>; allowed: <allowed>``."""
        self.where, self.given, self.allowed = where, given, allowed
        super().__init__(f"{where}: given {given!r}; allowed: {allowed}")


class ScheduleError(PathSwitchError):
    """A scheduler was moved to a step, or given a state, that its plan does not have."""


class DataError(PathSwitchError):
    """A text file, a token stream or a tokenizer cannot be used as it is."""


class RunError(PathSwitchError):
    """A training job did not complete, or a run folder disagrees with the plan."""


class CheckpointError(PathSwitchError):
    """A checkpoint is damaged, was never committed, or cannot be used by this job."""


class UpstreamError(PathSwitchError):
    """A framework does not have what these hooks replace."""


class KernelError(PathSwitchError):
    """The fused kernels cannot be compiled, loaded or launched."""


class LedgerError(PathSwitchError):
    """A ledger record cannot be read or written."""


def choices(names: Iterable[str], given: str = "") -> str:
    """List the allowed names, with a hint when ``given`` is close to one of them."""
    ordered = list(names)
    close = get_close_matches(given, ordered, n=1)
    return ", ".join(ordered) + (f" (did you mean {close[0]!r}?)" if close else "")
