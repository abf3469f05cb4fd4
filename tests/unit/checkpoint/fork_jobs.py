"""Processes that fork at the same time, or are killed while they do: ``fork_jobs.py kill ROOT COUNT SEED``.

The killer hashes nothing itself: the threads of the hasher would not live on in the processes that it forks.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pathswitch.checkpoint import Policy, verify_checkpoint
from pathswitch.checkpoint.fork import fork_checkpoint
from pathswitch.errors import CheckpointError

POLICY = Policy(beta2=0.98)


def fork(source: Path, target: Path, policy: Policy = POLICY) -> str:
    """Fork branch v1; return what came of it."""
    try:
        made = fork_checkpoint(source, target, policy=policy, paradigm="path_switching", path="v1")
    except CheckpointError as error:
        return f"error: {error}"
    return "created" if made.created else "there already"


def race(source: str, targets: str, rounds: int, policy: Policy, barrier: Any, outcomes: Any) -> None:
    """Fork into one target after the other, in each at the same moment as the other process."""
    for number in range(rounds):
        barrier.wait(30)
        outcomes.put((number, fork(Path(source), Path(targets, str(number), "global_step10"), policy)))


def in_child(action: Callable[[], None]) -> int:
    """Run an action in a process of its own and return the process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return child


def kill_at(delay_s: float, action: Callable[[], None]) -> None:
    child = in_child(action)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def whole(source: Path, target: Path) -> None:
    """Raise unless the parent is whole, and the target absent or whole; then fork again and load what came."""
    parent = verify_checkpoint(source)
    if target.exists():
        assert verify_checkpoint(target).forked_from == parent.digest
    assert not fork(source, target).startswith("error")
    assert verify_checkpoint(target).forked_from == parent.digest
    assert (target.parent / "latest").read_text() == target.name


def kill(root: Path, count: int, seed: int) -> None:
    source, chance, seen = root / "main" / "global_step10", random.Random(seed), Counter[str]()
    durations_s = []
    for number in range(3):
        started, target = time.perf_counter(), root / f"timed{number}" / "global_step10"
        os.waitpid(in_child(lambda target=target: print(fork(source, target), file=sys.stderr)), 0)
        durations_s.append(time.perf_counter() - started)
    duration_s = min(durations_s)
    for number in range(count):
        target = root / f"branch{number}" / "global_step10"
        kill_at(chance.uniform(0, 1.3 * duration_s), lambda target=target: print(fork(source, target), file=sys.stderr))
        hidden = any(target.parent.glob(".*forking*"))
        latest = (target.parent / "latest").is_file()
        seen["hidden left" if hidden else "all done" if latest else "renamed" if target.exists() else "nothing"] += 1
        _, status = os.waitpid(in_child(lambda target=target: whole(source, target)), 0)
        seen["broken"] += status != 0
    print(json.dumps(seen))


if __name__ == "__main__":
    kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
