"""Programs that a check runs: each in a process group of its own, which is ended when its time is up."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import IO, Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Output:
    """What a program has written, and its exit code; None where it had to be ended."""

    code: int | None
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        """The last line of stderr, or else of stdout: where programs say why they failed."""
        lines = [line.strip() for text in (self.stdout, self.stderr) for line in text.splitlines() if line.strip()]
        return lines[-1] if lines else "no message"


class Programs:
    """Runs programs with the given variables until a common deadline."""

    def __init__(self, environ: Mapping[str, str], seconds: float) -> None:
        self.environ, self.seconds = environ, seconds
        self._end = time.monotonic() + seconds
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []
        self._ended = False

    def remaining(self) -> float:
        """Return the seconds that are left, 0 behind the deadline."""
        return max(0.0, self._end - time.monotonic())

    def start(self, command: Sequence[str], **streams: IO[Any] | int) -> subprocess.Popen[bytes]:
        """Start a program in a process group of its own."""
        with self._lock:
            if self._ended:
                raise TimeoutError(f"{command[0]}: no time left to run it")
            process = subprocess.Popen(list(command), env=dict(self.environ), start_new_session=True, **streams)  # type: ignore[call-overload]
            self._running.append(process)
        started: subprocess.Popen[bytes] = process
        return started

    def run(self, command: Sequence[str], *, timeout: float, stdin: bytes = b"") -> Output:
        """Run a program to its end, or until ``timeout`` seconds or the common deadline are over."""
        process = self.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        code: int | None = None
        try:
            stdout, stderr = process.communicate(stdin, timeout=min(timeout, self.remaining()))
            code = process.returncode
        except subprocess.TimeoutExpired:
            end(process)
            try:
                stdout, stderr = process.communicate(timeout=1)
            except subprocess.TimeoutExpired as late:  # a process that even SIGKILL does not end: its disk hangs
                stdout, stderr = late.stdout or b"", late.stderr or b""
        return Output(code, stdout.decode(errors="replace"), stderr.decode(errors="replace"))

    def end_all(self) -> None:
        """End whatever is still running, and let nothing else be started."""
        with self._lock:
            self._ended = True
            for process in self._running:
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a program of ``Programs.start`` with its children."""
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def in_parallel(
    programs: Programs, function: Callable[[Item], Result], items: Sequence[Item]
) -> list[Result | Exception | None]:
    """Return the result, or the exception, of a function for each item; None where it does not return in time.

    Its threads do not keep the process from ending: one that hangs in a dead file system never returns.
    """
    results: list[Result | Exception | None] = [None] * len(items)

    def work(place: int, item: Item) -> None:
        try:
            results[place] = function(item)
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=work, args=pair, daemon=True) for pair in enumerate(items)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(programs.remaining())
    return results
