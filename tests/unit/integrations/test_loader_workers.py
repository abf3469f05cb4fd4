"""Workers of a DataLoader outlive a signal to the whole job, and end with their rank as ever."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("loader_script.py")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process group of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PATHSWITCH")}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=own | {"OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=200,
        start_new_session=True,
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_outlive_the_signals_and_end_with_their_rank(method: str) -> None:
    done = run(method, RANK="0", PATHSWITCH_STOP_SIGNALS="SIGTERM,SIGUSR2")
    assert done.returncode == 0, done.stderr
    *lines, workers = done.stdout.splitlines()
    assert lines == ["read True noted True", "ended [0, 0]", "terminated 0"], done.stderr
    assert "Error" not in done.stderr and "resource_tracker" not in done.stderr
    for _ in range(1000):
        if not any(Path("/proc", pid).exists() for pid in workers.split()[1:]):
            return
        time.sleep(0.02)
    raise AssertionError(f"left behind: {workers}")


def test_control_without_protection() -> None:
    done = run("fork", "control")
    assert done.returncode != 0
    assert "is killed by signal: Terminated" in done.stderr or "exited unexpectedly" in done.stderr, done.stderr
