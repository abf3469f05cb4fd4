"""Submissions when SLURM is away, commands are killed, and others are at work: every path's job is there once."""

from __future__ import annotations

import multiprocessing
import signal
import threading
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from launch_jobs import commit, open_run, specs_of, submit, wait_for, write_plan

from pathswitch.errors import PathSwitchError, RunError
from pathswitch.launch import slurm as slurm_module
from pathswitch.launch.agent_lock import only_agent
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import load_spec

pytestmark = pytest.mark.usefixtures("no_pause")
ALL = ["main", "v1", "v2", "v3"]
PATIENCE_SECONDS = 120


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "plans" / "plan.toml")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def submit_apart(plan: Path, run: Path) -> multiprocessing.process.BaseProcess:
    """Submit in a process of its own, which can be killed."""
    process = multiprocessing.get_context("fork").Process(target=submit, args=(plan, run))
    process.start()
    return process


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill before", "kill after"])
def test_a_submission_killed_at_any_command_is_completed_by_the_next(
    slurm: FakeSlurm, plan: Path, tmp_path: Path, what: str
) -> None:
    submit(plan, tmp_path / "whole")
    points = len(slurm.calls())
    assert points > 5
    for point in range(points):
        run, before = tmp_path / f"run{point}", len(slurm.all_jobs())
        slurm.fault(point, what)
        first = submit_apart(plan, run)
        first.join(PATIENCE_SECONDS)
        assert first.exitcode == -signal.SIGKILL, f"{what} {point}"
        submit(plan, run)
        new = slurm.all_jobs()[before:]
        assert [job["comment"].rpartition(":")[2] for job in new] == ALL, f"{what} {point}"
        assert all(load_spec(spec.files.job) == spec for spec in specs_of(plan, run))


@pytest.mark.parametrize("what", ["away", "no answer"])
def test_a_controller_that_is_away_for_a_moment_doubles_nothing(
    slurm: FakeSlurm, plan: Path, tmp_path: Path, what: str
) -> None:
    submit(plan, tmp_path / "whole")
    for point in range(len(slurm.calls())):
        before = len(slurm.all_jobs())
        slurm.fault(point, what)
        assert submit(plan, tmp_path / f"run{point}") == 0
        names = [job["comment"].rpartition(":")[2] for job in slurm.all_jobs()[before:]]
        assert names == ALL, f"{what} at call {point}"


def test_a_job_whose_name_begins_alike_is_not_taken_for_another(slurm: FakeSlurm, run: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.toml", versions=10)
    submit(plan, run)
    slurm.change("v1", state="CANCELLED")
    slurm.forget_calls()
    slurm.fault(2, "away")  # sbatch, behind two looks at the queue
    submit(plan, run)
    assert slurm.live().count("v1") == slurm.live().count("v10") == 1
    submitted = [event.record.attempt for event in Journal(run, "path_switching", "v1").read()]
    assert slurm.jobs["v1"]["id"] in submitted and slurm.jobs["v10"]["id"] not in submitted


def test_a_controller_that_stays_away_is_an_error_that_says_so(
    slurm: FakeSlurm, plan: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm_module, "RETRY_SECONDS", 0.2)
    (slurm.folder / "down").touch()
    with pytest.raises(RunError, match=r"^squeue .*Unable to contact slurm controller"):
        submit(plan, run)
    assert not run.exists()
    (slurm.folder / "down").unlink()
    submit(plan, run)
    assert slurm.live() == ALL


def test_a_job_that_slurm_refuses_leaves_those_before_it(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    slurm.fault(3, "refuse")
    with pytest.raises(RunError, match=r"sbatch .*v1/job.sbatch failed \(exit code 1\).*Invalid account"):
        submit(plan, run)
    assert slurm.live() == ["main"]
    submit(plan, run)
    assert slurm.live() == ALL and len(slurm.all_jobs()) == 4


def test_without_slurm_the_error_says_what_is_missing(
    plan: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match=r"squeue: not found: .*SLURM's commands on PATH"):
        submit(plan, run)
    assert not run.exists()


@pytest.mark.parametrize("branch", ["v1", "v3"])
def test_a_fork_committed_between_the_look_and_the_hold_releases_the_job(
    slurm: FakeSlurm, plan: Path, run: Path, tmp_path: Path, branch: str
) -> None:
    main = open_run(plan, run)["main"]
    go, call = tmp_path / "go", 2 + ALL.index(branch)
    slurm.fault(call, "wait for", str(go))

    def commit_meanwhile() -> None:
        wait_for(lambda: len(slurm.calls()) > call, "sbatch of the branch")
        commit(main, specs[branch].start_step)
        go.touch()

    specs = {spec.path: spec for spec in specs_of(plan, run)}
    thread = threading.Thread(target=commit_meanwhile)
    thread.start()
    submit(plan, run)
    thread.join(PATIENCE_SECONDS)
    assert "--hold" in slurm.jobs[branch]["options"]
    assert slurm.jobs[branch]["reason"] == "Priority"
    held = [name for name, job in slurm.jobs.items() if job["reason"] == "JobHeldUser"]
    assert held == [name for name in ALL[1:] if name != branch]


def test_two_submissions_at_once_are_one(slurm: FakeSlurm, plan: Path, run: Path, tmp_path: Path) -> None:
    go = tmp_path / "go"
    slurm.fault(2, "wait for", str(go))
    first = submit_apart(plan, run)
    wait_for(lambda: len(slurm.calls()) > 2, "the first submission is at work")
    with pytest.raises(RunError, match="another `pathswitch submit` is at work"):
        submit(plan, run)
    go.touch()
    first.join(PATIENCE_SECONDS)
    assert first.exitcode == 0 and slurm.live() == ALL and len(slurm.all_jobs()) == 4


@pytest.mark.parametrize(("becomes", "jobs"), [("PENDING", 4), ("FAILED", 5)])
def test_a_job_that_is_ending_is_waited_for(
    slurm: FakeSlurm, plan: Path, run: Path, monkeypatch: pytest.MonkeyPatch, becomes: str, jobs: int
) -> None:
    """It may be queued again, or it may not: a job of this state alone does not tell."""
    submit(plan, run)
    slurm.change("main", state="COMPLETING", reason="None")
    looks = len(slurm.calls("squeue"))

    def becoming() -> None:
        wait_for(lambda: len(slurm.calls("squeue")) > looks + 2, "a second look")
        slurm.change("main", state=becomes)

    thread = threading.Thread(target=becoming)
    thread.start()
    submit(plan, run)
    thread.join(PATIENCE_SECONDS)
    assert slurm.live() == ALL and len(slurm.all_jobs()) == jobs


def test_a_folder_that_cannot_be_written_is_an_error_of_ours(slurm: FakeSlurm, plan: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PathSwitchError, match="cannot be written"):
        submit(plan, tmp_path / "file" / "run")


def test_a_file_system_without_locks_is_an_error_of_ours(
    slurm: FakeSlurm, plan: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unable(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    job = open_run(plan, run)["main"]
    monkeypatch.setattr("fcntl.flock", unable)
    with pytest.raises(RunError, match=r"files cannot be locked there .*pathswitch doctor"):
        submit(plan, run)
    with pytest.raises(RunError, match="files cannot be locked there"), only_agent(job.files):
        pass
