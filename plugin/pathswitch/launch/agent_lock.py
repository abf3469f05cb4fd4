"""The lock of a path's agent: two agents never train one path."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pathswitch.errors import RunError
from pathswitch.run_folder import PathFolder

LOOK_SECONDS = 0.1


@contextmanager
def only_agent(files: PathFolder, patience_seconds: float = 1.0) -> Iterator[None]:
    """Hold the lock of a path.

    Args:
        files: the path's.
        patience_seconds: how long to wait for it; `pathswitch status` takes it for an instant, to see if it is free.

    Raises:
        RunError: another agent holds it, or it cannot be locked.
    """
    files.folder.mkdir(parents=True, exist_ok=True)
    with (files.folder / "agent.lock").open("a+") as lock:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    raise RunError(f"{files.folder}: {lock.read().strip()} looks after this path") from None
                time.sleep(LOOK_SECONDS)
            except OSError as error:
                raise no_locks(files.folder, error) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def no_locks(folder: Path, error: OSError) -> RunError:
    """Return the error of a file system on which nothing can be locked, as Lustre that was mounted without -o flock."""
    return RunError(f"{folder}: files cannot be locked there ({error.strerror}); `pathswitch doctor` says what to do")


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
