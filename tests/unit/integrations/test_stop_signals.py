"""Signals noted from the end of `import torch` on, in ranks alone, and not in what a rank starts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

STATE = """
import os, signal, sys
def state(): return [name if callable(h := signal.getsignal(signal.Signals[name])) else str(int(h))
                     for name in ("SIGTERM", "SIGUSR2")]
"""
NOTED, DEFAULT = ["SIGTERM", "SIGUSR2"], ["0", "0"]


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PATHSWITCH") and name != "RANK"}
    return subprocess.run(
        [sys.executable, "-c", STATE + code], env=own | variables, capture_output=True, text=True, timeout=120
    )


ASKED = {"PATHSWITCH_STOP_SIGNALS": "SIGTERM,SIGUSR2"}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({**ASKED, "RANK": "1"}, NOTED),
        (ASKED, ["0", "1"]),  # a launcher ends by SIGTERM as ever, and ignores the other, as its ranks do at first
        ({"RANK": "1"}, DEFAULT),
        ({**ASKED, "RANK": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, DEFAULT),
    ],
    ids=["rank", "launcher", "not asked", "switched off"],
)
def test_behind_import_torch(variables: dict[str, str], expected: list[str]) -> None:
    done = python("import torch; print(state())", **variables)
    assert (done.stdout, done.stderr) == (f"{expected}\n", "")


def test_another_thread_and_a_wrong_name_leave_import_torch_alone() -> None:
    code = "import threading\nt = threading.Thread(target=lambda: __import__('torch')); t.start(); t.join()\n"
    done = python(code + "print(state())", RANK="0", **ASKED)
    assert (done.stdout, done.stderr) == (f"{DEFAULT}\n", "")
    done = python("import torch; print(state())", RANK="0", PATHSWITCH_STOP_SIGNALS="SIGTERM,SIGNONSENSE")
    assert done.stderr == "pathswitch: PATHSWITCH_STOP_SIGNALS is not followed: KeyError('SIGNONSENSE')\n"
    assert done.returncode == 0


CHILDREN = """
import multiprocessing, subprocess
import torch
from pathswitch.integrations import stop_signals
def show(name): print(name, state(), flush=True)
def wait(start):
    import time
    print("waiting", flush=True)
    time.sleep(100)
if __name__ == "__main__":
    show("rank")
    os.kill(os.getpid(), signal.SIGUSR2)
    print(stop_signals.received() == signal.SIGUSR2, flush=True)
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=show, args=("forked",)); child.start(); child.join()
    with fork.Pool(2) as pool: print(pool.map(abs, [-1, -2]), flush=True)
    process = fork.Process(target=wait, args=(0,)); process.start(); process.terminate(); process.join(20)
    print(process.exitcode, flush=True)
    code = "import torch, signal; print('started', str(int(signal.getsignal(signal.SIGUSR2))))"
    subprocess.run([sys.executable, "-c", code])
    code = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('blocked')"
    with stop_signals.blocked("fork"):
        subprocess.run([sys.executable, "-c", code])
    stop_signals.release()
    show("released")
"""


def test_what_a_rank_starts_ends_as_ever() -> None:
    """A forked child that would not end when terminated keeps `with Pool()` waiting for ever."""
    done = python(CHILDREN, RANK="0", **ASKED)
    # The child may be ended between the word and the end of its line, or before both.
    assert done.stdout.replace("waiting\n", "").replace("waiting", "").splitlines() == [
        f"rank {NOTED}",
        "True",
        f"forked {DEFAULT}",
        "[1, 2]",
        "-15",
        "started 0",
        "blocked",
        f"released {DEFAULT}",
    ], done.stderr
