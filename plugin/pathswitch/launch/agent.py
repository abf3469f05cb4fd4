"""The agent of one job: starts its ranks, asks them to save and end, starts them again, and lets branches begin.

``python -m pathswitch.launch.agent JOB.json``. Under SLURM it stands in the batch script's place, where SLURM's signals
reach it; elsewhere `pathswitch submit` starts it. Its exit codes: 0, the path is trained to its end, or the job is
queued again; 1, it gave up; 3, it was asked to end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from pathswitch.atomic import write_text_atomic
from pathswitch.checkpoint import read_key
from pathswitch.errors import PathSwitchError, RunError
from pathswitch.launch import slurm
from pathswitch.launch.agent_lock import only_agent
from pathswitch.launch.failure import failure_reason, is_refusal
from pathswitch.launch.gate import durable_step, open_gate
from pathswitch.launch.gatekeeper import GateKeeper
from pathswitch.launch.journal import Journal
from pathswitch.launch.launcher import Launcher, launcher_of
from pathswitch.launch.local import end_group
from pathswitch.launch.render import job_comment
from pathswitch.launch.spec import JobSpec, load_spec
from pathswitch.run_folder import RunFolder

POLL_SECONDS = 0.5
ASK_AGAIN_SECONDS = 10.0
REQUEUE_SECONDS, LOCK_SECONDS, GATES_SECONDS = 120.0, 60.0, 600.0
# Of the time between a job's signal and its end: for the ranks to save, and to open gates before it is requeued.
SAVE_SHARE, GATE_SHARE = 0.8, 0.1
CANCELLED = "cancelled"
COMPLETED, GAVE_UP, ASKED = 0, 1, 3

# unsaved: asked, and not saved in time.
Ended = Literal["completed", "stopped", "unsaved", "cancelled", "failed"]


@dataclass
class _Request:
    """The wish that the ranks save and end."""

    reason: str
    deadline: float
    """When they are ended without having saved (monotonic time)."""
    asked_at: float = -ASK_AGAIN_SECONDS


class Agent:
    """Sees one job through."""

    def __init__(self, job_file: Path) -> None:
        self._job_file = job_file
        self.spec = load_spec(job_file)
        self._run = RunFolder(Path(self.spec.run))
        self._journal = Journal(self._run.out, self.spec.paradigm, self.spec.path)
        self._slurm_job = os.environ.get("SLURM_JOB_ID") if self.spec.launch.kind == "slurm" else None
        self._starts = int(os.environ.get("SLURM_RESTART_COUNT", "0")) if self._slurm_job else 0
        self._signals: list[str] = []
        self._is_requeued = False
        self._gates = GateKeeper(self.spec, self._attempt)

    @property
    def _attempt(self) -> str:
        name = self._slurm_job or f"{socket.gethostname()}-{os.getpid()}"
        return f"{name}.{self._starts}"

    def run(self) -> int:
        """Train the path to its end, as often as that takes; return the exit code."""
        for name in {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", self.spec.launch.signal}:
            signal.signal(signal.Signals[name], self._note)
        # An earlier one may still be ending, on a node that SLURM has given up.
        with only_agent(self.spec.files, LOCK_SECONDS if self._slurm_job else 1.0):
            code = self._see_through()
        if self._is_requeued:
            time.sleep(REQUEUE_SECONDS)  # SLURM ends this script
        return code

    def _see_through(self) -> int:
        while not self._is_done():
            code = self._start()
            if code is not None:
                return code
        self._journal.write("completed", self._attempt, self.spec.end_step)
        self._say(f"trained to its end, step {self.spec.end_step}")
        return COMPLETED

    def _is_done(self) -> bool:
        """Return whether the path is trained to its end, with all gates open that this opens."""
        if self._is_complete():
            # A controller that is away would not hear of this job's end either: nothing is lost by waiting for it.
            deadline = time.monotonic() + GATES_SECONDS
            while not self._gates.finish() and not self._signals and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        self.spec = load_spec(self._job_file)  # a version may have been added meanwhile
        return self._is_complete()

    def _durable_step(self) -> int:
        return durable_step(self.spec.files, self.spec.path) or 0

    def _is_complete(self) -> bool:
        """Return whether the path is trained to its end; a user's script proves it by its last checkpoint."""
        spec = self.spec
        if spec.files.completed_step() >= spec.end_step:
            return True
        if spec.embedded or self._durable_step() < spec.end_step:
            return False
        record: dict[str, str | int] = {"paradigm": spec.paradigm, "path": spec.path}
        record |= {"start_step": spec.start_step, "end_step": spec.end_step}
        write_text_atomic(spec.files.completion, json.dumps(record, indent=1) + "\n")
        return True

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._signals.append(signal.Signals(signum).name)

    def _start(self) -> int | None:
        """Start the ranks once and see them end; return the agent's exit code, None to look again."""
        spec = self.spec
        if is_cancelled(spec):
            return self._end_asked("cancelled", self._stop_reason(), self._durable_step())
        spec.files.stop.unlink(missing_ok=True)
        path = self._run.plan().path(spec.path, spec.paradigm)
        gate = open_gate(self._run, path, read_key(spec.signing_key_file), self._attempt)
        if gate.state != "open":
            return self._give_up(f"may not start: {gate.reason}", spec.start_step)
        if self._signals:
            return self._end_asked("stopped", self._signal_reason(), self._durable_step())
        step = self._durable_step()
        fruitless = self._journal.fruitless_starts(step)
        if fruitless > spec.launch.restart_budget:
            return self._give_up(f"{fruitless} starts in a row have saved nothing beyond step {step}", step)
        self._journal.write("started", self._attempt, step)
        self._say(f"start {self._attempt} at step {step}")
        log_start = spec.files.log.stat().st_size if spec.files.log.is_file() else 0
        try:
            ended, reason = self._train(step, log_start)
        except RunError as error:  # it could not be started: a host does not answer
            ended, reason = "failed", str(error)
        except PathSwitchError as error:
            return self._give_up(str(error), step)
        now = self._durable_step()
        if ended == "failed" and now == step and is_refusal(spec.files.log, log_start):
            return self._give_up(reason, now)
        if ended == "failed":
            self._journal.write("failed", self._attempt, now, reason)
            self._say(f"failed at step {now}: {reason}")
            return self._again()
        if ended == "completed":
            return None
        return self._end_asked(ended, reason, now)

    def _end_asked(self, ended: Ended, reason: str, step: int) -> int | None:
        # It counts as a failure: a limit that is too short for a save would be met again and again.
        self._journal.write("failed" if ended == "unsaved" else ended, self._attempt, step, reason)
        self._say(f"{ended} at step {step}: {reason}")
        # SLURM itself requeues a job that it preempts.
        if ended in ("stopped", "unsaved") and self._slurm_job and self._signals[:1] != ["SIGTERM"]:
            return self._again()
        return ASKED

    def _again(self) -> int | None:
        """Have the job started again: by SLURM, or by this agent."""
        if self._slurm_job is None:
            self._starts += 1
            self._gates = GateKeeper(self.spec, self._attempt)
            return None
        self._gates.finish(GATE_SHARE * self.spec.launch.signal_seconds)  # what is not open then, the next start opens
        try:
            slurm.requeue(self._slurm_job)
        except RunError as error:
            self._say(f"cannot be requeued ({error}): submitting a job that follows")
            after = f"afterany:{self._slurm_job}"
            script, comment = self.spec.files.batch_script, job_comment(self.spec)
            job_id = slurm.submit(script, comment, after=after, prefix="SLURM_JOB_")
            self._journal.write("submitted", job_id)
            return COMPLETED
        self._is_requeued = True
        return COMPLETED

    def _give_up(self, reason: str, step: int) -> int:
        self._journal.write("gave up", self._attempt, step, reason)
        self._say(f"gave up: {reason}")
        self._gates.finish()
        self._gates.cancel_waiting(f"{self.spec.path} gave up: {reason}", self._attempt)
        return GAVE_UP

    def _train(self, step: int, log_start: int) -> tuple[Ended, str]:
        """Run the ranks until they end; return how, and why."""
        spec = self.spec
        launcher = launcher_of(spec, self._slurm_job)
        try:
            command = launcher.command(spec.command_from(step))
        except RunError as error:  # a host is not there
            return ("stopped" if self._signals else "failed"), str(error)
        environment = {**os.environ, **launcher.environment(), **spec.environment()}
        try:
            process = subprocess.Popen(
                command, cwd=spec.working_folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True
            )
        except OSError as error:
            raise RunError(f"{command[0]} cannot be started in {spec.working_folder}: {error.strerror}") from None
        request: _Request | None = None
        failure: str | None = None
        try:
            while process.poll() is None and failure is None:
                self._gates.poll()
                request = self._requested(request)
                if request is not None:
                    failure = _ask(launcher, request)
                failure = failure or launcher.failure()
                _wait(process)
        finally:
            end_group(process, 0 if failure else None)
            for line in launcher.end():
                self._say(line)
        request = self._requested(request)  # the ranks may have seen it first
        cancelled = is_cancelled(spec)
        if not cancelled:
            spec.files.stop.unlink(missing_ok=True)
        return self._how_it_ended(process.returncode, request, failure, cancelled, step, log_start)

    def _how_it_ended(
        self,
        code: int,
        request: _Request | None,
        failure: str | None,
        cancelled: bool,
        step: int,
        log_start: int,
    ) -> tuple[Ended, str]:
        if self._is_complete():
            return "completed", ""
        now, why = self._durable_step(), f"exit code {code}: {failure_reason(self.spec.files.log, log_start)}"
        if request is not None:
            near = self._slurm_job is not None and self._signals[:1] == [self.spec.launch.signal]
            nothing_new = "no new checkpoint" if near and now == step else ""
            trouble = failure or (why if code and now == step else nothing_new)
            reason = f"{request.reason}; {trouble}" if trouble else request.reason
            return ("cancelled" if cancelled else "unsaved" if nothing_new else "stopped"), reason
        if failure is not None:
            return "failed", failure
        if self._slurm_job is not None and slurm.is_preempted(self._slurm_job):
            return "stopped", "SLURM takes its nodes for another job"
        if code == 0 and now > step and any(part.end_step == now for part in self.spec.parts):
            return "completed", ""  # a part of the path; the next has a command of its own
        if code == 0 and now > step:
            return "stopped", "the ranks saved and ended by themselves"  # a signal that reached them alone
        return "failed", why

    def _requested(self, request: _Request | None) -> _Request | None:
        """Return what the ranks are asked for, after a look at signals and the stop file."""
        spec, now = self.spec, time.monotonic()
        if request is None and is_cancelled(spec):
            request = _Request(self._stop_reason(), now + spec.launch.signal_seconds)
        elif request is None and self._signals:
            request = _Request(self._signal_reason(), now + SAVE_SHARE * spec.launch.signal_seconds)
            try:
                write_text_atomic(spec.files.stop, self._signal_reason() + "\n")
            except OSError as error:  # the disk may be full; the signal may reach the ranks all the same
                self._say(f"{spec.files.stop} cannot be written: {error.strerror}")
        if request is not None and self._slurm_job is None and len(self._signals) > 1:
            request.deadline = now  # asked twice: at once
        return request

    def _signal_reason(self) -> str:
        name = self._signals[0]
        near = name == self.spec.launch.signal and self._slurm_job is not None
        return f"{name}: the time is nearly up" if near else f"{name} received"

    def _stop_reason(self) -> str:
        return self.spec.files.stop.read_text().strip()

    def _say(self, text: str) -> None:
        print(f"pathswitch: {self.spec.path}: {text}", flush=True)


def _ask(launcher: Launcher, request: _Request) -> str | None:
    """Ask the ranks again and again, as a signal may come before they listen; return why they are given up."""
    now = time.monotonic()
    if now >= request.deadline:
        return "the ranks did not save and end in time"
    if now >= request.asked_at + ASK_AGAIN_SECONDS:
        request.asked_at = now
        launcher.ask_to_stop()
    return None


def _wait(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return


def is_cancelled(spec: JobSpec) -> bool:
    """Return whether `pathswitch cancel` has asked the job to end."""
    try:
        return spec.files.stop.read_text().startswith(CANCELLED)
    except FileNotFoundError:
        return False


def main() -> int:
    """Run the agent of the job that the argument names."""
    try:
        return Agent(Path(sys.argv[1])).run()
    except PathSwitchError as error:
        print(f"pathswitch: error: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
