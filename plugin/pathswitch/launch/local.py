"""Run one job under the deepspeed launcher on this machine, supervised: nothing of it outlives its caller's signal."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.2
GRACE_SECONDS = 10


def deepspeed_command(module: str, arguments: Sequence[str], *, ranks: int, port: int) -> list[str]:
    """Return the line by which ``deepspeed`` itself starts a module's ``ranks`` processes on this machine."""
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(ranks))}).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}"]
    return [*launcher, "--master_addr=127.0.0.1", f"--master_port={port}", "--module", module, *arguments]


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def job_environment(ranks: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job: this one, with threads shared out among ranks and no other path selected."""
    environment = {key: value for key, value in environ.items() if key != "PATHSWITCH_PATH"}
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    if not Path("/dev/nvidia0").exists():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def run_job(command: Sequence[str], environment: Mapping[str, str], log: Path, tick: Callable[[], None]) -> int:
    """Run a command with its output appended to ``log``, calling ``tick`` while it runs; return its exit code.

    The launcher and its ranks form one process group, which is ended whole when this process is interrupted or asked
    to terminate: a launcher that gets SIGTERM alone leaves its ranks training.
    """
    with log.open("ab") as output, _terminate_as_interrupt():
        job = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=dict(environment), start_new_session=True
        )
        try:
            while True:
                tick()
                try:
                    return job.wait(POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        finally:
            end_group(job)


def end_group(job: subprocess.Popen[bytes], grace_seconds: float | None = None) -> None:
    """End what is left of the job's process group; the launcher's death does not end its ranks."""
    grace = GRACE_SECONDS if grace_seconds is None else grace_seconds
    for signum, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, GRACE_SECONDS)):
        try:
            os.killpg(job.pid, signum)
        except ProcessLookupError:
            return
        try:
            job.wait(patience)
        except subprocess.TimeoutExpired:
            continue


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that both unwind through the same clean-up."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
