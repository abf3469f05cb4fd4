"""Signals that ask a rank to save and end: a handler only notes them, and the ranks agree at the end of a step.

Imports nothing but the standard library: the handlers are there as early as the end of ``import torch``. What a rank
starts does not keep them: forked processes get back what was there before, others begin with the system's defaults.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from multiprocessing import resource_tracker
from types import FrameType

SIGNALS_VARIABLE = "PATHSWITCH_STOP_SIGNALS"
# Set by a rank for whatever it starts, which inherits RANK too, and is no rank.
RANK_PROCESS_VARIABLE = "PATHSWITCH_RANK_PROCESS"
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
# A launcher ends its ranks when it gets one of these; any other stop signal would only kill it, and leave them alone.
LAUNCHERS_OWN = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

Handler = Callable[[int, FrameType | None], object] | int | None

_received = 0
_previous: dict[signal.Signals, Handler] = {}


def names_of(text: str) -> tuple[str, ...]:
    """Return the names of signals in a list with commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def prepare_process() -> bool:
    """Do what PATHSWITCH_STOP_SIGNALS asks of this process; return whether workers of a DataLoader need protection."""
    names = names_of(os.environ.get(SIGNALS_VARIABLE, ""))
    if not names or threading.current_thread() is not threading.main_thread():
        return bool(names)
    if os.environ.get(RANK_PROCESS_VARIABLE, str(os.getpid())) != str(os.getpid()):
        return True  # a process that a rank has started: the rank ends it
    if any(variable in os.environ for variable in RANK_VARIABLES):
        install(names)
        return True
    for signum in {signal.Signals[name] for name in names} - LAUNCHERS_OWN:
        signal.signal(signum, signal.SIG_IGN)  # which its ranks inherit until they have handlers of their own
    return False


def install(names: Iterable[str]) -> list[str]:
    """Note these signals from now on, beside those of before; return the names of those that a script had handled.

    Only the main thread can; called in another one, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    _hook_into_forks()
    replaced = []
    for signum in [signal.Signals[name] for name in names]:
        handler = signal.getsignal(signum)
        if handler is _note:
            continue
        if callable(handler) and handler is not signal.default_int_handler:
            replaced.append(signum.name)
        _previous.setdefault(signum, handler)
        signal.signal(signum, _note)
    known = {*names_of(os.environ.get(SIGNALS_VARIABLE, "")), *(signum.name for signum in _previous)}
    os.environ[SIGNALS_VARIABLE] = ",".join(sorted(known))
    os.environ[RANK_PROCESS_VARIABLE] = str(os.getpid())
    return replaced


def received() -> int:
    """Return the first signal that this process got, 0 without one."""
    return _received


def release() -> bool:
    """Let the signals do what they did before ``install``; return whether any had been noted."""
    os.environ.pop(SIGNALS_VARIABLE, None)
    return _restore()


def ignore() -> None:
    """Ignore the signals from now on: as it takes itself apart, Python would put the system's defaults back."""
    if threading.current_thread() is threading.main_thread():
        for signum in _previous:
            if signal.getsignal(signum) is _note:
                signal.signal(signum, signal.SIG_IGN)


@contextmanager
def blocked(start_method: str) -> Iterator[None]:
    """Start helper processes that get none of the signals: they keep the mask of the thread that starts them."""
    signals = set(_previous)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        if signals and start_method != "fork":
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # starting it has unblocked SIGTERM, up to Python 3.11
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _note(signum: int, frame: FrameType | None) -> None:
    global _received
    _received = _received or signum


_mask = threading.local()


@cache
def _hook_into_forks() -> None:
    # A child that does not end when its parent terminates it would keep, for one, every multiprocessing.Pool waiting.
    os.register_at_fork(before=_before_fork, after_in_parent=_unblock, after_in_child=_begin_child)


def _before_fork() -> None:
    # A signal that the child gets while it still has the handler would be lost.
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, set(_previous))


def _begin_child() -> None:
    _restore()
    _unblock()


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _restore() -> bool:
    handlers = dict(_previous)
    _previous.clear()
    for signum, handler in handlers.items():
        if signal.getsignal(signum) is _note:
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    return bool(handlers)
