"""The examination in a process of its own: a dead file system may hold that one for ever, and not the command line."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from pathswitch.errors import PathSwitchError
from pathswitch.launch.doctor.findings import Finding, problem

CHUNK = 1 << 16
END_SECONDS = 5.0


def examine_apart(examination: Callable[[], list[Finding]], seconds: float) -> list[Finding]:
    """Return the findings of an examination; a single one if a child process does not come to them in ``seconds``.

    Raises:
        PathSwitchError: the examination raises one.
        RuntimeError: the examination breaks.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _tell(examination, writer)
    os.close(writer)
    patience_seconds = END_SECONDS  # after an interrupt, which it gets as well
    try:
        told = _read(reader, time.monotonic() + seconds)
        patience_seconds = 0.0  # it has ended by itself what it could
    finally:
        os.close(reader)
        _leave(child, patience_seconds)
    if told is None:
        todo = "ls the plan, the run folder and the hostfile: repair or leave the file system that hangs"
        return [problem("examination", f"held up for more than {seconds:.0f} s", todo)]
    if not told:
        return [problem("examination", "ended by itself, without a result", "run it again, and report it")]
    content = json.loads(told)
    if "error" in content:
        raise PathSwitchError(content["error"])
    if "broken" in content:
        raise RuntimeError(content["broken"])
    return [Finding(**finding) for finding in content["findings"]]


def _tell(examination: Callable[[], list[Finding]], writer: int) -> None:
    """Write the findings as JSON, and end this process without a look at anything else.

    It may hang for ever: whoever reads what the command line prints must not have to wait for it.
    """
    try:
        nothing = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        try:
            content: dict[str, Any] = {"findings": [finding.as_json() for finding in examination()]}
        except PathSwitchError as error:
            content = {"error": str(error)}
        except Exception:
            content = {"broken": traceback.format_exc()}
        with os.fdopen(writer, "w") as pipe:
            json.dump(content, pipe)
    finally:
        os._exit(0)


def _read(reader: int, deadline: float) -> bytes | None:
    """Return all that comes until the other side closes the pipe; None where that is not before the deadline."""
    content = b""
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        chunk = os.read(reader, CHUNK)
        if not chunk:
            return content
        content += chunk
    return None


def _leave(child: int, patience_seconds: float) -> None:
    """Let the child end what it has started; never wait for one that does not end."""
    deadline = time.monotonic() + patience_seconds
    with suppress(ProcessLookupError, ChildProcessError):
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                return
            time.sleep(0.01)
