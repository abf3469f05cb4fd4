"""The processes of jobs on one machine: those that have a job's id in their environment, and only them.

Standard library alone: this file is also sent to other hosts, and run there as it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

MARK = "PATHSWITCH_JOB"
PROC = Path("/proc")
POLL_SECONDS = 0.1
KILL_SECONDS = 5.0


class Process(TypedDict):
    """A process that belongs to a job."""

    pid: int
    job: str
    command: str


def find(jobs: Sequence[str]) -> list[Process]:
    """Return the processes of jobs, given whole ids, or what ids begin with up to a colon.

    This process and those that it descends from are never among them.
    """
    own = set(_ancestors(os.getpid()))
    pids = sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdecimal())
    return [process for pid in pids if pid not in own and (process := _process_of(pid, jobs))]


def end(jobs: Sequence[str], grace_seconds: float) -> tuple[list[Process], list[Process]]:
    """End the processes of jobs, with SIGTERM and, behind ``grace_seconds``, SIGKILL.

    Returns:
        All that were there, and those that still are.
    """
    found: dict[int, Process] = {}
    running: list[Process] = []
    for signum, patience in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, KILL_SECONDS)):
        told: set[int] = set()
        deadline = time.monotonic() + patience
        while running := find(jobs):
            for process in running:
                if process["pid"] not in told:
                    _signal(process, signum)
            told |= {process["pid"] for process in running}
            found |= {process["pid"]: process for process in running}
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
    return list(found.values()), running


def machine() -> str:
    """Return what is the same for two processes that can see each other, and for no others."""
    return f"{(PROC / 'sys/kernel/random/boot_id').read_text().strip()} {os.readlink(PROC / 'self/ns/pid')}"


def _process_of(pid: int, jobs: Sequence[str]) -> Process | None:
    try:
        entries = (PROC / str(pid) / "environ").read_bytes().split(b"\0")
        command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:  # it has ended, or is another user's
        return None
    prefix = f"{MARK}=".encode()
    for entry in entries:
        if entry.startswith(prefix):
            job = entry[len(prefix) :].decode(errors="replace")
            if f"{job}:".startswith(tuple(f"{wanted}:" for wanted in jobs)):
                return {"pid": pid, "job": job, "command": command}
    return None


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 0:
        yield pid
        status = (PROC / str(pid) / "status").read_text(errors="replace")
        pid = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("PPid:"))


def _signal(process: Process, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process["pid"], signum)


if __name__ == "__main__":
    grace, *wanted = sys.argv[1:]
    print(json.dumps([machine(), *(end(wanted, float(grace)) if grace else (find(wanted), []))]))
