"""Hostfiles, the words that reach other hosts, and a job's own processes; tests/hosts has the hosts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pathswitch.config import load_plan_file
from pathswitch.errors import ConfigError
from pathswitch.launch import job_processes
from pathswitch.launch.deepspeed_env import env_file, user_lines
from pathswitch.launch.host_watch import HostWatch
from pathswitch.launch.hostfile import HostfileLauncher, end_jobs, orphans
from pathswitch.launch.hosts import Host, Ssh, first_hosts, read_hostfile
from pathswitch.launch.spec import JobSpec, job_specs

PLAN = """
[schedule]
max_lr = 1e-3
shape = "linear"
alpha = 0.5
[[versions]]
name = "v1"
steps = 10
[launch]
kind = "hostfile"
hostfile = "hosts"
command = ["train.py"]
"""


def hostfile(folder: Path, text: str) -> Path:
    file = folder / "hosts"
    file.write_text(text)
    return file


def main_job(folder: Path, launch: str = "", env: str = "") -> JobSpec:
    plan = folder / "plan.toml"
    plan.write_text(f"{PLAN}{launch}\n[launch.env]\n{env}\n")
    return job_specs(load_plan_file(plan), folder, folder / "run")[0]


def test_a_hostfile(tmp_path: Path) -> None:
    file = hostfile(tmp_path, "# rack 1\n\nhA slots=4   # the first\n  user@node-2.site\tslots=8\n10.0.0.3 slots=1\r\n")
    hosts = read_hostfile(file)
    assert hosts == (Host("hA", 4), Host("user@node-2.site", 8), Host("10.0.0.3", 1))
    assert first_hosts(file, 2, 3) == (Host("hA", 3), Host("user@node-2.site", 3))


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("hB", "'name slots=N'"),
        ("hB slots=0", "'name slots=N'"),
        ("hB slots=-1", "'name slots=N'"),
        ("hB slots=2 max_slots=4", "'name slots=N'"),
        ("hB slots = 2", "'name slots=N'"),
        ("-oProxyCommand=id slots=2", "'name slots=N'"),
        ("hB,hC slots=2", "'name slots=N'"),
        ("h[1-4] slots=2", "'name slots=N'"),
        ("ssh:hB slots=2", "'name slots=N'"),
        ("hB:2", "'name slots=N'"),
        ("hA slots=2", "each host once"),
    ],
)
def test_a_line_that_no_launcher_understands_is_named(tmp_path: Path, line: str, allowed: str) -> None:
    file = hostfile(tmp_path, f"# hosts\nhA slots=2\n{line}\n")
    with pytest.raises(ConfigError) as error:
        read_hostfile(file)
    assert str(error.value).startswith(f"{file}, line 3: given {line!r}; allowed: {allowed}")


@pytest.mark.parametrize("text", ["", "# none\n\n"])
def test_no_host(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="given 'no host'; allowed: at least one line"):
        read_hostfile(hostfile(tmp_path, text))
    with pytest.raises(ConfigError, match="a readable text file"):
        read_hostfile(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("nodes = 3", r"\[launch\] nodes: given 3; allowed: up to 2, the hosts of .*hosts"),
        ("nodes = 2\ngpus_per_node = 3", r"\[launch\] gpus_per_node: given 3; allowed: up to 2, the slots of hB in"),
        ("launcher_args = ['-R \"ssh']", r"\[launch\] launcher_args: .* words as a shell splits them"),
        ("python = '/with space/python'", r"\[launch\] python: given '/with space/python'; allowed: a path of letters"),
    ],
)
def test_what_the_hosts_cannot_give_is_refused_before_anything_starts(
    tmp_path: Path, launch: str, message: str
) -> None:
    hostfile(tmp_path, "hA slots=4\nhB slots=2\n")
    HostfileLauncher(main_job(tmp_path, "nodes = 2\ngpus_per_node = 2"))
    with pytest.raises(ConfigError, match=message):
        HostfileLauncher(main_job(tmp_path, launch))


def test_a_folder_that_pdsh_would_take_apart_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "my plans"
    folder.mkdir()
    hostfile(folder, "hA slots=1\n")
    with pytest.raises(ConfigError, match=r"working folder: given '.*my plans'"):
        HostfileLauncher(main_job(folder))
    HostfileLauncher(main_job(folder, "launcher = 'openmpi'"))


def test_the_variables_of_a_job(tmp_path: Path) -> None:
    hostfile(tmp_path, "hA slots=1\n")
    environ = {"OMP_NUM_THREADS": "4", "DS_ACCELERATOR": "cpu", "HOME": "/here", "SECRET": "x"}
    environment = HostfileLauncher(main_job(tmp_path, env="OMP_NUM_THREADS = '2'"), environ).environment()
    own = {name: value for name, value in environment.items() if not name.startswith("PATHSWITCH_")}
    assert own.keys() == {"OMP_NUM_THREADS", "DS_ACCELERATOR", "DS_ENV_FILE", "PDSH_SSH_ARGS_APPEND"}
    assert (own["OMP_NUM_THREADS"], own["DS_ACCELERATOR"]) == ("2", "cpu")
    assert environment["PATHSWITCH_JOB"].endswith(":path_switching:main")


def test_the_users_own_options_of_ssh_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostfile(tmp_path, "hA slots=1\n")
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222 -oServerAliveInterval=7")
    launcher = HostfileLauncher(main_job(tmp_path, "host_timeout_seconds = 40"))
    # ssh takes the first option of a kind.
    expected = "-p 2222 -oServerAliveInterval=7 -oBatchMode=yes -oServerAliveInterval=10 -oServerAliveCountMax=3"
    assert launcher.environment()["PDSH_SSH_ARGS_APPEND"] == expected
    of_mpi = "launcher = 'openmpi'\nlauncher_args = '--mca plm_rsh_args \"-p 2222\" --mca btl_tcp_if_include eth1'"
    words = HostfileLauncher(main_job(tmp_path, of_mpi))._mpirun_arguments()
    assert words[:3] == ["--mca", "btl_tcp_if_include", "eth1"]
    assert words[3:6] == [
        "--mca",
        "plm_rsh_args",
        "-p 2222 -oBatchMode=yes -oServerAliveInterval=15 -oServerAliveCountMax=3",
    ]
    assert words.count("plm_rsh_args") == 1


def test_the_users_environment_file(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    for folder, text in ((home, "A=of home\n\n# no variable\nB = $PATH:/b\n"), (here, "A=of here\n")):
        folder.mkdir()
        (folder / ".deepspeed_env").write_text(text)
    user = user_lines(home, here)
    assert user == {"A": "of here", "B": " $PATH:/b"}
    assert env_file(user, {"C": "a b", "A": "1"}) == "A=1\nB= $PATH:/b\nC=\"'a b'\"\n"
    assert user_lines(home, here, "other") == {}
    assert user_lines(home, here, str(home / ".deepspeed_env")) == {"A": "of home", "B": " $PATH:/b"}
    (here / ".deepspeed_env").write_text("A=1\nexport B\n")
    with pytest.raises(ConfigError, match=r"here/.deepspeed_env, line 2: given 'export B'; allowed: NAME=value"):
        user_lines(home, here)


@pytest.mark.parametrize("value", ["two\nlines", "return\r", "nul\0"])
def test_a_value_that_cannot_be_handed_on_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"environment of the job, NAME: .*; allowed: one line"):
        env_file({}, {"NAME": value})
    with pytest.raises(ConfigError, match="a name of letters, digits and _"):
        env_file({}, {"BASH_FUNC_x%%": "value"})


@pytest.fixture
def sleepers(tmp_path: Path) -> Iterator[dict[str, subprocess.Popen[bytes]]]:
    """Processes of jobs; that of r:p:stubborn does not end on SIGTERM."""
    started = {}
    code = "import pathlib, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    code += "pathlib.Path(sys.argv[1]).touch(); time.sleep(60)"
    for job in ("r:p:v1", "r:p:v10", "r2:p:v1", "r:p:stubborn", ""):
        command = [sys.executable, "-c", code, str(tmp_path / "ready")] if "stubborn" in job else ["sleep", "60"]
        environment = {"PATHSWITCH_JOB": job} if job else {"NOT_PATHSWITCH_JOB": "r:p:v1"}
        started[job] = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield started
    for process in started.values():
        process.kill()
        process.wait()


def test_a_jobs_processes_are_those_that_have_its_id(sleepers: dict[str, subprocess.Popen[bytes]]) -> None:
    pids = {job: process.pid for job, process in sleepers.items()}

    def found(*jobs: str) -> set[int]:
        return {process["pid"] for process in job_processes.find(jobs)}

    assert found("r:p:v1") == {pids["r:p:v1"]}
    assert found("r") == {pids[job] for job in ("r:p:v1", "r:p:v10", "r:p:stubborn")}
    assert found("r:p:v1", "r2") == {pids["r:p:v1"], pids["r2:p:v1"]}
    assert found("p") == set() == found()
    (process,) = job_processes.find(["r:p:v10"])
    assert process == {"pid": pids["r:p:v10"], "job": "r:p:v10", "command": "sleep 60"}


def test_a_job_is_ended_and_no_other(sleepers: dict[str, subprocess.Popen[bytes]]) -> None:
    # Its parent has to take note of a process's end before it is gone.
    found, left = job_processes.end(["r:p:v1", "r:p:stubborn"], grace_seconds=2.0)
    assert {process["job"] for process in found} == {"r:p:v1", "r:p:stubborn"} and left == []
    assert sleepers["r:p:v1"].wait(60) == -signal.SIGTERM
    assert sleepers["r:p:stubborn"].wait(60) == -signal.SIGKILL
    assert all(sleepers[job].poll() is None for job in ("r:p:v10", "r2:p:v1", ""))


def test_this_process_is_never_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from pathswitch.launch import job_processes; print(job_processes.find(['r']))"
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -c "{code}"; true'],
        env={**os.environ, "PATHSWITCH_JOB": "r:p:v1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "[]\n", done.stderr


FAKE_SSH = """#!/bin/sh
# Runs the command here, whatever the host; the host "gone" is silent, and "closed" refuses.
while [ $# -gt 2 ]; do shift; done
case $1 in
    gone) exec sleep 60 ;;
    closed) echo "ssh: connect to host closed port 22: Connection refused" >&2; exit 255 ;;
    *) exec sh -c "$2" ;;
esac
"""


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An ssh that stays on this machine."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(FAKE_SSH)
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.usefixtures("fake_ssh")
def test_two_names_of_one_machine_are_one(sleepers: dict[str, subprocess.Popen[bytes]]) -> None:
    pid = sleepers["r2:p:v1"].pid
    found = orphans(["here", "closed"], ["r2"])
    assert [(entry.host, [process["pid"] for process in entry.processes]) for entry in found] == [
        ("here", [pid]),
        ("closed", []),
    ]
    assert found[1].error == "host closed does not answer: ssh: connect to host closed port 22: Connection refused"
    assert orphans(["here"], ["another"]) == []
    (ended,) = end_jobs(["here"], ["r2"])
    assert ended.host == "here" and [process["pid"] for process in ended.processes] == [pid] and ended.left == ()
    assert sleepers["r2:p:v1"].wait(60) == -signal.SIGTERM


@pytest.mark.usefixtures("fake_ssh")
def test_a_watch_names_the_host_that_is_silent_and_no_other() -> None:
    began = time.monotonic()
    watch = HostWatch(["here", "gone"], Ssh(), timeout_seconds=4.0)
    while (failure := watch.failure()) is None and time.monotonic() < began + 60:
        time.sleep(0.05)
    took = time.monotonic() - began
    watch.stop()
    assert failure is not None and failure.startswith("host gone has not answered for ") and took >= 4.0


@pytest.mark.usefixtures("fake_ssh")
def test_a_watch_that_was_held_up_itself_blames_nobody() -> None:
    watch = HostWatch(["here"], Ssh(), timeout_seconds=6.0)
    deadline = time.monotonic() + 60
    while not watch._states["here"].identity and time.monotonic() < deadline:
        time.sleep(0.02)
    # As after a stop of the whole process: nothing was read for a while.
    watch._states["here"].heard -= 100
    assert watch.failure() is None
    until = time.monotonic() + 2
    while time.monotonic() < until:
        assert watch.failure() is None
        time.sleep(0.05)
    watch.stop()


@pytest.mark.usefixtures("fake_ssh")
def test_a_watch_says_why_there_is_no_answer() -> None:
    watch = HostWatch(["closed"], Ssh(), timeout_seconds=1.0)
    deadline = time.monotonic() + 60
    while (failure := watch.failure()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    watch.stop()
    assert failure is not None
    assert failure.endswith("s (ssh: connect to host closed port 22: Connection refused)")
