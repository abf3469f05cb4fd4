"""A SLURM cluster on one machine: real daemons, each node in PID, mount and UTS namespaces of its own.

A node sees its own processes and its own host name alone, and SIGKILL of its first process is what a lost machine is:
slurmd, steps and ranks are gone at once. All files and the munge daemon's socket are in one folder, ports are free
ones, and everything ends with the Python process that started it.
"""

from __future__ import annotations

import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

PACKAGES = {"slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge"}
ISOLATION = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--uts"]
# The kernel kills the process when the thread that started it ends.
TIED = ["setpriv", "--pdeathsig", "KILL"]
START_SECONDS = 30
POLL_SECONDS = 0.1
PORTS = 15  # the controller's and those of 14 nodes

# A requeued job waits for cred_expire + 1 seconds, 121 by default, before it starts again.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmUser={user}
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
MailProg=/bin/true
ReturnToService=2
SlurmdTimeout=300
MessageTimeout=30
InactiveLimit=0
MinJobAge=86400
KillWait=5
OverTimeLimit=0
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=REQUEUE GraceTime=60
PartitionName=hi Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=100 PreemptMode=OFF
"""
# Nodes that are switched off are idle, and nobody misses their answer.
SWITCHED_OFF = "SuspendProgram=/bin/true\nResumeProgram=/bin/true\nSuspendTime=86400\nPrivateData=cloud"


def unavailable(simulated: bool = False) -> str:
    """Return why no cluster can run here, and what to do about it; an empty string where one can."""
    missing = " ".join(package for command, package in PACKAGES.items() if not shutil.which(command, path=_path()))
    if missing:
        return f"needs the packages {missing}: apt-get install --no-install-recommends {missing}"
    if simulated:
        return ""
    if os.geteuid() != 0:
        return "needs root, for the namespaces that the cluster's nodes live in"
    if subprocess.run([*ISOLATION, "true"], capture_output=True).returncode != 0:
        return "needs the right to make namespaces (CAP_SYS_ADMIN; docker run --privileged)"
    return ""


def parse_job(line: str) -> dict[str, str]:
    """Return the fields of a line of ``scontrol show job -o``; values may contain spaces."""
    fields = re.split(r" (?=[A-Z][A-Za-z/:_]*=)", line.strip())
    pairs = (field.split("=", 1) for field in fields)
    return {key: value.strip() for key, value in pairs}


class Cluster:
    """Nodes n1, n2, ... with the partitions main, which can be preempted, and hi, which preempts it.

    Args:
        folder: an empty folder for all files; a short path, for the length of a socket's name is limited.
        nodes: number of nodes.
        gpus: GPUs of each node, null devices that SLURM counts and hands out.
        simulated: nodes are there for the controller alone: enough for ``sbatch --test-only``.
    """

    def __init__(self, folder: Path, nodes: int = 4, gpus: int = 2, simulated: bool = False) -> None:
        self.folder = folder
        self.nodes = [f"n{index}" for index in range(1, nodes + 1)]
        self.gpus = gpus
        self.simulated = simulated
        self._munged: subprocess.Popen[bytes] | None = None
        self._controller: subprocess.Popen[bytes] | None = None
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._guard, self._port = _port_block()

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def environment(self) -> dict[str, str]:
        """Return this process's environment with SLURM's commands turned to this cluster."""
        environ = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_"))}
        return environ | {"PATH": _path(), "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str | Path, timeout: float = 60) -> str:
        """Run a command of SLURM's to its end and return its output; a failure is an error that shows it."""
        line = [str(part) for part in command]
        done = subprocess.run(line, capture_output=True, text=True, env=self.environment(), timeout=timeout)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(line)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def submit(self, script: str, *options: str) -> int:
        """Submit a batch script, given as text, and return its job's id."""
        file = self.folder / f"script-{len(list(self.folder.glob('script-*')))}.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        output = self.folder / "out-%j.txt"
        return int(self.run("sbatch", "--parsable", "--open-mode=append", f"--output={output}", *options, file))

    def output(self, job_id: int) -> str:
        """Return what a job of ``submit`` has written so far."""
        file = self.folder / f"out-{job_id}.txt"
        return file.read_text() if file.exists() else ""

    def job(self, job_id: int) -> dict[str, str]:
        """Return a job's fields as ``scontrol show job`` names them."""
        return parse_job(self.run("scontrol", "show", "job", "-o", str(job_id)))

    def jobs(self) -> list[dict[str, str]]:
        """Return the fields of every job, finished ones too, oldest first."""
        lines = self.run("scontrol", "show", "job", "-o").splitlines()
        return [parse_job(line) for line in lines if line.startswith("JobId=")]

    def wait_for(self, predicate: Callable[[], object], timeout: float = 60, what: str = "") -> None:
        """Wait until a predicate holds; after ``timeout`` seconds fail with what the cluster is doing."""
        deadline = time.monotonic() + timeout
        while not predicate():
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout} s: {what}\n{self.state()}")
            time.sleep(POLL_SECONDS)

    def wait_for_state(self, job_id: int, state: str, timeout: float = 60) -> None:
        """Wait until a job is in a state, such as RUNNING or COMPLETED."""
        self.wait_for(lambda: self.job(job_id)["JobState"] == state, timeout, f"job {job_id} is {state}")

    def reset(self) -> None:
        """End all jobs, and have all nodes up and idle, whatever a test has left."""
        self.run("scancel", "--me")
        self.wait_for(lambda: not self.run("squeue", "-h"), 60, "all jobs have ended")
        for name in self.nodes:
            if name not in self._running:
                self._start_node(name)
        for name in self.run("sinfo", "-h", "-N", "-p", "main", "-t", "down,drain", "-o", "%N").split():
            self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self._wait_for_nodes(self.nodes)

    def state(self) -> str:
        """Return jobs, nodes and the end of the controller's log, for a message."""
        log = self.folder / "log/slurmctld.log"
        shown = [["squeue", "-a", "-t", "all"], ["sinfo", "-N", "-l"], ["tail", "-n", "30", str(log)]]
        done = [subprocess.run(c, capture_output=True, env=self.environment(), timeout=60) for c in shown]
        # squeue cuts names in the middle of a letter
        return "\n".join((result.stdout + result.stderr).decode(errors="replace") for result in done)

    def node_down(self, name: str, reason: str = "lost") -> None:
        """Lose a node: SIGKILL for all its processes, and DOWN for the controller."""
        _kill(self._running.pop(name))
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", f"Reason={reason}")

    def node_hangs(self, name: str, reason: str = "hung") -> None:
        """Stop a node's slurmd, and set the node DOWN: its jobs go on, and nobody can end them."""
        for pid in _descendants(self._running[name].pid):
            if Path(f"/proc/{pid}/comm").read_text() == "slurmd\n":
                os.kill(pid, signal.SIGSTOP)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", f"Reason={reason}")

    def node_up(self, name: str) -> None:
        """Start a lost node again and wait until it can take jobs."""
        self._start_node(name)
        self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self._wait_for_nodes([name])

    def stop_controller(self) -> None:
        """End the controller as a service manager does; jobs go on, commands find nobody."""
        assert self._controller is not None
        self._controller.terminate()
        self._controller.wait(START_SECONDS)

    def start_controller(self) -> None:
        """Start the controller, on the state that the last one left."""
        self._controller = self._daemon("slurmctld", ["slurmctld", "-D"])
        answers = ["scontrol", "ping"]
        self._wait_until(
            lambda: subprocess.run(answers, capture_output=True, env=self.environment()).returncode == 0,
            "slurmctld",
            self._controller,
        )
        # A step that starts before its nodes have registered waits for two minutes.
        if self._running:
            states = ["sinfo", "-h", "-N", "-o", "%T"]
            self.wait_for(lambda: "unk" not in self.run(*states), START_SECONDS, "all nodes have registered")

    def restart_controller(self, stop_seconds: float = 0.0) -> None:
        """Stop the controller and start it again after ``stop_seconds``."""
        self.stop_controller()
        time.sleep(stop_seconds)
        self.start_controller()

    def stop(self) -> None:
        """End every process of the cluster."""
        for process in [*self._running.values(), self._controller, self._munged]:
            if process is not None:
                _kill(process)
        self._running.clear()
        self._guard.close()

    def _start(self) -> None:
        for folder in ("", "state", "log", *(f"spool/{name}" for name in self.nodes if not self.simulated)):
            (self.folder / folder).mkdir(parents=True, exist_ok=True)
        self._write_config()
        munge = self.folder / "munge"
        key = munge.with_suffix(".key")
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [f"--{name}-file={munge}.{name}" for name in ("key", "seed", "pid", "log")]
        # --force: the folder of a test is closed to other users, and munged would rather have it open.
        line = ["munged", "--foreground", "--force", f"--socket={munge}.socket", *files, "--num-threads=2"]
        self._munged = self._daemon("munged", line)
        self._wait_until(Path(f"{munge}.socket").exists, "munged", self._munged)
        self.start_controller()
        if not self.simulated:
            for name in self.nodes:
                self._start_node(name)
        self._wait_for_nodes(self.nodes)

    def _write_config(self) -> None:
        cores, memory, state = (128, 1_000_000, "CLOUD") if self.simulated else (4, 4_000, "UNKNOWN")
        size = f"CPUs={cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1 RealMemory={memory}"
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={self._port + 1 + index % (PORTS - 1)} "
            f"{size} Gres=gpu:{self.gpus} State={state}"
            for index, name in enumerate(self.nodes)
        ]
        text = CONFIG.format(
            host=socket.gethostname(),
            user=pwd.getpwuid(os.geteuid()).pw_name,
            port=self._port,
            folder=self.folder,
            nodes="\n".join([*nodes, SWITCHED_OFF] if self.simulated else nodes),
        )
        (self.folder / "slurm.conf").write_text(text)
        if self.simulated:
            return
        for index in range(self.gpus):
            os.mknod(self.folder / f"gpu{index}", 0o020600, os.makedev(1, 3))
        devices = f"NodeName={','.join(self.nodes)} Name=gpu File={self.folder}/gpu[0-{self.gpus - 1}]\n"
        (self.folder / "gres.conf").write_text(devices)
        hosts = Path("/etc/hosts").read_text()
        (self.folder / "hosts").write_text(f"{hosts}\n127.0.0.1 {' '.join(self.nodes)}\n")

    def _start_node(self, name: str) -> None:
        script = 'hostname "$1" && mount --bind "$2" /etc/hosts && { slurmd -D -N "$1" & wait; }'
        line = [*ISOLATION, "bash", "-c", script, "node", name, str(self.folder / "hosts")]
        self._running[name] = self._daemon(f"slurmd-{name}", line)

    def _wait_for_nodes(self, names: Sequence[str]) -> None:
        question = ["sinfo", "-h", "-p", "main", "-t", "idle", "-n", ",".join(names), "-o", "%D"]
        self.wait_for(lambda: self.run(*question).strip() == str(len(names)), START_SECONDS, f"{names} are idle")

    def _daemon(self, name: str, line: Sequence[str]) -> subprocess.Popen[bytes]:
        assert threading.current_thread() is threading.main_thread(), "a daemon ends with the thread that starts it"
        with (self.folder / f"log/{name}.out").open("ab") as output:
            return subprocess.Popen(
                [*TIED, *line], stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=self.environment()
            )

    def _wait_until(self, predicate: Callable[[], bool], name: str, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not predicate():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start:\n{(self.folder / f'log/{name}.out').read_text()}")
            time.sleep(0.02)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def _descendants(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [found for child in map(int, children) for found in (child, *_descendants(child))]


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(START_SECONDS)


def _port_block() -> tuple[socket.socket, int]:
    """Return a bound socket, which keeps other clusters off a block of ports, and the first port of the block.

    The blocks lie below the ports that the kernel gives to outgoing connections.
    """
    for first in random.sample(range(20_000, 32_000, PORTS + 1), 100):
        guard = socket.socket()
        try:
            guard.bind(("127.0.0.1", first))
            for port in range(first + 1, first + 1 + PORTS):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            guard.close()
            continue
        return guard, first + 1
    raise RuntimeError("found no free ports between 20000 and 32000")
