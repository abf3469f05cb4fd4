"""The lock of a path's agent: two agents never train one path."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pathswitch.errors import RunError
from pathswitch.run_folder import PathFolder

LOCK_ATTEMPTS = 10


@contextmanager
def only_agent(files: PathFolder) -> Iterator[None]:
    """Hold the lock of a path.

    Raises:
        RunError: another agent holds it.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    with (files.folder / "agent.lock").open("a+") as lock:
        for attempt in range(LOCK_ATTEMPTS):  # `pathswitch status` holds it for an instant to see whether it is free
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt + 1 == LOCK_ATTEMPTS:
                    lock.seek(0)
                    raise RunError(f"{files.folder}: {lock.read().strip()} looks after this path") from None
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def holder(files: PathFolder) -> str | None:
    """Return which agent looks after a path, None where none does."""
    try:
        lock = (files.folder / "agent.lock").open("rb")
    except FileNotFoundError:
        return None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return lock.read().decode().strip()
        return None
