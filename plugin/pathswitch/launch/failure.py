"""Why a job has failed, as far as its log tells."""

from __future__ import annotations

import re
from pathlib import Path

ERROR_MARK = "pathswitch: error: "
LOG_TAIL_LINES = 15
RAISED = re.compile(r"(\[rank\d+\]: )?[\w.]*(Error|Exception)\b.*: ")
# An error of our own family in a user's script: another start would meet it again.
OWN = re.compile(r"(\[rank\d+\]: )?pathswitch\.errors\.\w+: ")


def failure_reason(log: Path, start: int) -> str:
    """Return our own error message from a log behind ``start`` bytes, or the first exception, or the log's tail."""
    lines = _lines(log, start)
    ours = [line.partition(ERROR_MARK)[2] for line in lines if ERROR_MARK in line]
    # The ranks that wait for a dead one fail too, with the news that its connection is closed.
    raised = [line for line in lines if RAISED.match(line) and "Connection closed by peer" not in line]
    if ours or raised:
        return f"{(ours or raised)[0]} (log: {log})"
    tail = "\n  ".join(lines[-LOG_TAIL_LINES:])
    return f"the last lines of {log}:\n  {tail}"


def is_refusal(log: Path, start: int) -> bool:
    """Return whether pathswitch itself has refused to go on: the plan, the data or a checkpoint is not right."""
    return any(ERROR_MARK in line or OWN.match(line) for line in _lines(log, start))


def _lines(log: Path, start: int) -> list[str]:
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()
