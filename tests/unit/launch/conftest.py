"""A SLURM that does as it is told, and jobs with agents, for all tests of this folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from agent_job import Job, make_job
from fake_slurm import FakeSlurm
from launch_jobs import HERE, ON_SLURM, submit, write_plan

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
def quick_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_module, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(agent_module, "REQUEUE_SECONDS", 0.0)
    monkeypatch.setattr("pathswitch.launch.local.GRACE_SECONDS", 0.5)


@pytest.fixture
def job(quick_agent: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The main path's job on this machine: 240 steps, with forks at 40, 140 and 240."""
    return make_job(tmp_path, monkeypatch, f"{HERE}restart_budget = 2")


@pytest.fixture
def slurm_job(quick_agent: None, slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """The same under SLURM, in its batch script."""
    plan, run = write_plan(tmp_path / "plan.toml", f"{ON_SLURM}restart_budget = 2"), tmp_path / "run"
    submit(plan, run)
    slurm.change("main", state="RUNNING", reason="None")
    slurm.forget_calls()
    monkeypatch.setenv("SLURM_JOB_ID", slurm.jobs["main"]["id"])
    return make_job(tmp_path, monkeypatch, f"{ON_SLURM}restart_budget = 2")
