"""What the doctor says of the leftovers of dead jobs, of limits, of the network and of variables."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_subject import SCHEDULE, by_name, mounted, subject

from pathswitch.config import PlanFile
from pathswitch.config.launch import LaunchSection
from pathswitch.launch.agent_lock import only_agent
from pathswitch.launch.doctor import machine, network, processes
from pathswitch.launch.spec import job_specs, run_id
from pathswitch.run_folder import PathFolder

BATON = "from torch.utils.file_baton import FileBaton as B; B({!r}).try_acquire(); print('held', flush=True); input()"


def test_a_lock_is_a_live_builds_or_stale(tmp_path: Path) -> None:
    """The lock is torch's own, and so is its death."""
    folder = tmp_path / "extensions" / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    lock = folder / "lock"
    examined = subject(TORCH_EXTENSIONS_DIR=str(tmp_path / "extensions"), XDG_CACHE_HOME=str(tmp_path / "cache"))
    line = [sys.executable, "-c", BATON.format(str(lock))]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as build:
        assert build.stdout is not None and build.stdout.readline() == b"held\n"
        [held] = machine.check_builds(examined)
        build.kill()
    assert held.status == "ok" and f"process {build.pid}" in held.found
    [young] = machine.check_builds(examined)
    assert young.status == "note" and "unless another host" in young.todo
    os.utime(lock, (time.time() - 700, time.time() - 700))
    [stale] = machine.check_builds(examined)
    assert (stale.status, stale.todo) == ("problem", f"rm {lock}")
    assert lock.exists(), "only its owner may delete it"
    subprocess.run(stale.todo, shell=True, check=True)
    assert [finding.status for finding in machine.check_builds(examined)] == ["ok"]


@pytest.mark.slow
def test_locks_are_looked_for_where_torch_keeps_extensions_by_itself(tmp_path: Path) -> None:
    code = "from torch.utils.cpp_extension import get_default_build_root as root; print(root())"
    environ = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    for more in ({}, {"XDG_CACHE_HOME": str(tmp_path / "cache")}):
        done = subprocess.run(
            [sys.executable, "-c", code], env=environ | more, capture_output=True, text=True, timeout=60
        )
        assert machine.extension_folders(environ | more) == [Path(done.stdout.strip())]


# Python's own mmap keeps the file open.
MAPPING = """
import ctypes, sys
mmap = ctypes.CDLL(None).mmap
mmap.argtypes, mmap.restype = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long], ctypes.c_void_p
with open(sys.argv[1], "r+b") as file:
    assert mmap(None, 4096, 1, 1, file.fileno(), 0) != ctypes.c_void_p(-1).value
print(flush=True)
input()
"""


@contextmanager
def mapped(file: Path) -> Iterator[None]:
    """A process that has a file mapped, and not open any more."""
    line = [sys.executable, "-c", MAPPING, str(file)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        yield
        process.kill()


def test_buffers_of_dead_processes(tmp_path: Path) -> None:
    live, dead = (tmp_path / f"deepspeed_allreduce_buffer_0_127.0.0.1_29500_{rank}" for rank in (0, 1))
    for file in (live, dead):
        file.write_bytes(b"x" * (3 << 20))
    with mapped(live):
        finding = machine.leftover_finding(tmp_path)
    assert finding.status == "note" and finding.found.startswith("1 x ") and "3 MiB" in finding.found
    assert finding.todo == f"rm {dead}"
    dead.unlink()
    live.unlink()
    assert machine.leftover_finding(tmp_path).status == "ok"


def marked_process(job: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["sleep", "300"], env={**os.environ, "PATHSWITCH_JOB": job})


def test_processes_of_a_run_without_an_agent_are_orphans(tmp_path: Path) -> None:
    run = tmp_path / "run"
    files = PathFolder(run / "path_switching" / "main")
    process = marked_process(f"{run_id(run)}:path_switching:main")
    other = marked_process(f"{run_id(tmp_path)}:path_switching:main")
    try:
        with only_agent(files):
            [looked_after] = processes.check(subject(run))
        [orphan] = processes.check(subject(run))
    finally:
        for started in (process, other):
            started.kill()
            started.wait()
    assert (looked_after.status, looked_after.found) == ("ok", "1 of this run, none without its agent")
    assert orphan.status == "problem" and f"path main on {socket.gethostname()}" in orphan.found
    assert orphan.todo.startswith(f"kill {process.pid} ")
    [none] = processes.check(subject(run))
    assert none.status == "ok"


def test_limits() -> None:
    infinity = resource.RLIM_INFINITY
    assert machine.open_file_finding(65536, 65536).status == "ok"
    assert machine.open_file_finding(1024, infinity).todo == "ulimit -n 65536"
    assert "limits.conf" in machine.open_file_finding(1024, 1024).todo
    assert machine.locked_memory_finding(65536, infiniband=False).status == "skipped"
    assert machine.locked_memory_finding(65536, infiniband=True).status == "problem"
    assert machine.locked_memory_finding(infinity, infiniband=True).status == "ok"


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = network.port_finding(subject(MASTER_PORT=str(port)))
        assert finding.status == "note" and f"{port}: Address already in use" in finding.found
    assert network.port_finding(subject(MASTER_PORT=str(port))).status == "ok"


def test_ports_of_a_runs_own_jobs(tmp_path: Path) -> None:
    plan = PlanFile.model_validate(SCHEDULE | {"launch": LaunchSection(command=("train.py",))})
    specs = tuple(job_specs(plan, tmp_path, tmp_path / "run"))
    examined = replace(subject(tmp_path / "run"), plan=plan, specs=specs)
    assert network.master_ports(examined) == [spec.port for spec in specs]
    with network.facts.listener(specs[0].port):
        finding = network.port_finding(examined)
    assert finding.status == "problem" and finding.todo.startswith(f"ss -ltnp 'sport = :{specs[0].port}'")
    assert network.port_finding(examined).status == "ok"


@pytest.mark.parametrize(("size", "status"), [("16m", "problem"), ("128m", "note"), ("2g", "ok")])
def test_shared_memory(tmp_path: Path, size: str, status: str) -> None:
    with mounted(tmp_path / "shm", "tmpfs", f"size={size}") as place:
        finding = machine.shared_memory_finding(place)
    assert finding.status == status
    assert machine.shared_memory_finding(tmp_path / "none").status == "problem"


@pytest.mark.parametrize(
    ("variable", "value", "exists"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "ib,eth", True),
        ("NCCL_SOCKET_IFNAME", "^lo", True),
        ("NCCL_SOCKET_IFNAME", "^lo,eth", False),
        ("NCCL_SOCKET_IFNAME", "^=eth", True),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth", True),
        ("NCCL_SOCKET_IFNAME", "^=lo,eth0", False),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth0,ib0", False),
    ],
)
def test_interfaces(variable: str, value: str, exists: bool) -> None:
    finding = network.interface_finding(subject(**{variable: value}), ["lo", "eth0"])
    assert finding.status == ("ok" if exists else "problem"), finding
    assert exists or variable in finding.todo


def test_a_name_that_only_this_machine_can_reach_is_noted() -> None:
    assert network.name_finding("node7", ["10.0.0.7", "127.0.1.1"]).status == "ok"
    assert network.name_finding("node7", ["127.0.1.1"]).status == "note"
    assert network.name_finding("node7", []).status == "note"


def test_variables(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    stop.touch()
    examined = subject(
        launch=LaunchSection(),
        PATHSWITCH_PATH="v9",
        PATHSWITCH_SIGNING_KEY="secret",
        PATHSWITCH_STOP_FILE=str(stop),
    )
    findings = by_name(list(machine.check_variables(examined)))
    assert findings["variables"].status == "note" and "secret" not in findings["variables"].found
    assert "PATHSWITCH_SIGNING_KEY," in findings["variables"].found and f"={stop}" in findings["variables"].found
    assert findings["PATHSWITCH_PATH"].todo == "unset PATHSWITCH_PATH, or one of: main, v1"
    assert findings["PATHSWITCH_STOP_FILE"].status == "problem"
