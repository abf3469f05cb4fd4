"""Jobs without SLURM: this process starts an agent for each path as soon as it may start, and waits for all of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pathswitch.errors import RunError
from pathswitch.launch.agent import ASKED, COMPLETED
from pathswitch.launch.agent_lock import holder
from pathswitch.launch.failure import failure_reason
from pathswitch.launch.gate import durable_step
from pathswitch.launch.spec import JobSpec
from pathswitch.launch.submit import forget_cancellation, gate_of

POLL_SECONDS = 0.5


class ForegroundJobs:
    """The jobs of one run, up to ``parallel`` of them at a time, parents before children."""

    def __init__(self, specs: Sequence[JobSpec], parallel: int, tick: Callable[[], None]) -> None:
        self._waiting = [spec for spec in specs if spec.files.completed_step() < spec.end_step]
        self._parallel, self._tick = parallel, tick
        self._running: dict[str, tuple[JobSpec, subprocess.Popen[bytes], int]] = {}
        self._failed: dict[str, str] = {}
        self._asked = 0

    def run(self) -> None:
        """Train all paths to their ends.

        Raises:
            RunError: jobs have failed; the others have been seen to their ends.
            KeyboardInterrupt: this process was asked to end, and its jobs have saved and ended.
        """
        for spec in self._waiting:
            gate_of(spec)  # where the parent has ended, no agent of it opens the gate
            if holder(spec.files) is None:
                forget_cancellation(spec)
        with self._forwarded_signals():
            while self._waiting or self._running:
                self._start_due()
                if not self._running:
                    break
                self._tick()
                time.sleep(POLL_SECONDS)
                self._collect()
        self._tick()
        if self._asked:
            raise KeyboardInterrupt
        if self._failed or self._waiting:
            lines = [f"{path}: {reason}" for path, reason in self._failed.items()]
            lines += [f"{spec.path}: was not started: {_why_not(spec)}" for spec in self._waiting]
            raise RunError("not all paths are trained:\n  " + "\n  ".join(lines))

    def _start_due(self) -> None:
        for spec in list(self._waiting):
            may_start = spec.start_step == 0 or durable_step(spec.files, spec.path) is not None
            if may_start and len(self._running) < self._parallel and not self._asked:
                self._waiting.remove(spec)
                self._running[spec.path] = (spec, *_start_agent(spec))

    def _collect(self) -> None:
        for path, (spec, agent, log_start) in list(self._running.items()):
            code = agent.poll()
            if code is None:
                continue
            del self._running[path]
            if code == ASKED:
                self._failed[path] = "was asked to end; submit again to go on"
            elif code != COMPLETED:
                self._failed[path] = failure_reason(spec.files.log, log_start)

    @contextmanager
    def _forwarded_signals(self) -> Iterator[None]:
        """Hand SIGINT and SIGTERM on to the agents: asked once, jobs save and end; asked twice, they end."""

        def forward(signum: int, frame: FrameType | None) -> None:
            self._asked += 1
            for _, agent, _ in self._running.values():
                agent.send_signal(signal.SIGTERM)

        previous = {signum: signal.signal(signum, forward) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


def _why_not(spec: JobSpec) -> str:
    gate = gate_of(spec)
    return str(gate.reason) if gate.state == "refused" else f"there is no {spec.parent}@{spec.start_step}"


def _start_agent(spec: JobSpec) -> tuple[subprocess.Popen[bytes], int]:
    """Start the agent of a job, and return it with the length that its log has now."""
    log: Path = spec.files.log
    with log.open("ab") as output:
        start = output.tell()
        command = [sys.executable, "-P", "-u", "-m", "pathswitch.launch.agent", str(spec.files.job)]
        # A session of its own: Ctrl-C on the terminal is for this process, which hands it on.
        agent = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **spec.launch.env},
            start_new_session=True,
        )
    return agent, start
