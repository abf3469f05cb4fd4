"""Workers of torch's DataLoader outlive the signals that ask their rank to save and end.

A signal to the whole job reaches them too. Torch's own handler would end them, and the rank would fail before it has
saved. Here they take a signal from their rank alone, which ends them as ever.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from typing import Any

from pathswitch.integrations import stop_signals


def protect() -> None:
    """Patch what starts workers and what they begin with; idempotent.

    Raises:
        AttributeError: this torch has no such function.
    """
    from torch.utils.data import _utils, dataloader

    signal_handling: Any = _utils.signal_handling
    iterator: Any = dataloader._MultiProcessingDataLoaderIter
    start, begin = iterator.__init__, signal_handling._set_worker_signal_handlers
    if getattr(begin, "pathswitch_patch", False):
        return

    @functools.wraps(start)
    def start_workers(self: Any, loader: Any, *args: Any, **kwargs: Any) -> None:
        context = loader.multiprocessing_context or multiprocessing
        with stop_signals.blocked(context.get_start_method()):
            start(self, loader, *args, **kwargs)

    def begin_worker(*args: Any) -> None:
        begin(*args)
        _take_signals_from_the_parent_alone()

    begin_worker.pathswitch_patch = True  # type: ignore[attr-defined]
    iterator.__init__ = start_workers
    signal_handling._set_worker_signal_handlers = begin_worker


def _take_signals_from_the_parent_alone() -> None:
    names = stop_signals.names_of(os.environ.get(stop_signals.SIGNALS_VARIABLE, ""))
    signals, parent = {signal.Signals[name] for name in names}, multiprocessing.parent_process()
    if not signals or parent is None:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=_end_for, args=(parent.pid, signals), daemon=True, name="pathswitch_signals").start()


def _end_for(parent: int, signals: set[signal.Signals]) -> None:
    while True:
        if signal.sigwaitinfo(signals).si_pid == parent:
            os._exit(0)  # as torch's handler does: the rank would take anything else for a failure of this worker
