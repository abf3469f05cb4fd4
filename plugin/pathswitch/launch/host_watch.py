"""Whether the hosts of a job are still there: a connection to each, over which they are asked in the background."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pathswitch.launch.hosts import Ssh, last_line

# Between two questions to a host, as a share of the time after which it is lost.
PAUSE_SHARE, MAX_PAUSE_SECONDS = 1 / 6, 10.0
# What the host runs: first it says which start of it this is (of the machine, and of a container with an sshd of its
# own), then it answers line by line. It ends with the connection.
ANSWER = ("sh", "-c", "echo $(cat /proc/sys/kernel/random/boot_id; cut -d' ' -f22 /proc/1/stat); exec cat")


@dataclass
class _State:
    heard: float
    """When the host answered last, on the monotonic clock."""
    identity: bytes = b""
    restarted: bool = False
    reason: str = ""
    """Why the last connection ended."""
    suspected: float | None = None
    """Since when it has been silent for nearly too long, as ``failure`` has seen it."""
    connection: subprocess.Popen[bytes] | None = None


class HostWatch:
    """Asks each host whether it is there, and knows which one is lost; to be stopped in the end."""

    def __init__(self, hosts: Sequence[str], ssh: Ssh, timeout_seconds: float) -> None:
        self._timeout, self._pause = timeout_seconds, min(MAX_PAUSE_SECONDS, timeout_seconds * PAUSE_SHARE)
        self._ssh = replace(ssh, options=(*ssh.options, *keep_alive(timeout_seconds)))
        self._stopped = threading.Event()
        self._states = {host: _State(heard=time.monotonic()) for host in hosts}
        for host, state in self._states.items():
            threading.Thread(target=self._watch, args=(host, state), daemon=True, name=f"watch {host}").start()

    def failure(self) -> str | None:
        """Return which host is lost and why, None while all are there; to be called every second or so."""
        now = time.monotonic()
        for host, state in self._states.items():
            if state.restarted:
                return f"host {host} was restarted: the job's processes there are gone"
            silence = now - state.heard
            if silence < self._timeout - self._pause:
                state.suspected = None
            elif state.suspected is None:  # it may be this process that was held up, and has answers to read
                state.suspected = now
            elif silence >= self._timeout and now - state.suspected >= self._pause:
                reason = f" ({state.reason})" if state.reason else ""
                return f"host {host} has not answered for {silence:.0f} s{reason}"
        return None

    def stop(self) -> None:
        """Ask no more, and close the connections."""
        self._stopped.set()
        for state in self._states.values():
            if state.connection is not None:
                state.connection.kill()

    def _watch(self, host: str, state: _State) -> None:
        while not self._stopped.is_set():
            line = self._ssh.line(host, ANSWER, self._timeout)
            pipe = subprocess.PIPE
            with subprocess.Popen(line, bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe) as connection:
                state.connection = connection
                try:
                    self._converse(connection, state)
                    state.reason = last_line(connection.stderr.read() if connection.stderr else b"")
                finally:
                    connection.kill()
            self._stopped.wait(self._pause)

    def _converse(self, connection: subprocess.Popen[bytes], state: _State) -> None:
        """Ask over one connection until it ends."""
        assert connection.stdin is not None and connection.stdout is not None
        identity = connection.stdout.readline()
        if identity.endswith(b"\n"):
            state.restarted = state.restarted or state.identity not in (b"", identity)
            state.identity = identity
        answer = identity
        while answer and not self._stopped.is_set():
            state.heard = time.monotonic()
            self._stopped.wait(self._pause)
            try:
                connection.stdin.write(b"\n")
            except BrokenPipeError:
                return
            answer = connection.stdout.readline()


def keep_alive(timeout_seconds: float) -> tuple[str, ...]:
    """Return options of ssh that end a connection to a host that is silent for nearly as long."""
    return (f"-oServerAliveInterval={max(1, int(timeout_seconds / 4))}", "-oServerAliveCountMax=3")
