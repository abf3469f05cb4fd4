"""`pathswitch doctor` on real hosts: what they share, who is left on them, and what happens when one is silent."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from two_hosts import TwoHosts

from pathswitch.launch.spec import run_id

pytestmark = pytest.mark.slow

DOCTOR = [str(Path(sys.executable).with_name("pathswitch")), "doctor", "--json"]

Finding = dict[str, str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "hosts.txt").write_text("hA slots=2\nhB slots=2\n")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def doctor(hosts: TwoHosts, run: Path, **variables: str) -> list[Finding]:
    """What it finds on hA about hosts, processes and the plan."""
    line = [*DOCTOR, "--hostfile", "hosts.txt", "--run", str(run)]
    process = hosts.popen("hA", line, cwd=run.parent, env=variables, stdout=subprocess.PIPE)
    findings: list[Finding] = json.loads(process.communicate(timeout=60)[0])["findings"]
    assert list(run.iterdir()) == []
    assert process.returncode == any(finding["status"] == "problem" for finding in findings)
    return [finding for finding in findings if finding["name"].startswith(("host ", "hosts", "processes"))]


def one(findings: list[Finding], name: str) -> Finding:
    [finding] = [finding for finding in findings if finding["name"] == name]
    return finding


def test_two_hosts_that_are_alike(hosts: TwoHosts, run: Path) -> None:
    alike, processes, *_ = doctor(hosts, run)
    assert alike["status"] == "ok" and alike["found"].startswith(
        f"2 of 2 answer, have the same versions and share {run}"
    )
    assert processes["status"] == "ok"


def test_a_run_folder_that_one_host_does_not_share(hosts: TwoHosts, run: Path) -> None:
    hosts.check("hB", "mount", "-t", "tmpfs", "tmpfs", str(run))
    try:
        finding = one(doctor(hosts, run), "host hB")
    finally:
        hosts.check("hB", "umount", str(run))
    assert finding["found"].startswith("does not share the run folder")


def test_processes_that_are_left_on_a_host_are_ended_by_what_it_says(hosts: TwoHosts, run: Path) -> None:
    marked = {"PATHSWITCH_JOB": f"{run_id(run)}:path_switching:main"}
    with hosts.popen("hB", ["sleep", "300"], env=marked) as left:
        finding = one(doctor(hosts, run), "processes")
        assert finding["found"] == "1 of path main on hB, and no agent looks after them"
        assert finding["todo"].startswith("ssh hB kill ")
        hosts.check("hA", "sh", "-c", finding["todo"])
        assert left.wait(30) == -signal.SIGTERM
    assert one(doctor(hosts, run), "processes")["status"] == "ok"


def test_a_network_that_lets_only_ssh_pass(hosts: TwoHosts, run: Path) -> None:
    rule = ["pref", "1", "ipproto", "tcp", "dport", "29500", "unreachable"]
    hosts.check("hB", "ip", "rule", "add", *rule)
    try:
        finding = one(doctor(hosts, run), "host hB")
    finally:
        hosts.check("hB", "ip", "rule", "del", *rule)
    assert finding["found"] == "cannot connect to hA (10.77.0.1:29500): Network is unreachable"
    assert finding["todo"].startswith("open TCP ports between the hosts")


def test_a_host_without_a_link_is_named_in_time(hosts: TwoHosts, run: Path) -> None:
    hosts.link("hB", "down")
    try:
        silent_in_time(hosts, run)
    finally:
        hosts.link("hB", "up")


def test_a_host_whose_sshd_hangs_is_named_in_time(hosts: TwoHosts, run: Path) -> None:
    """Its kernel accepts connections, and nobody ever speaks."""
    sshd = hosts._pid("hB")
    assert sshd is not None
    os.kill(sshd, signal.SIGSTOP)
    try:
        silent_in_time(hosts, run)
    finally:
        os.kill(sshd, signal.SIGCONT)


def silent_in_time(hosts: TwoHosts, run: Path) -> None:
    start = time.monotonic()
    findings = doctor(hosts, run)
    assert time.monotonic() - start < 30
    assert one(findings, "host hB")["status"] == "problem"
    assert one(findings, "hosts")["found"].startswith("1 of 2 answer")
