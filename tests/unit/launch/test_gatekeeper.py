"""The gatekeeper of a path lets its branches begin as their forks come, and no branch waits in vain."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from launch_jobs import HERE, commit, open_run, submit, wait_for, write_plan

from pathswitch.config import build_plan
from pathswitch.launch.gate import OPEN, Gate, durable_step, open_gate
from pathswitch.launch.gatekeeper import GateKeeper
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import JobSpec
from pathswitch.launch.status import run_status
from pathswitch.run_folder import RunFolder

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
from checkpoint_files import SHARDS, flip_bit


def ask(job: JobSpec) -> Gate:
    run = RunFolder(Path(job.run))
    return open_gate(run, build_plan(run.plan_file()).path(job.path), None, "test")


def test_a_refusal_is_in_the_status_with_its_reason(slurm: FakeSlurm, tmp_path: Path) -> None:
    plan, run = write_plan(tmp_path / "plan.toml"), tmp_path / "run"
    submit(plan, run)
    jobs = open_run(plan, run)
    flip_bit_of(commit(jobs["main"], 40))
    keeper(jobs["main"]).finish()
    rows = {row.path: row for row in run_status(run)}
    assert rows["v1"].state == "refused" and f"{SHARDS[1]}: expected blake3" in str(rows["v1"].reason)
    assert (rows["v2"].state, rows["v2"].reason) == ("held", "waits for main@140")
    assert slurm.jobs["v1"]["reason"] == "JobHeldUser"


def flip_bit_of(folder: Path) -> None:
    flip_bit(folder / SHARDS[1])


def keeper(job: JobSpec) -> GateKeeper:
    return GateKeeper(job, "agent.0")


@pytest.fixture
def submitted(slurm: FakeSlurm, tmp_path: Path) -> dict[str, JobSpec]:
    plan, run = write_plan(tmp_path / "plan.toml"), tmp_path / "run"
    submit(plan, run)
    slurm.change("main", state="RUNNING", reason="None")
    slurm.forget_calls()
    return open_run(plan, run)


def held(slurm: FakeSlurm) -> list[str]:
    return [name for name, job in slurm.jobs.items() if job["reason"] == "JobHeldUser"]


def test_the_keeper_releases_branches_as_their_forks_come(slurm: FakeSlurm, submitted: dict[str, JobSpec]) -> None:
    gates = keeper(submitted["main"])
    gates.poll()
    commit(submitted["main"], 40)
    wait_for(lambda: gates.poll() or held(slurm) == ["v2", "v3"], "v1 is released")
    commit(submitted["main"], 140)
    commit(submitted["main"], 240)
    wait_for(lambda: gates.poll() or held(slurm) == [], "v2 and v3 are released")
    gates.finish()
    released = [call[2] for call in slurm.calls("scontrol") if call[1] == "release"]
    assert sorted(released) == sorted(slurm.jobs[name]["id"] for name in ("v1", "v2", "v3"))


def test_the_keeper_looks_when_something_has_changed_and_not_before(
    submitted: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    children = GateKeeper.children
    monkeypatch.setattr(GateKeeper, "children", lambda gates: looks.append("") or children(gates))
    gates = keeper(submitted["main"])
    commit(submitted["main"], 10)
    for count, step in enumerate((20, 30, 40), 1):
        wait_for(lambda: gates.poll() or len(looks) == count, "a look")  # noqa: B023
        for _ in range(20):
            gates.poll()
            time.sleep(0.01)
        assert len(looks) == count
        commit(submitted["main"], step)


def test_the_keeper_sees_a_version_that_is_added(
    slurm: FakeSlurm, submitted: dict[str, JobSpec], tmp_path: Path
) -> None:
    gates = keeper(submitted["main"])
    commit(submitted["main"], 240)
    gates.finish()
    assert [path.name for path in gates.children()] == ["v1", "v2", "v3"]
    open_run(write_plan(tmp_path / "plan.toml", versions=4), tmp_path / "run")
    commit(submitted["main"], 340)
    gates.finish()
    assert durable_step(open_run(tmp_path / "plan.toml", tmp_path / "run")["v4"].files, "v4") == 340


def test_the_keeper_tries_a_refused_checkpoint_once_and_the_next_one_again(
    slurm: FakeSlurm, submitted: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def counted(run: RunFolder, path: Any, *arguments: Any) -> Gate:
        tried.append(path.name)
        return open_gate(run, path, *arguments)

    monkeypatch.setattr("pathswitch.launch.gatekeeper.open_gate", counted)
    flip_bit_of(commit(submitted["main"], 40))
    gates = keeper(submitted["main"])
    for step in (41, 42, 43):
        commit(submitted["main"], step)
        gates.finish()
    assert tried.count("v1") == 1 and tried.count("v2") == 3 and held(slurm) == ["v1", "v2", "v3"]
    commit(submitted["main"], 40, text="whole")
    gates.finish()
    assert tried.count("v1") == 2 and held(slurm) == ["v2", "v3"]


def test_the_keeper_looks_again_when_the_controller_was_away(
    slurm: FakeSlurm, submitted: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pathswitch.launch.slurm.RETRY_SECONDS", 0.0)
    (slurm.folder / "down").touch()
    gates = keeper(submitted["main"])
    commit(submitted["main"], 40)
    wait_for(lambda: gates.poll() or "branches are not started: squeue" in capsys.readouterr().out, "a look")
    assert not gates.finish()
    (slurm.folder / "down").unlink()
    wait_for(lambda: gates.poll() or held(slurm) == ["v2", "v3"], "v1 is released")


def test_the_keeper_waits_no_longer_than_it_has_patience(
    submitted: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*_: Any) -> Gate:
        time.sleep(5)
        return Gate("waiting")

    monkeypatch.setattr("pathswitch.launch.gatekeeper.open_gate", slowly)
    gates, started = keeper(submitted["main"]), time.monotonic()
    assert not gates.finish(0.2) and not gates.finish(0.2)
    assert time.monotonic() - started < 4


def test_branches_that_wait_in_vain_leave_the_queue(slurm: FakeSlurm, submitted: dict[str, JobSpec]) -> None:
    commit(submitted["main"], 40)
    assert ask(submitted["v1"]) == OPEN  # and somebody holds it all the same
    gates = keeper(submitted["main"])
    gates.cancel_waiting("main gave up: disk full", "agent.0")
    assert {name: job["state"] for name, job in slurm.jobs.items()} == {
        "main": "RUNNING",
        "v1": "PENDING",  # it has its fork
        "v2": "CANCELLED",
        "v3": "CANCELLED",
    }
    last = Journal(Path(submitted["v3"].run), "path_switching", "v3").read()[-1].record
    assert (last.event, last.reason) == ("cancelled", "main gave up: disk full")
    rows = {row.path: row for row in run_status(Path(submitted["main"].run))}
    assert (rows["v2"].state, rows["v2"].reason) == ("cancelled", "main gave up: disk full")


def test_elsewhere_than_on_slurm_the_keeper_asks_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    jobs = open_run(write_plan(tmp_path / "plan.toml", HERE), tmp_path / "run")
    commit(jobs["main"], 40)
    gates = keeper(jobs["main"])
    gates.finish()
    gates.cancel_waiting("why", "agent.0")
    assert durable_step(jobs["v1"].files, "v1") == 40
