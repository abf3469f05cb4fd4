"""A SLURM that does as it is told, and jobs with agents, for all tests of this folder."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from agent_job import Job
from fake_slurm import FakeSlurm
from launch_jobs import HERE, ON_SLURM, open_run, submit, write_plan

from pathswitch.launch import agent as agent_module


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    fake = FakeSlurm(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{fake.bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return fake


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that is away is asked again at once."""
    quick = SimpleNamespace(sleep=lambda seconds: time.sleep(0.02), monotonic=time.monotonic)
    monkeypatch.setattr("pathswitch.launch.slurm.time", quick)
    monkeypatch.setattr("pathswitch.launch.submit.time", quick)


@pytest.fixture
def make_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Job]]:
    """Make a path's job of a plan, with an agent in no hurry to wait."""
    monkeypatch.setattr(agent_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(agent_module, "REQUEUE_SECONDS", 0.0)
    monkeypatch.setattr("pathswitch.launch.local.GRACE_SECONDS", 0.5)
    made: list[Job] = []

    def make(launch: str = HERE, path: str = "main", plan: Path | None = None) -> Job:
        job = Job(open_run(plan or write_plan(tmp_path / "plan.toml", launch), tmp_path / "run")[path], tmp_path)
        monkeypatch.setattr(agent_module, "launcher_of", lambda spec, slurm_job: job.ranks)
        monkeypatch.setattr(sys, "argv", ["agent", str(job.files.job)])
        made.append(job)
        return job

    yield make
    for job in made:
        job.close()


@pytest.fixture
def job(make_job: Callable[..., Job]) -> Job:
    """The main path's job on this machine: 240 steps, with forks at 40, 140 and 240."""
    return make_job(f"{HERE}restart_budget = 2")


@pytest.fixture
def slurm_job(slurm: FakeSlurm, make_job: Callable[..., Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The same under SLURM, in its batch script."""
    launch = f"{ON_SLURM}restart_budget = 2"
    submit(write_plan(tmp_path / "plan.toml", launch), tmp_path / "run")
    slurm.change("main", state="RUNNING", reason="None")
    slurm.forget_calls()
    monkeypatch.setenv("SLURM_JOB_ID", slurm.jobs["main"]["id"])
    return make_job(launch)
