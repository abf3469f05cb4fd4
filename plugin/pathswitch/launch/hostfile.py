"""The deepspeed launcher over the hosts of a hostfile, by pdsh or by Open MPI."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from pathswitch.atomic import write_text_atomic
from pathswitch.errors import ConfigError, RunError
from pathswitch.launch import job_processes
from pathswitch.launch.deepspeed_env import (
    DEFAULT_NAME,
    check_variables,
    env_file,
    pdsh_word,
    runner_argument,
    user_lines,
)
from pathswitch.launch.host_watch import HostWatch, keep_alive
from pathswitch.launch.hosts import ANSWER_SECONDS, Ssh, first_hosts, on_all
from pathswitch.launch.launcher import module_or_script
from pathswitch.launch.spec import FIRST_PORT, PORTS, JobSpec, launcher_words

GRACE_SECONDS = 10.0
ASK_AGAIN_SECONDS = 2.0
# Of the submitting shell's own variables, the ranks get these; for others there are [launch] env and .deepspeed_env.
HANDED_ON = ("DS_ACCELERATOR", "OMP_NUM_THREADS")
PORTS_TRIED = 20
PDSH_OPTIONS, RSH_OPTIONS = "PDSH_SSH_ARGS_APPEND", "plm_rsh_args"
COMMAND_LENGTH = 80
# mpirun names its ranks otherwise than DeepSpeed, which would need mpi4py to translate.
OPENMPI_RANK = (
    "export RANK=$OMPI_COMM_WORLD_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK "
    'LOCAL_SIZE=$OMPI_COMM_WORLD_LOCAL_SIZE; exec "$@"'
)
# Run on each host: fails where a folder is missing; prints its address and the first of the ports that is free there.
RENDEZVOUS = """
import os, socket, subprocess, sys
for folder in sys.argv[1:3]:
    if not os.path.isdir(folder):
        sys.exit(f"there is no folder {folder}; all hosts must share it")
addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
for port in map(int, sys.argv[3:]):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            continue
    print(addresses[0] if addresses else socket.gethostbyname(socket.gethostname()), port)
    break
else:
    sys.exit(f"no port is free of {sys.argv[3:]}")
"""


@dataclass(frozen=True)
class Found:
    """What a host has of the jobs that were asked for."""

    host: str
    processes: tuple[job_processes.Process, ...] = ()
    left: tuple[job_processes.Process, ...] = ()
    """Those that could not be ended."""
    error: str = ""
    """Why the host does not say."""
    machine: str = ""
    """The same for two hosts that are one machine by two names."""


class HostfileLauncher:
    """Starts a job's ranks on the first hosts of a hostfile by DeepSpeed's runner, and ends them by the job's id."""

    def __init__(self, spec: JobSpec, environ: Mapping[str, str] = os.environ) -> None:
        """Check all that can be checked without the hosts.

        Raises:
            ConfigError: the hostfile, or something in [launch], is not right.
        """
        launch = spec.launch
        assert launch.hostfile is not None
        self._spec = spec
        handed_on = {name: environ[name] for name in HANDED_ON if name in environ}
        self._job = {**handed_on, **launch.env, **spec.environment()}
        check_variables(self._job)
        self._pdsh = launch.launcher != "openmpi"
        self._hosts = first_hosts(Path(spec.working_folder, launch.hostfile), spec.nodes, spec.gpus_per_node)
        self._names = [host.name for host in self._hosts]
        self._arguments = launcher_words(launch)
        options, self._arguments = self._ssh_options()
        self._ssh = Ssh(tuple(options))
        self._watch: HostWatch | None = None
        if self._pdsh:
            _check_plain("[launch] python", spec.python)
            _check_plain("working folder", spec.working_folder)

    def _ssh_options(self) -> tuple[list[str], list[str]]:
        """Return the user's own options of ssh, and the launcher's arguments without them."""
        words = self._arguments
        if self._pdsh:
            return os.environ.get(PDSH_OPTIONS, "").split(), words
        for index in range(len(words) - 2):
            if words[index] in ("-mca", "--mca") and words[index + 1] == RSH_OPTIONS:
                return words[index + 2].split(), words[:index] + words[index + 3 :]
        return [], words

    def command(self, training: Sequence[str]) -> list[str]:
        """End what an earlier start has left, write the job's files, and return the launch line.

        Hosts that do not answer are waited for as long as they would be while the job runs.

        Raises:
            RunError: a host does not answer or lacks the job's folders, or a program is missing here.
        """
        spec, folder = self._spec, self._spec.files.folder
        for program in ("ssh", "pdsh" if self._pdsh else "mpirun"):
            if shutil.which(program) is None:
                raise RunError(f"{program} is not on PATH: kind = 'hostfile' needs it on the machine that submits")
        folder.mkdir(parents=True, exist_ok=True)
        hostfile = "".join(f"{host.name} slots={host.slots}\n" for host in self._hosts)
        write_text_atomic(folder / "hostfile", hostfile)
        write_text_atomic(folder / "deepspeed_env", self._env_file())
        address, port = self._rendezvous()
        # A host that was lost, and is back, does not know that the job has ended. Two of it would write one checkpoint.
        for line in self.end():
            print(f"pathswitch: {spec.path}: before the start: {line}", flush=True)
        runner = [spec.python, "-m", "pathswitch.launch.deepspeed_runner", "--hostfile", str(folder / "hostfile")]
        # One host in the hostfile is a host all the same, not this machine.
        runner += ["--force_multi", "--no_ssh_check", "--master_addr", address, "--master_port", str(port)]
        if self._pdsh:
            script, *arguments = module_or_script(training)
            module = [script, pdsh_word(arguments.pop(0))] if script == "--module" else [pdsh_word(script)]
            runner += ["--launcher", "pdsh", f"--launcher_args={shlex.join(self._arguments)}", *module]
            return [*runner, *map(runner_argument, arguments)]
        exported = f"export MASTER_ADDR={shlex.quote(address)} MASTER_PORT={port}; {OPENMPI_RANK}"
        runner += ["--launcher", "openmpi", f"--launcher_args={shlex.join(self._mpirun_arguments())}", "--no_python"]
        return [*runner, "sh", "-c", exported, "sh", spec.python, "-u", *training]

    def environment(self) -> dict[str, str]:
        """Return the job's environment, where the runner finds it, and options of ssh that end the wait for a host."""
        environment = {**self._job, "DS_ENV_FILE": str(self._spec.files.folder / "deepspeed_env")}
        if self._pdsh:
            environment[PDSH_OPTIONS] = self._ssh_words()
        return environment

    def ask_to_stop(self) -> None:
        """Leave it to the stop file: signals end at pdsh, and at mpirun they end the job."""

    def failure(self) -> str | None:
        """Return which host is lost, None while all answer."""
        if self._watch is None:
            self._watch = HostWatch(self._names, self._ssh, self._spec.launch.host_timeout_seconds)
        return self._watch.failure()

    def end(self) -> list[str]:
        """End the job's processes on all hosts and on this machine, and say what was found where."""
        if self._watch is not None:
            self._watch.stop()
            self._watch = None
        lines = []
        for found in end_jobs(self._names, [self._spec.id], python=self._spec.python, ssh=self._ssh):
            ranks = tuple(process for process in found.processes if not _is_launcher(process))
            if ranks or found.error:
                lines.append(_line(replace(found, processes=ranks)))
        return lines

    def _env_file(self) -> str:
        name = os.environ.get("DS_ENV_FILE", DEFAULT_NAME)
        user = user_lines(Path.home(), Path(self._spec.working_folder), name)
        if self._pdsh:
            # The runner hands PYTHONPATH on by itself, with the working folder in front.
            return env_file(user, {name: value for name, value in self._job.items() if name != "PYTHONPATH"})
        return env_file({name: value for name, value in user.items() if name not in self._job}, {})

    def _mpirun_arguments(self) -> list[str]:
        """Return the user's arguments, options of ssh, and the names of the variables that mpirun hands on."""
        exported = [word for name in self._job if name != "PYTHONPATH" for word in ("-x", name)]
        return [*self._arguments, "--mca", RSH_OPTIONS, self._ssh_words(), *exported]

    def _ssh_words(self) -> str:
        """Return options of ssh; the user's own come first, and ssh takes the first of its kind."""
        own = ("-oBatchMode=yes", *keep_alive(self._spec.launch.host_timeout_seconds))
        return " ".join([*self._ssh.options, *own])

    def _rendezvous(self) -> tuple[str, int]:
        """Return the address of the first host and a port that is free there, once all hosts have answered."""
        spec, offset = self._spec, self._spec.port - FIRST_PORT
        ports = [str(FIRST_PORT + (offset + more) % PORTS) for more in range(PORTS_TRIED)]
        command = [spec.python, "-I", "-S", "-", spec.working_folder, str(spec.files.folder), *ports]

        def ask(host: str) -> tuple[str, str]:
            try:
                return self._ssh.run(host, command, script=RENDEZVOUS), ""
            except RunError as error:
                return "", str(error)

        deadline = time.monotonic() + spec.launch.host_timeout_seconds
        answers = on_all(self._names, ask)
        while errors := [error for _, error in answers if error]:
            if time.monotonic() > deadline or spec.files.stop.exists():
                raise RunError("; ".join(errors))
            time.sleep(ASK_AGAIN_SECONDS)
            answers = on_all(self._names, ask)
        address, port = answers[0][0].split()[-2:]
        return self._job.get("MASTER_ADDR", address), int(port)


def orphans(
    hosts: Sequence[str], jobs: Sequence[str], *, python: str = sys.executable, ssh: Ssh | None = None
) -> list[Found]:
    """Return what this machine and hosts have of jobs, given by id, or by what ids begin with up to a colon.

    Where no agent looks after such a job, they are orphans. Hosts that answer and have nothing are left out.
    ``python`` is an interpreter on the hosts.
    """
    return _on_machines(hosts, jobs, None, python, ssh or Ssh())


def end_jobs(
    hosts: Sequence[str], jobs: Sequence[str], *, python: str = sys.executable, ssh: Ssh | None = None
) -> list[Found]:
    """End the processes of jobs on this machine and on hosts, and return what was found, as ``orphans`` does."""
    return _on_machines(hosts, jobs, GRACE_SECONDS, python, ssh or Ssh())


def _on_machines(
    hosts: Sequence[str], jobs: Sequence[str], grace_seconds: float | None, python: str, ssh: Ssh
) -> list[Found]:
    """Find, or end after ``grace_seconds``, the processes of jobs."""
    here, left = (job_processes.find(jobs), []) if grace_seconds is None else job_processes.end(jobs, grace_seconds)
    found = on_all(hosts, partial(_on_host, jobs=jobs, grace_seconds=grace_seconds, python=python, ssh=ssh))
    own = job_processes.machine()
    machines = [_merged(entry, here, left) if entry.machine == own else entry for entry in found]
    if all(entry.machine != own for entry in found):
        machines.insert(0, Found(socket.gethostname(), tuple(here), tuple(left)))
    return [entry for entry in machines if entry.processes or entry.error]


def _merged(found: Found, here: list[job_processes.Process], left: list[job_processes.Process]) -> Found:
    """Return what a host has, with what was seen from within, which may be gone by now."""
    processes = {process["pid"]: process for process in (*here, *found.processes)}
    return replace(found, processes=tuple(processes.values()), left=tuple(left) + found.left)


def _on_host(host: str, *, jobs: Sequence[str], grace_seconds: float | None, python: str, ssh: Ssh) -> Found:
    script = Path(job_processes.__file__).read_text(encoding="utf-8")
    command = [python, "-I", "-S", "-", "" if grace_seconds is None else str(grace_seconds), *jobs]
    patience = ANSWER_SECONDS + (grace_seconds or 0) + job_processes.KILL_SECONDS
    try:
        output = ssh.run(host, command, script=script, timeout_seconds=patience)
        machine, processes, left = json.loads(output.splitlines()[-1])
    except (RunError, ValueError, IndexError) as error:
        return Found(host, error=str(error) or "no answer")
    return Found(host, tuple(processes), tuple(left), machine=machine)


def _line(found: Found) -> str:
    if found.error:
        return f"{found.host}: not searched for processes of the job: {found.error}"
    count = f"{len(found.processes)} process{'es' if len(found.processes) > 1 else ''}"
    ended = ", ".join(f"pid {process['pid']} ({process['command'][:COMMAND_LENGTH]})" for process in found.processes)
    left = ", ".join(f"pid {process['pid']}" for process in found.left)
    return f"{found.host}: {count} outlived the launcher, ended: {ended}{left and f'; still there: {left}'}"


def _is_launcher(process: job_processes.Process) -> bool:
    """Return whether a process is the launcher's own end of its connections, which nobody has to hear of."""
    return Path(process["command"].partition(" ")[0]).name in ("ssh", "pdsh", "mpirun")


def _check_plain(where: str, text: str) -> None:
    if not re.fullmatch(r"[\w@+=:,./-]+", text):
        allowed = "a path of letters, digits and _ @ + = : , . / -: DeepSpeed writes it into a shell's line as it is"
        raise ConfigError(where, given=text, allowed=allowed)
