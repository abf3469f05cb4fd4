"""What the doctor says of hosts, with an ``ssh`` that runs the command on this machine; tests/hosts has real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_subject import by_name, program, subject

from pathswitch.config.launch import LaunchSection
from pathswitch.launch.doctor import Finding, facts, hosts
from pathswitch.launch.hosts import Host

# The host's name, behind ssh's options, says what it is like; what follows it is a line for the shell there.
SSH = """
while true; do case "$1" in -*) shift;; *) break;; esac; done
host=$1; shift; export PYTHONPATH={folder}/named${{PYTHONPATH:+:$PYTHONPATH}}
case $host in
  good*) exec sh -c "$*";;
  ahead) PYTHONPATH={folder}/ahead:$PYTHONPATH exec sh -c "$*";;
  slow*) sleep 1.5; exec sh -c "$*";;
  old) PYTHONPATH={folder}/old:$PYTHONPATH exec sh -c "$*";;
  changed) PYTHONPATH={folder}/changed:$PYTHONPATH exec sh -c "$*";;
  talkative) echo 'Welcome to this machine'; exec sh -c "$*";;
  bare) PATH=/none exec /bin/sh -c "$*";;
  empty) exec sh -c "$(echo "$*" | sed 's|{python}|/none/bin/python|')";;
  apart) exec unshare -m sh -c "mount -t tmpfs tmpfs {folder}/run; $*";;
  moved) cd /; exec unshare -m sh -c "mount -t tmpfs tmpfs {folder}/work; $*";;
  denied) echo 'root@denied: Permission denied (publickey).' >&2; exit 255;;
  changed_key) echo 'Host key verification failed.' >&2; exit 255;;
  refusing) echo 'ssh: connect to host refusing port 22: Connection refused' >&2; exit 255;;
  gone) echo 'ssh: connect to host gone port 22: No route to host' >&2; exit 255;;
  unknown) echo 'ssh: Could not resolve hostname unknown: Name or service not known' >&2; exit 255;;
  hanging) exec sleep 300;;
esac
"""
# This machine's own name may be one of 127.*: hosts have an address that others can reach.
NAMED = """
import socket
real_getaddrinfo = socket.getaddrinfo
def getaddrinfo(host, *arguments, **more):
    return real_getaddrinfo("192.0.2.7" if host == socket.gethostname() else host, *arguments, **more)
socket.getaddrinfo = getaddrinfo
"""
AHEAD = """
import time
real_time = time.time
time.time = lambda: real_time() + 5
"""


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, a working folder, and what hosts have in place of this machine's packages."""
    (tmp_path / "run").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    program(tmp_path / "bin", "ssh", SSH.format(folder=tmp_path, python=sys.executable))
    for name in ("pdsh", "mpirun"):
        program(tmp_path / "bin", name, "exit 0")
    for name, code in (("named", NAMED), ("ahead", NAMED + AHEAD)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sitecustomize.py").write_text(code)
    info = tmp_path / "old" / "deepspeed-0.18.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.18.1\n")
    package = tmp_path / "changed" / "pathswitch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    return tmp_path


def asked(world: Path, *names: str, seconds: float = 30, **variables: str) -> list[Finding]:
    findings = list(hosts.check(subject(world / "run", hosts=names, path=world / "bin", seconds=seconds, **variables)))
    assert list((world / "run").iterdir()) == [], "the hidden folder is removed again"
    by_name(findings)
    return findings


def of_host(findings: list[Finding], name: str) -> Finding:
    [finding] = [finding for finding in findings if finding.name == f"host {name}"]
    return finding


def test_hosts_that_are_as_they_should_be_are_one_finding(world: Path) -> None:
    launcher, variables, found = asked(world, "good1", "good2", "talkative")
    assert launcher.found == f"{world}/bin/ssh, {world}/bin/pdsh"
    assert (variables.name, variables.status) == (".deepspeed_env", "ok")
    assert found.status == "ok"
    assert found.found.startswith(f"3 of 3 answer, have the same versions and share {world}/run; clocks differ by 0.0")


@pytest.mark.parametrize(
    ("host", "todo"),
    [
        ("denied", "ssh-copy-id denied "),
        ("changed_key", "ssh changed_key true, and accept its key"),
        ("refusing", "start sshd on refusing"),
        ("gone", "take gone out of the hostfile until"),
        ("unknown", "correct the name in the hostfile"),
        ("empty", f"install the environment of {sys.executable} at the same place on empty"),
    ],
)
def test_a_host_that_does_not_answer(world: Path, host: str, todo: str) -> None:
    findings = asked(world, "good", host)
    finding = of_host(findings, host)
    assert finding.status == "problem" and finding.todo.startswith(todo), finding
    assert "1 of 2 answer" in findings[2].found, "the other host is asked all the same"


@pytest.mark.slow
def test_a_host_that_hangs_is_not_waited_for(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "HOST_SECONDS", 6.0)
    start = time.monotonic()
    findings = asked(world, "good1", "good2", "good3", "hanging", seconds=60)
    assert time.monotonic() - start < 30
    assert of_host(findings, "hanging").found == "no answer within 6 s"
    assert "3 of 4 answer" in findings[2].found


class Talk:
    """A host whose clock is 7 s ahead; each question takes its time to go there, and to come back."""

    def __init__(self, *ways: tuple[float, float]) -> None:
        self.now, self.ways = 1000.0, iter(ways)

    def time(self) -> float:
        return self.now

    def ask(self, what: str) -> dict[str, float]:
        there, back = next(self.ways)
        self.now += there
        told = self.now + 7
        self.now += back
        return {"time": told}


def test_the_shortest_round_trip_tells_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk((0.1, 3.0), (0.5, 0.5), (0.2, 0.2), (2.0, 0.1), (0.4, 0.6))
    monkeypatch.setattr(hosts.time, "time", talk.time)
    ahead, error = hosts.clock(talk)  # type: ignore[arg-type]
    assert (round(ahead, 6), round(error, 6)) == (7.0, 0.2)


def test_a_clock_that_is_ahead(world: Path) -> None:
    finding = of_host(asked(world, "good", "ahead"), "ahead")
    assert finding.status == "problem" and "its clock is +5.0 ± " in finding.found
    assert finding.todo.startswith("ssh ahead chronyc makestep")


def test_a_slow_connection_is_not_taken_for_a_wrong_clock(world: Path) -> None:
    assert asked(world, "slow")[2].status == "ok"


def test_other_versions(world: Path) -> None:
    finding = of_host(asked(world, "good", "old"), "old")
    assert finding.found.startswith("deepspeed 0.18.1 (here 0.")
    assert finding.todo.startswith(f"bring {Path(sys.executable).parents[1]} there to the same versions")


def test_the_same_version_with_other_files(world: Path) -> None:
    finding = of_host(asked(world, "changed"), "changed")
    assert finding.status == "problem" and "has other files there than here" in finding.found


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for mounts of its own")


@needs_root
def test_a_run_folder_that_is_not_shared(world: Path) -> None:
    finding = of_host(asked(world, "good", "apart"), "apart")
    assert finding.found.startswith(f"does not share the run folder: {world}/run is another folder there")


@needs_root
def test_a_working_folder_that_is_not_there(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = world / "work" / "plan"
    folder.mkdir()
    monkeypatch.chdir(folder)
    finding = of_host(asked(world, "moved"), "moved")
    assert finding.found == f"has no {folder}, where jobs are started"


def test_a_file_that_comes_back_changed_or_not_at_all(tmp_path: Path) -> None:
    """The exchange itself, seen from the host: every way in which it is not the same folder."""
    (tmp_path / "token").write_text("token")
    assert facts.exchange(str(tmp_path), "token", "reply") is None
    assert (tmp_path / "reply").read_text() == "reply"
    assert "No such file" in (facts.exchange(str(tmp_path), "other", "reply") or "")
    (tmp_path / "token").write_text("changed")
    assert "another content" in (facts.exchange(str(tmp_path), "token", "reply") or "")


def test_programs_that_are_missing(world: Path) -> None:
    (world / "bin" / "ssh").unlink()
    (world / "bin" / "pdsh").unlink()
    [launcher, _] = hosts.check(subject(world / "run", hosts=("good",), PATH=str(world / "bin")))
    assert (launcher.status, launcher.todo) == ("problem", "apt-get install openssh-client pdsh")


def test_open_mpi_is_needed_on_hosts_too(world: Path) -> None:
    launch = LaunchSection(kind="hostfile", launcher="openmpi")
    findings = list(hosts.check(subject(world / "run", hosts=("bare",), path=world / "bin", launch=launch)))
    assert findings[0].found.endswith("/mpirun")
    assert "does not find orted" in of_host(findings, "bare").found


@pytest.mark.parametrize(
    ("gpu", "variables", "status"),
    [(False, {}, "problem"), (True, {}, "note"), (False, {"GLOO_SOCKET_IFNAME": "lo"}, "")],
)
def test_a_host_whose_name_no_other_host_can_reach(gpu: bool, variables: dict[str, str], status: str) -> None:
    machine = {"hostname": "nameless", "addresses": ["127.0.1.1"], "interfaces": ["lo"], "gpus": int(gpu)}
    answers = hosts.Answers("nameless", machine=machine)
    findings = list(hosts.network_troubles(subject(hosts=("nameless", "good"), **variables), answers))
    assert "".join(finding.status for finding in findings) == status
    assert list(hosts.network_troubles(subject(hosts=("nameless",)), answers)) == [], "alone, it need not be reached"


def test_a_line_of_deepspeed_env_that_deepspeed_cannot_read(world: Path) -> None:
    (world / "work" / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\nexport WRONG\n")
    finding = by_name(asked(world, "good"))[".deepspeed_env"]
    assert finding.status == "problem" and "line 2" in finding.found and "export WRONG" in finding.found
    (world / "work" / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    assert "NCCL_DEBUG" in by_name(asked(world, "good"))[".deepspeed_env"].found


def test_an_interface_that_a_host_does_not_have(world: Path) -> None:
    finding = of_host(asked(world, "good", GLOO_SOCKET_IFNAME="none0"), "good")
    assert finding.found.startswith("GLOO_SOCKET_IFNAME=none0 names none of lo")


def test_a_first_host_that_the_others_cannot_reach(world: Path) -> None:
    findings = asked(world, "good1", "good2", MASTER_ADDR="127.1.1.1")
    assert findings[2].status == "ok", "the first host listens on every address"
    findings = asked(world, "good1", "good2", MASTER_ADDR="192.0.2.1")
    assert of_host(findings, "good2").found.startswith("cannot connect to good1 (192.0.2.1:")


def test_a_run_folder_that_cannot_be_written(world: Path) -> None:
    findings = list(hosts.check(subject(Path("/proc/none"), hosts=("good",), path=world / "bin")))
    assert findings[-1].status == "problem" and "not asked: /proc/none cannot be written" in findings[-1].found


def test_more_slots_than_gpus(world: Path) -> None:
    """No GPU was at hand: what the hosts say is made up."""
    here = facts.Server().machine(list(hosts.PACKAGES), [], str(world)) | {"addresses": ["192.0.2.7"]}
    given = [("two", 2), ("one", 1), ("none", 0)]
    answers = [hosts.Answers(name, machine=here | {"gpus": gpus}) for name, gpus in given]
    examined = replace(subject(), hosts=tuple(Host(name, 2) for name, _ in given))
    findings = by_name(list(hosts.judged(examined, answers, hosts.reference())))
    assert findings["hosts"].found.startswith("1 of 3")
    assert findings["host one"].found == "has 1 GPUs, the hostfile gives it slots=2"
    assert findings["host none"].todo.startswith("none slots=0 in the hostfile")
    without = [hosts.Answers(name, machine=here | {"gpus": 0}) for name, _ in given]
    assert by_name(list(hosts.judged(examined, without, hosts.reference())))["hosts"].found.startswith("3 of 3"), (
        "ranks on CPUs"
    )


def test_an_interrupt_ends_everything(world: Path) -> None:
    (world / "hosts.txt").write_text("hanging slots=1\n")
    line = [str(Path(sys.executable).with_name("pathswitch")), "doctor", "--hostfile", str(world / "hosts.txt")]
    environ = os.environ | {"PATH": f"{world}/bin:{os.environ['PATH']}"}
    with subprocess.Popen(line, env=environ, start_new_session=True, stdout=subprocess.DEVNULL) as doctor:
        wait_until(lambda: of_world(world))
        os.killpg(doctor.pid, signal.SIGINT)
        assert doctor.wait(60) != 0
    wait_until(lambda: not of_world(world))


def test_nothing_of_it_stays_on_a_host(world: Path) -> None:
    asked(world, "good1", "good2")
    wait_until(lambda: not of_world(world))


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def of_world(world: Path) -> list[str]:
    """Return the processes that a host of this world has."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if f"{world}/named".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found


def test_many_hosts_are_asked_at_once(world: Path) -> None:
    start = time.monotonic()
    findings = asked(world, *(f"slow{number}" for number in range(12)))
    assert "12 of 12 answer" in findings[2].found
    assert time.monotonic() - start < 12 * 1.5
