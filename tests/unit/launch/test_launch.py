"""The launch line, the job's environment and supervision, what is said of a job that failed, and its progress."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pathswitch.atomic import write_text_atomic
from pathswitch.config import plan_from_params
from pathswitch.launch.failure import failure_reason
from pathswitch.launch.local import deepspeed_command, job_environment, run_job
from pathswitch.launch.progress import PathProgress


def test_the_launch_line_is_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `deepspeed --num_gpus 2` starts on this machine means the same to the process that it starts."""
    from deepspeed.launcher import launch, runner

    started: list[list[str]] = []
    popen = subprocess.Popen

    def note(command: list[str], **options: Any) -> subprocess.Popen[Any]:
        started.append(command)
        return popen("true" if "deepspeed.launcher.launch" in command else command, **options)

    monkeypatch.setattr(subprocess, "Popen", note)
    words = ["--module", "pathswitch.trainer", "--out", "a b"]
    runner.main(["--num_gpus", "2", "--master_port", "1234", *words])
    ours = deepspeed_command(words[1], words[2:], ranks=2, port=1234)
    meanings = []
    for command in (ours, started[-1]):
        assert command[:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
        monkeypatch.setattr(sys, "argv", command[3:])
        meanings.append(launch.parse_args())
    assert meanings[0] == meanings[1]


def test_threads_are_shared_out_and_no_other_path_is_selected() -> None:
    environment = job_environment(2, {"PATHSWITCH_PATH": "v9", "HOME": "/h"})
    assert "PATHSWITCH_PATH" not in environment
    assert int(environment["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert job_environment(2, {"OMP_NUM_THREADS": "7"})["OMP_NUM_THREADS"] == "7"


def test_a_jobs_output_and_exit_code_arrive(tmp_path: Path) -> None:
    log, ticks = tmp_path / "log.txt", []
    log.write_text("before\n")
    code = run_job(["sh", "-c", "echo out; echo err >&2; exit 7"], os.environ, log, lambda: ticks.append(1))
    assert (code, log.read_text()) == (7, "before\nout\nerr\n")
    assert ticks


def test_an_interrupted_job_takes_its_children_with_it(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"sleep 300 & echo $! > {pid_file}; wait"

    def tick() -> None:
        if pid_file.is_file() and pid_file.read_text().strip():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(["sh", "-c", script], os.environ, tmp_path / "log.txt", tick)
    assert _is_gone(int(pid_file.read_text()))


def test_sigterm_unwinds_like_an_interrupt(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_job(["sleep", "300"], os.environ, tmp_path / "log.txt", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def _is_gone(pid: int) -> bool:
    for _ in range(500):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["noise", "pathswitch: error: alpha: given 2", "pathswitch: error: again"], "alpha: given 2"),
        (
            [
                "[rank1]: RuntimeError: gloo: Connection closed by peer [127.0.0.1]",
                "[rank0]: ValueError: the cause",
                "more",
            ],
            "[rank0]: ValueError: the cause",
        ),
        (["only noise"], "only noise"),
    ],
)
def test_the_cause_is_found_in_the_log(tmp_path: Path, lines: list[str], expected: str) -> None:
    log = tmp_path / "log.txt"
    log.write_text("pathswitch: error: of an earlier job\n")
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("\n".join(lines) + "\n")
    reason = failure_reason(log, start)
    assert expected in reason and "earlier" not in reason and str(log) in reason


def record(step: int) -> str:
    return json.dumps({"step": step, "lr": 1e-3, "loss": 2.5, "seconds": 0.5, "grad_norm": 1.0}) + "\n"


def test_progress_in_a_log_is_plain_lines(tmp_path: Path) -> None:
    metrics, shown = tmp_path / "metrics.jsonl", io.StringIO()
    console = Console(file=shown, width=120)
    plan = plan_from_params({"max_lr": 1e-3, "versions": [{"name": "v1", "steps": 3}]})
    path = plan.path("v1", "wsd_s")
    with PathProgress(console, path, metrics, first_step=0, tokens_per_step=100) as progress:
        progress.tick()
        metrics.write_text(record(0) + record(1) + record(2)[:10])
        progress.tick()
        metrics.write_text(record(0) + record(1) + record(2))
        progress.tick()
    lines = shown.getvalue().splitlines()
    assert lines[0] == "wsd_s/v1: starting at step 0 of 3"
    assert lines[1] == "wsd_s/v1: step 3 of 3  loss 2.500  lr 1.00e-03  200 tok/s"
    assert lines[2:] == ["wsd_s/v1: saving, evaluating on all test text, exporting"]


def test_progress_of_a_resumed_path_whose_metrics_are_replaced(tmp_path: Path) -> None:
    metrics, shown = tmp_path / "metrics.jsonl", io.StringIO()
    metrics.write_text("".join(record(step) for step in range(3)))
    path = plan_from_params({"max_lr": 1e-3, "versions": [{"name": "v1", "steps": 5}]}).path("v1", "wsd_s")
    with PathProgress(Console(file=shown, width=120), path, metrics, first_step=1, tokens_per_step=100) as progress:
        # Longer than the old one when it is looked at, and with other line ends.
        write_text_atomic(metrics, "".join(record(step)[:-1] + " " * 9 + "\n" for step in range(5)))
        progress.tick()
    assert "wsd_s/v1: step 5 of 5" in shown.getvalue()
