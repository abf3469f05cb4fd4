"""Asynchronous saves that are done one iteration later."""

from __future__ import annotations

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
    _queue.append(async_request)


def maybe_finalize_async_save() -> None:
    for request in _queue:
        request.write()
        for function in request.finalize_fns:
            function()
    _queue.clear()
