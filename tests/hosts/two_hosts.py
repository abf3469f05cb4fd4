"""Two hosts on one machine: each has a network, PID, mount and UTS namespace of its own, and an sshd.

Nothing of them has a name outside: when their processes end, so do the namespaces, the link and every mount.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

TOOLS = ("sshd", "ssh", "ssh-keygen", "pdsh", "mpirun", "ip", "nsenter", "unshare", "setpriv")
ADDRESSES = {"hA": "10.77.0.1", "hB": "10.77.0.2"}
LINK = "net0"
SBIN = "/usr/local/sbin:/usr/sbin:/sbin"
START_SECONDS = 60

SSHD_CONFIG = """
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
PasswordAuthentication no
MaxStartups 100
"""
SSH_CONFIG = """
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
# Run as PID 1 of a host. Its /run, /dev/shm and configuration are its own; everything else is the shared file system.
INIT = """
set -e
hostname {name}
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
ip link set lo up
exec {sshd} -D -e -f {folder}/sshd_config
"""


def missing() -> str:
    """Return why there can be no hosts here, empty where there can."""
    absent = [tool for tool in TOOLS if which(tool) is None]
    if absent:
        return f"needs {', '.join(absent)}"
    return "" if os.getuid() == 0 else "needs root: hosts are namespaces"


def which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ['PATH']}:{SBIN}")


class TwoHosts:
    """Hosts hA and hB, joined by a link; commands are run on hA or hB as if one had logged in."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hosts: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start both hosts and wait until they answer."""
        for name in ("host_key", "key"):
            _check("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self._folder / name))
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in ADDRESSES.items())]
        (self._folder / "hosts").write_text("\n".join(lines) + "\n")
        (self._folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=self._folder))
        (self._folder / "ssh_config").write_text(SSH_CONFIG.format(folder=self._folder))
        for name in ADDRESSES:
            self._start(name)
        self._join()

    def _start(self, name: str) -> None:
        """Start a host: everything in it ends with PID 1, and PID 1 with this process."""
        new = ["unshare", "--net", "--uts", "--pid", "--mount", "--ipc", "--fork", "--kill-child", "--mount-proc"]
        script = INIT.format(name=name, folder=self._folder, sshd=which("sshd"))
        with (self._folder / f"sshd_{name}.txt").open("ab") as log:
            command = ["setpriv", "--pdeathsig", "KILL", *new, "bash", "-c", script]
            self._hosts[name] = subprocess.Popen(command, stdout=log, stderr=log, env=_environment({}))
        _wait(lambda: self._pid(name) is not None, f"{name} to start")

    def _join(self) -> None:
        """Lay the link between the hosts and wait until both answer."""
        first, second = ADDRESSES
        peer = ["type", "veth", "peer", "name", LINK, "netns", str(self._pid(second))]
        self._ip(first, "link", "add", LINK, *peer)
        for name, address in ADDRESSES.items():
            self._ip(name, "addr", "add", f"{address}/24", "dev", LINK)
            self.link(name, "up")
        for here, there in ((first, second), (second, first)):
            _wait(partial(self.answers, there, to=here), f"{there} to answer")

    def answers(self, name: str, to: str) -> bool:
        """Return whether a host lets another log in."""
        login = ["ssh", "-o", "ConnectTimeout=1", name, "true"]
        return self.popen(to, login, stderr=subprocess.DEVNULL).wait(START_SECONDS) == 0

    def stop(self) -> None:
        """End both hosts with everything on them."""
        for name in list(self._hosts):
            self.kill(name)

    def kill(self, name: str) -> None:
        """Let a host die at once, with everything on it, and nobody told."""
        host = self._hosts.pop(name)
        host.kill()
        host.wait()

    def restart(self, name: str) -> None:
        """Start a host that was killed."""
        (other,) = self._hosts
        self._ip(other, "link", "delete", LINK)
        self._start(name)
        self._join()

    def link(self, name: str, state: str) -> None:
        """Set a host's end of the link "up" or "down": while it is down, no packet passes and nobody is told."""
        self._ip(name, "link", "set", LINK, state)

    def popen(
        self,
        name: str,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **pipes: Any,
    ) -> subprocess.Popen[Any]:
        """Start a command on a host."""
        enter = ["nsenter", "-t", str(self._pid(name)), "--net", "--uts", "--pid", "--mount", "--ipc"]
        enter += [f"--wdns={cwd}"] if cwd else []
        return subprocess.Popen([*enter, "--", *command], env=_environment(env or {}), **pipes)

    def check(self, name: str, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run a command on a host, which must succeed, and return its output."""
        process = self.popen(
            name, command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        output: str = process.communicate(timeout=START_SECONDS)[0]
        assert process.returncode == 0, f"{name}: {command}: {output}"
        return output

    def _ip(self, name: str, *arguments: str) -> None:
        """Configure a host's network; PIDs among the arguments are those outside."""
        _check("nsenter", "-t", str(self._pid(name)), "--net", "ip", *arguments)

    def _pid(self, name: str) -> int | None:
        """Return the PID that a host's PID 1 has outside."""
        unshare = self._hosts[name].pid
        assert self._hosts[name].poll() is None, (self._folder / f"sshd_{name}.txt").read_text()
        children = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        return int(children[0]) if children else None


@contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Two hosts for as long as the context lasts."""
    hosts = TwoHosts(folder)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    return {**os.environ, "PATH": f"{os.environ['PATH']}:{SBIN}", **extra}


def _check(*command: str) -> None:
    subprocess.run(command, check=True, timeout=START_SECONDS, stdout=subprocess.DEVNULL, env=_environment({}))


def _wait(condition: Any, what: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {START_SECONDS} s for {what}"
        time.sleep(0.02)
