"""Processes that are forks of one that has imported what they need: their imports would take longer than their work.

``python preloaded.py MODULE...`` imports the modules and serves ``Preloaded``, which the tests use. A forked process
runs its script as a new interpreter would: with its own arguments, environment, folder, output and random numbers, and
with PyTorch's entry points, which look at the environment, called in it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

START_SECONDS = 120


@dataclass(frozen=True)
class Finished:
    """What is left of a job."""

    returncode: int
    output: str
    """What all its processes have said, errors last."""


@dataclass(frozen=True)
class Job:
    """A script and its arguments, or ``-m``, a module and its arguments, for one process or several ranks."""

    command: Sequence[str]
    environments: Sequence[Mapping[str, str]]
    """One for each process."""
    folder: str
    logs: tuple[str, str]
    """Of output and of errors."""


class Preloaded:
    """A process that has imported modules, and the jobs that are forked off it, one after the other."""

    def __init__(self, modules: Sequence[str], environment: Mapping[str, str], *options: str) -> None:
        # The entry points are called in the forks.
        own = {**environment, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
        self._server = subprocess.Popen(
            [sys.executable, *options, __file__, *modules],
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        atexit.register(self._close)
        assert self._answer(START_SECONDS) == 0, f"{modules} cannot be imported in {START_SECONDS} s"

    def run(
        self,
        command: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        *,
        ranks: int | None = None,
        timeout_seconds: float = 300,
    ) -> Finished:
        """Run a job to its end; its exit code is 0 if that of every process is, else the first other one.

        Processes of a job with a number of ranks find the variables that launchers give them.
        """
        logs = [folder / f"{stream}_{time.monotonic_ns()}.txt" for stream in ("out", "err")]
        environments = [environment] if ranks is None else rank_environments(environment, ranks)
        code = self._run(Job(command, environments, str(folder), (str(logs[0]), str(logs[1]))), timeout_seconds)
        output = "".join(log.read_text(errors="replace") for log in logs)
        assert code is not None, f"still running after {timeout_seconds} s:\n{output[-4000:]}"
        return Finished(code, output)

    def _run(self, job: Job, timeout_seconds: float) -> int | None:
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        self._server.stdin.flush()
        group, code = self._answer(timeout_seconds), None
        assert group is not None, "no process was started"
        try:
            code = self._answer(timeout_seconds)
        finally:
            _kill_group(group)
            if code is None:
                self._answer(timeout_seconds)
        return code

    def _answer(self, timeout_seconds: float) -> int | None:
        """Return the server's next answer, or None if it takes too long."""
        assert self._server.stdout is not None
        if not select.select([self._server.stdout], [], [], timeout_seconds)[0]:
            return None
        line = self._server.stdout.readline()
        assert line, "the process with the imported modules has ended"
        return int(line)

    def _close(self) -> None:
        self._server.kill()
        self._server.wait()


def rank_environments(environment: Mapping[str, str], ranks: int) -> list[dict[str, str]]:
    """Return an environment with each rank's place in a process group of its own."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    sizes = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "CROSS_RANK": 0, "CROSS_SIZE": 1}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **sizes}
    everyones = {**environment, **{name: str(value) for name, value in place.items()}}
    return [{**everyones, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _kill_group(group: int) -> None:
    """Kill whatever a job has left."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def serve(modules: Sequence[str]) -> Job | None:
    """Answer requests; return twice: in each process that is to be a job, and in the end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for module in modules:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not live on in a fork"
    gc.freeze()  # else the forks' collections would copy all of it
    print(0, file=answers, flush=True)
    for line in sys.stdin:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            return Job(**json.loads(line))
        print(child, file=answers, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
    return None


def launch(job: Job) -> Mapping[str, str]:
    """Fork a job's ranks, and end the others when one fails, as launchers do; return in each, its environment."""
    os.setsid()
    if len(job.environments) == 1:
        return job.environments[0]
    processes = set()
    for environment in job.environments:
        process = os.fork()
        if process == 0:
            return environment
        processes.add(process)
    code = 0
    while processes:
        process, status = os.wait()
        processes.remove(process)
        if status != 0 and code == 0:
            code = os.waitstatus_to_exitcode(status)
            for other in processes:
                os.kill(other, signal.SIGKILL)
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


def become_new(job: Job, environment: Mapping[str, str]) -> None:
    """Be as a new process is, but for the imported modules."""
    os.chdir(job.folder)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, log in enumerate(job.logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), target)
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules and environment.get("TORCH_DEVICE_BACKEND_AUTOLOAD") != "0":
        sys.modules["torch"]._import_device_backends()


def run_script(command: Sequence[str]) -> int:
    """Run a script as the interpreter does, and return its exit code."""
    sys.argv = list(command)
    try:
        if sys.argv[0] == "-m":
            del sys.argv[0]
            sys.path[0] = os.getcwd()
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, str):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    """Serve, or be a process of a job."""
    job = serve(sys.argv[1:])
    if job is None:
        return
    become_new(job, launch(job))
    code = run_script(job.command)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # taking the imported modules apart would take a second


if __name__ == "__main__":
    main()
