"""Asynchronous saves that are done one iteration later."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class AsyncRequest:
    write: Callable[[], None]
    finalize_fns: list[Callable[[], None]] = field(default_factory=list)

    def add_finalize_fn(self, function: Callable[[], None]) -> None:
        self.finalize_fns.append(function)


_queue: list[AsyncRequest] = []


def schedule_async_save(async_request: AsyncRequest) -> None:
    # What a writer in a process of its own would begin with.
    blocked = sorted(signum.name for signum in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    print("a writer starts with blocked", *blocked)
    _queue.append(async_request)


def maybe_finalize_async_save() -> None:
    for request in _queue:
        request.write()
        for function in request.finalize_fns:
            function()
    _queue.clear()
