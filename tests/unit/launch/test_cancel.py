"""Cancelling: what runs is asked to save, what waits leaves the queue, and nothing starts on the way."""

from __future__ import annotations

import getpass
import multiprocessing
import signal
import socket
import time
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from launch_jobs import HERE, open_run, submit, wait_for, write_plan

from pathswitch.cli.jobs import cancel_run
from pathswitch.errors import ConfigError, RunError
from pathswitch.launch.agent_lock import holder, only_agent
from pathswitch.launch.cancel import cancel_jobs
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import JobSpec
from pathswitch.launch.status import run_status, submitted_specs

BY = f"cancelled by {getpass.getuser()} on {socket.gethostname()}"


@pytest.fixture
def run(slurm: FakeSlurm, tmp_path: Path) -> Path:
    """A run whose main path and first branch are running."""
    plan, run = write_plan(tmp_path / "plan.toml"), tmp_path / "run"
    submit(plan, run)
    for name in ("main", "v1"):
        slurm.change(name, state="RUNNING", reason="None")
    slurm.forget_calls()
    return run


def test_what_runs_is_asked_to_save_and_what_waits_leaves_the_queue(slurm: FakeSlurm, run: Path) -> None:
    lines = list(cancel_jobs(submitted_specs(run), now=False))
    ids = {name: job["id"] for name, job in slurm.jobs.items()}
    # Children first: the end of their parent must not let them start.
    assert lines == [
        f"v3: job {ids['v3']} is cancelled",
        f"v2: job {ids['v2']} is cancelled",
        f"v1: job {ids['v1']} is asked to save and end",
        f"main: job {ids['main']} is asked to save and end",
    ]
    assert slurm.calls("scancel") == [
        ["scancel", ids["v3"]],
        ["scancel", ids["v2"]],
        ["scancel", "--signal=USR2", ids["v1"]],
        ["scancel", "--signal=USR2", ids["main"]],
    ]
    stops = {spec.path: spec.files.stop for spec in submitted_specs(run)}
    assert stops["main"].read_text() == stops["v1"].read_text() == f"{BY}\n"
    assert not stops["v2"].exists() and not stops["v3"].exists()
    rows = {row.path: row for row in run_status(run)}
    assert (rows["v2"].state, rows["v2"].reason) == ("cancelled", BY)
    assert [event.record.event for event in Journal(run, "path_switching", "main").read()] == ["submitted"]


def test_at_once_means_without_a_save(slurm: FakeSlurm, run: Path) -> None:
    list(cancel_jobs(submitted_specs(run), now=True))
    assert slurm.live() == [] and not any("--signal" in word for call in slurm.calls("scancel") for word in call)
    assert not any(spec.files.stop.exists() for spec in submitted_specs(run))


def test_one_path_alone(slurm: FakeSlurm, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    cancel_run(run, "v2", now=False)
    assert capsys.readouterr().out == f"v2: job {slurm.jobs['v2']['id']} is cancelled\n"
    assert slurm.live() == ["main", "v1", "v3"]
    cancel_run(run, "v2", now=False)
    assert capsys.readouterr().out == "v2: no job waits or runs\n"


def test_a_path_that_is_not_there(slurm: FakeSlurm, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"PATH: given 'v7'; allowed: main, v1, v2, v3"):
        cancel_run(run, "v7", now=False)
    with pytest.raises(RunError, match="no jobs were submitted here"):
        cancel_run(tmp_path / "none", None, now=False)
    assert slurm.calls("scancel") == []


def agent(spec: JobSpec, seen: Path) -> None:
    """Hold the path's lock until asked to end, and write down how often that was."""
    signals: list[int] = []
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, lambda signum, _: signals.append(signum))
    with only_agent(spec.files):
        while not spec.files.stop.exists():
            time.sleep(0.01)
        deadline = time.monotonic() + 0.5
        while len(signals) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.write_text(str(len(signals)))


@pytest.mark.parametrize(("now", "signals"), [(False, "0"), (True, "2")])
def test_an_agent_on_this_machine_is_asked_by_the_stop_file_and_at_once_by_signals(
    tmp_path: Path, now: bool, signals: str
) -> None:
    jobs = open_run(write_plan(tmp_path / "plan.toml", HERE), tmp_path / "run")
    main, seen = jobs["main"], tmp_path / "seen"
    process = multiprocessing.get_context("fork").Process(target=agent, args=(main, seen))
    process.start()
    wait_for(lambda: holder(main.files), "the agent is at work")
    lines = list(cancel_jobs(list(jobs.values()), now=now))
    said = "ends at once" if now else "is asked to save and end"
    assert lines[-1] == f"main: process {process.pid} on {socket.gethostname()} {said}"
    assert lines[:-1] == [f"{name}: no job runs" for name in ("v3", "v2", "v1")]
    process.join(30)
    assert process.exitcode == 0 and seen.read_text() == signals
    assert main.files.stop.read_text() == f"{BY}\n"
    assert not jobs["v1"].files.stop.exists()  # it would be cancelled before it starts


def test_an_agent_on_another_machine_is_asked_by_the_stop_file_alone(tmp_path: Path) -> None:
    main = open_run(write_plan(tmp_path / "plan.toml", HERE), tmp_path / "run")["main"]
    with only_agent(main.files):
        (main.files.folder / "agent.lock").write_text("process 1 on another-machine")
        assert list(cancel_jobs([main], now=True)) == ["main: process 1 on another-machine is asked to save and end"]
        assert main.files.stop.exists()
