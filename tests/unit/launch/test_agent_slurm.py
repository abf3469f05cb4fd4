"""The agent in a SLURM job: when its time is up, when it fails, and what becomes of the branches that wait for it."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from agent_job import WAIT_FOR_STOP, Job, requeued
from fake_slurm import FakeSlurm
from launch_jobs import wait_for

from pathswitch.launch import agent as agent_module
from pathswitch.launch.agent import ASKED, COMPLETED, GAVE_UP
from pathswitch.launch.journal import Journal

pytestmark = pytest.mark.slow


def test_when_the_time_is_nearly_up_it_is_requeued(slurm: FakeSlurm, slurm_job: Job) -> None:
    slurm_job.ready(40, 50)
    slurm_job.start(f"save 40; {WAIT_FOR_STOP}; save 50")
    wait_for(lambda: slurm_job.ranks.notes(), "the ranks run")
    slurm_job.signal(signal.SIGUSR2)
    assert slurm_job.end() == COMPLETED and requeued(slurm)
    assert slurm_job.events() == [("started", 0), ("stopped", 50)]
    assert slurm_job.reasons() == ["SIGUSR2: the time is nearly up"]
    assert slurm.jobs["v1"]["reason"] == "Priority"  # its fork was there


def test_a_preempted_job_is_left_to_slurm(slurm: FakeSlurm, slurm_job: Job) -> None:
    slurm_job.ready(50)
    slurm_job.start(f"{WAIT_FOR_STOP}; save 50")
    wait_for(lambda: slurm_job.ranks.notes(), "the ranks run")
    slurm_job.signal(signal.SIGTERM)
    assert slurm_job.end() == ASKED and not requeued(slurm)


def test_a_save_that_never_fits_into_the_time_uses_the_budget_up(
    slurm: FakeSlurm, slurm_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "SAVE_SHARE", 1 / 3000)
    for start in range(3):
        slurm_job.start("sleep 1000", SLURM_RESTART_COUNT=str(start))
        wait_for(lambda: len(slurm_job.ranks.notes()) == 3 * start + 1, "the ranks run")  # noqa: B023
        slurm_job.signal(signal.SIGUSR2)
        assert slurm_job.end() == COMPLETED and requeued(slurm)
    assert "SIGUSR2: the time is nearly up; the ranks did not save and end in time" in slurm_job.reasons()
    assert slurm_job.run("sleep 1000", SLURM_RESTART_COUNT="3") == GAVE_UP


def test_a_save_that_fails_when_the_time_is_up_says_why_and_uses_the_budget_up(
    slurm: FakeSlurm, slurm_job: Job
) -> None:
    slurm_job.start(f"{WAIT_FOR_STOP}; echo 'OSError: [Errno 28] No space left'; exit 1")
    wait_for(lambda: slurm_job.ranks.notes(), "the ranks run")
    slurm_job.signal(signal.SIGUSR2)
    assert slurm_job.end() == COMPLETED and requeued(slurm)
    assert slurm_job.events()[-1] == ("failed", 0) and "No space left" in slurm_job.reasons()[-1]


def test_a_limit_that_is_too_short_for_a_checkpoint_uses_the_budget_up(slurm: FakeSlurm, slurm_job: Job) -> None:
    slurm_job.start(WAIT_FOR_STOP)
    wait_for(lambda: slurm_job.ranks.notes(), "the ranks run")
    slurm_job.signal(signal.SIGUSR2)
    assert slurm_job.end() == COMPLETED and requeued(slurm)
    assert slurm_job.events() == [("started", 0), ("failed", 0)]
    assert slurm_job.reasons() == ["SIGUSR2: the time is nearly up; no new checkpoint"]


def test_a_job_does_not_end_before_slurm_has_heard_of_its_last_branch(
    slurm: FakeSlurm, slurm_job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else would release it."""
    monkeypatch.setattr("pathswitch.launch.slurm.RETRY_SECONDS", 0.0)
    slurm_job.ready(240)
    (slurm.folder / "down").touch()
    slurm_job.start("save 240")
    wait_for(lambda: slurm_job.log().count("branches are not started") > 2, "SLURM is asked again and again")
    assert slurm.jobs["v3"]["reason"] == "JobHeldUser"
    (slurm.folder / "down").unlink()
    assert slurm_job.end() == COMPLETED
    assert (slurm.jobs["v3"]["reason"], slurm.jobs["v3"]["dependency"]) == ("Priority", "")


def test_a_failed_job_is_requeued_within_its_budget_and_its_branches_leave_the_queue_with_it(
    slurm: FakeSlurm, slurm_job: Job
) -> None:
    for start in range(3):
        assert slurm_job.run("exit 1", SLURM_RESTART_COUNT=str(start)) == COMPLETED
        assert requeued(slurm)
    slurm.forget_calls()
    assert slurm_job.run("exit 1", SLURM_RESTART_COUNT="3") == GAVE_UP
    assert not requeued(slurm) and slurm.live() == ["main"]
    attempts = [event.record.attempt for event in Journal(Path(slurm_job.spec.run), "path_switching", "main").read()]
    assert attempts[-1] == f"{slurm.jobs['main']['id']}.3"


def test_lost_nodes_use_the_budget_up_and_preemptions_do_not(slurm: FakeSlurm, slurm_job: Job) -> None:
    journal = Journal(Path(slurm_job.spec.run), "path_switching", "main")
    for start in range(9):
        journal.write("started", f"1.{start}", 0)
        journal.write("stopped", f"1.{start}", 0, "SIGTERM received")
    assert journal.fruitless_starts(0) == 0
    for start in range(9, 12):
        journal.write("started", f"1.{start}", 0)  # and nobody wrote down how it ended
    assert journal.fruitless_starts(0) == 3 and journal.fruitless_starts(40) == 0
    assert slurm_job.run("exit 0", SLURM_RESTART_COUNT="12") == GAVE_UP
    assert journal.fruitless_starts(0) == 0


def test_where_a_job_may_not_be_requeued_another_one_follows(slurm: FakeSlurm, slurm_job: Job) -> None:
    (slurm.bin / "scontrol").write_text("#!/bin/sh\necho 'Requested operation is not permitted' >&2; exit 1\n")
    assert slurm_job.run("exit 1", SLURM_JOB_ACCOUNT="mine", SLURM_JOB_PARTITION="gpu") == COMPLETED
    job = slurm.all_jobs()[-1]
    assert {"--account=mine", "--partition=gpu"} <= set(job["options"])
    assert job["comment"].endswith(":main") and job["dependency"] == "afterany:1"
    assert not any(name.startswith("SLURM_") for name in slurm.environments()[-1])
