"""The hosts of a hostfile, and commands on them that never ask for a password and never wait for ever."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pathswitch.errors import ConfigError, RunError

ANSWER_SECONDS = 10.0
HOSTS_AT_ONCE = 64
SSH_FAILED = 255
# What ssh, pdsh and mpirun all take for one host, and never for an option or a list.
_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LINE = re.compile(r"(\S+)\s+slots=([1-9][0-9]*)")
# A connection of its own: another one's master would keep our pipes open, or hang itself.
_OPTIONS = ("-T", "-a", "-x", "-oBatchMode=yes", "-oControlMaster=no", "-oControlPath=none")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int


def read_hostfile(file: Path) -> tuple[Host, ...]:
    """Read a hostfile: a line ``name slots=N`` for each host, comments and empty lines.

    Raises:
        ConfigError: it cannot be read, names no host, names one twice, or has a line of another kind.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("hostfile", given=str(file), allowed=f"a readable text file ({error})") from None
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None or not _NAME.fullmatch(match[1]):
            raise ConfigError(f"{file}, line {number}", given=line, allowed="'name slots=N' with N >= 1, or a comment")
        if match[1] in hosts:
            raise ConfigError(f"{file}, line {number}", given=line, allowed="each host once")
        hosts[match[1]] = Host(match[1], int(match[2]))
    if not hosts:
        raise ConfigError(str(file), given="no host", allowed="at least one line 'name slots=N'")
    return tuple(hosts.values())


def first_hosts(file: Path, nodes: int, gpus_per_node: int) -> tuple[Host, ...]:
    """Return the first ``nodes`` hosts of a hostfile, each with ``gpus_per_node`` slots.

    Raises:
        ConfigError: the hostfile is wrong, or does not have as many.
    """
    hosts = read_hostfile(file)
    if nodes > len(hosts):
        raise ConfigError("[launch] nodes", given=nodes, allowed=f"up to {len(hosts)}, the hosts of {file}")
    for host in hosts[:nodes]:
        if gpus_per_node > host.slots:
            allowed = f"up to {host.slots}, the slots of {host.name} in {file}"
            raise ConfigError("[launch] gpus_per_node", given=gpus_per_node, allowed=allowed)
    return tuple(Host(host.name, gpus_per_node) for host in hosts[:nodes])


@dataclass(frozen=True)
class Ssh:
    """How hosts are reached."""

    options: tuple[str, ...] = ()
    """More options of ssh."""

    def line(self, host: str, command: Sequence[str], connect_seconds: float) -> list[str]:
        """Return the command line that runs a command on a host, and gives up what does not connect in time."""
        connect = f"-oConnectTimeout={max(1, int(min(connect_seconds, ANSWER_SECONDS)))}"
        return ["ssh", *_OPTIONS, connect, *self.options, host, shlex.join(command)]

    def run(
        self, host: str, command: Sequence[str], *, script: str = "", timeout_seconds: float = ANSWER_SECONDS
    ) -> str:
        """Run a command on a host, with ``script`` as its input, and return its output.

        Raises:
            RunError: the host does not answer in time, or the command fails.
        """
        line = self.line(host, command, timeout_seconds)
        try:
            done = subprocess.run(line, input=script.encode(), capture_output=True, timeout=timeout_seconds)
        except subprocess.TimeoutExpired:
            raise RunError(f"host {host} did not answer within {timeout_seconds:.3g} s") from None
        except OSError as error:
            raise RunError(f"host {host}: ssh cannot be started ({error.strerror})") from None
        if done.returncode:
            reason = last_line(done.stderr) or f"exit code {done.returncode}"
            did = "does not answer" if done.returncode == SSH_FAILED else f"cannot run {command[0]}"
            raise RunError(f"host {host} {did}: {reason}")
        return done.stdout.decode(errors="replace")


def last_line(output: bytes) -> str:
    """Return the last line that says something: there, programs say why they failed."""
    lines = output.decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def on_all(hosts: Sequence[str], action: Callable[[str], Result]) -> list[Result]:
    """Return what ``action`` returns for each host, done on many at once."""
    with ThreadPoolExecutor(max_workers=min(HOSTS_AT_ONCE, max(1, len(hosts)))) as threads:
        return list(threads.map(action, hosts))
