"""Jobs that share hosts: ended one by one, never the other; a lost host is named, and no other is."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hostfile_job import HERE, Jobs, wait
from two_hosts import TwoHosts

pytestmark = pytest.mark.slow


def processes_of(jobs: Jobs, path: str) -> dict[int, str]:
    """Return the commands of a job's processes on both hosts by their PIDs outside."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"PATHSWITCH_JOB={jobs.id_of(path)}\0".encode() in environment:
            found[int(entry.name)] = command.replace(b"\0", b" ").decode()
    return found


@pytest.fixture
def beating(hosts: TwoHosts, tmp_path: Path) -> Iterator[Jobs]:
    yield Jobs(hosts, tmp_path, "pdsh", [str(HERE / "beat.py")], timeout=12, env={"BEAT_FOLDER": str(tmp_path)})
    hosts.link("hB", "up")
    (tmp_path / "over").touch()


def test_the_end_of_one_job_is_not_the_end_of_another(beating: Jobs) -> None:
    jobs = beating
    main, branch = jobs.start("main"), jobs.start("v1")
    wait(lambda: jobs.beats("main") and jobs.beats("v1"), "both jobs to run")
    # DeepSpeed's own answer to SIGTERM is `pkill` of every DeepSpeed job on all hosts.
    (runner,) = (pid for pid, command in processes_of(jobs, "main").items() if "deepspeed_runner" in command)
    os.kill(runner, signal.SIGTERM)
    ended = jobs.result("main", main)
    assert ended["failure"] is None
    assert [line.split(" outlived")[0] for line in ended["ended"]] == ["hA: 2 processes", "hB: 2 processes"]
    assert all("deepspeed.launcher.launch" in line and "beat.py" in line for line in ended["ended"])
    assert processes_of(jobs, "main") == {}
    assert jobs.beats("v1") and branch.poll() is None

    # The branch's agent and launcher are killed, and nobody tells its ranks.
    jobs.kill_agent(branch)
    for pid, command in processes_of(jobs, "v1").items():
        if command.startswith(("pdsh ", "ssh ")) or "deepspeed_runner" in command:
            os.kill(pid, signal.SIGKILL)
    orphans = jobs.orphans(jobs.id_of("v1").split(":")[0])
    assert {host: len(pids) for host, pids in orphans.items()} == {"hA": 2, "hB": 2}
    assert jobs.orphans(jobs.id_of("main")) == {} == jobs.orphans("another")
    assert jobs.beats("v1")
    # Two of one job would write one checkpoint: the next start ends them first.
    said = jobs.prepare("v1").splitlines()
    for host, line in zip(("hA", "hB"), said, strict=True):
        assert line.startswith(f"pathswitch: v1: before the start: {host}: 2 processes outlived the launcher, ended: ")
        assert all(f"pid {pid} (" in line for pid in orphans[host])
    assert jobs.orphans(jobs.id_of("v1")) == {} == processes_of(jobs, "v1")
    assert jobs.prepare("v1") == ""


def test_a_host_that_was_silent_for_a_while_is_not_lost_and_one_that_was_restarted_is(
    beating: Jobs, hosts: TwoHosts
) -> None:
    jobs = beating
    job = jobs.start("main")
    wait(lambda: jobs.beats("main"), "the job to run")
    hosts.link("hB", "down")
    time.sleep(6)
    hosts.link("hB", "up")
    wait(lambda: hosts.answers("hB", to="hA"), "hB to answer")
    time.sleep(6)  # beyond what would be too long in all
    assert job.poll() is None and jobs.beats("main")

    hosts.kill("hB")
    hosts.restart("hB")
    restarted_at = time.time()
    result = jobs.result("main", job)
    assert result["failure"] == "host hB was restarted: the job's processes there are gone"
    assert result["failed_at"] - restarted_at < 40
    assert [line.split(" outlived")[0] for line in result["ended"]] == ["hA: 2 processes"]
    assert processes_of(jobs, "main") == {}
