"""Decisions that all ranks take together: one rank acts, every rank gets its result or the same error."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from pathswitch.errors import CheckpointError, PathSwitchError

T = TypeVar("T")


def on_first_rank(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and return its result on every rank.

    Raises:
        CheckpointError: on every rank, with the message of whatever rank 0 met.
    """
    outcome: list[object] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = action()
        except PathSwitchError as error:
            outcome[1] = str(error)
        except OSError as error:
            outcome[1] = describe_os_error(error)
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise CheckpointError(str(outcome[1]))
    return cast(T, outcome[0])


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in rank order, on every rank."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def describe_os_error(error: OSError) -> str:
    """Return the file and the reason."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
