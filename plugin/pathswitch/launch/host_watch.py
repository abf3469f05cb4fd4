"""Whether the hosts of a job still answer: asked over and over, in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from pathswitch.errors import RunError
from pathswitch.launch.hosts import Ssh

# A host is lost when it has been silent for the whole time, and two questions in a row at least went unanswered: both
# fit in. An agent that was held up itself, or one lost packet, is no lost host.
PAUSE_SHARE, ANSWER_SHARE = 1 / 6, 1 / 4
MAX_PAUSE_SECONDS = 15.0
LOST_QUESTIONS = 2
# Changes with a restart of the machine, and of a container with an sshd of its own.
IDENTITY = ("sh", "-c", "cat /proc/sys/kernel/random/boot_id; cut -d' ' -f22 /proc/1/stat")


@dataclass
class _State:
    heard: float
    """When the host answered last, on the monotonic clock."""
    unanswered: int = 0
    reason: str = ""
    identity: str = ""
    restarted: bool = False


class HostWatch:
    """Asks each host whether it is there, and knows which one is lost; to be stopped in the end."""

    def __init__(self, hosts: Sequence[str], ssh: Ssh, timeout_seconds: float) -> None:
        self._ssh, self._timeout = ssh, timeout_seconds
        self._stopped = threading.Event()
        self._states = {host: _State(heard=time.monotonic()) for host in hosts}
        for host, state in self._states.items():
            threading.Thread(target=self._watch, args=(host, state), daemon=True, name=f"watch {host}").start()

    def failure(self) -> str | None:
        """Return which host is lost and why, None while all are there."""
        for host, state in self._states.items():
            if state.restarted:
                return f"host {host} was restarted: the job's processes there are gone"
            silence = time.monotonic() - state.heard
            if silence >= self._timeout and state.unanswered >= LOST_QUESTIONS:
                return f"host {host} has not answered for {silence:.0f} s ({state.reason})"
        return None

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def _watch(self, host: str, state: _State) -> None:
        while not self._stopped.is_set():
            try:
                identity = self._ssh.run(host, IDENTITY, timeout_seconds=self._timeout * ANSWER_SHARE)
            except RunError as error:
                state.reason, state.unanswered = str(error), state.unanswered + 1
            else:
                state.heard, state.unanswered = time.monotonic(), 0
                state.restarted = state.restarted or state.identity not in ("", identity)
                state.identity = identity
            self._stopped.wait(min(MAX_PAUSE_SECONDS, self._timeout * PAUSE_SHARE))
