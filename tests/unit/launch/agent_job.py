"""A job whose agent runs in a process of its own, with bash scripts as its ranks."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fake_slurm import FakeSlurm
from launch_jobs import commit

from pathswitch.launch import agent as agent_module
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import JobSpec
from pathswitch.launch.status import run_status
from pathswitch.run_folder import PathFolder

PATIENCE_SECONDS = 120
WAIT_FOR_STOP = 'until [ -e "$PATHSWITCH_STOP_FILE" ]; do sleep 0.02; done'


class Ranks:
    """A launcher of bash scripts, one after the other, which notes what it is asked for.

    ``save N`` in a script commits checkpoint N, which lies ready, as a rank does: by renaming it.
    """

    def __init__(self, folder: Path, *scripts: str) -> None:
        self.folder, self.scripts = folder, scripts
        self.started = 0

    def command(self, training: Sequence[str]) -> list[str]:
        script = self.scripts[min(self.started, len(self.scripts) - 1)]
        self.started += 1
        self.note(f"start {' '.join(training)}")
        save = f'save() {{ mkdir -p "$CKPT"; mv {self.folder}/ready/global_step$1 "$CKPT/"; }}'
        # Nothing outlives the agent, and so the test, but what says so by an exec.
        tied = [] if script.startswith("exec ") else ["setpriv", "--pdeathsig", "KILL"]
        return [*tied, "bash", "-c", f"{save}\n{script}"]

    def environment(self) -> dict[str, str]:
        return {"CKPT": str(Path(os.environ["CKPT"])), "NOTES": str(self.folder / "notes")}

    def ask_to_stop(self) -> None:
        self.note("asked")

    def failure(self) -> str | None:
        file = self.folder / "failure"
        return file.read_text() if file.exists() else None

    def end(self) -> list[str]:
        self.note("ended")
        return ["host hB: pid 7 outlived the launcher"]

    def note(self, line: str) -> None:
        with (self.folder / "notes").open("a") as notes:
            notes.write(line + "\n")

    def notes(self) -> list[str]:
        file = self.folder / "notes"
        return file.read_text().splitlines() if file.exists() else []


class Job:
    """A job whose agent runs in a process of its own."""

    def __init__(self, spec: JobSpec, folder: Path) -> None:
        self.spec, self.folder = spec, folder
        self.ranks = Ranks(folder)
        self.process: multiprocessing.process.BaseProcess | None = None

    @property
    def files(self) -> PathFolder:
        return self.spec.files

    def ready(self, *steps: int, **changes: Any) -> None:
        """Have checkpoints lie ready to be committed."""
        for step in steps:
            commit(self.spec, step, folder=self.folder / "ready", **changes)

    def start(self, *scripts: str, **environ: str) -> None:
        self.ranks = Ranks(self.folder, *scripts)
        self.process = multiprocessing.get_context("fork").Process(target=self._run, args=(environ,))
        self.process.start()

    def close(self) -> None:
        """End the agent, whatever it does."""
        if self.process is not None and self.process.is_alive():
            self.process.kill()

    def end(self) -> int:
        """Wait for the agent to end and return its exit code."""
        assert self.process is not None
        self.process.join(PATIENCE_SECONDS)
        assert self.process.exitcode is not None, self.log()
        return self.process.exitcode

    def run(self, *scripts: str, **environ: str) -> int:
        self.start(*scripts, **environ)
        return self.end()

    def signal(self, signum: signal.Signals) -> None:
        assert self.process is not None and self.process.pid is not None
        os.kill(self.process.pid, signum)

    def _run(self, environ: dict[str, str]) -> None:
        os.environ.update(environ, CKPT=str(self.files.checkpoints))
        reader, writer = os.pipe()
        os.write(writer, b"not for the ranks")
        os.close(writer)
        os.dup2(reader, 0)
        log = os.open(self.files.log, os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        sys.exit(agent_module.main())

    def log(self) -> str:
        return self.files.log.read_text() if self.files.log.exists() else ""

    def events(self) -> list[tuple[str, int | None]]:
        read = Journal(Path(self.spec.run), self.spec.paradigm, self.spec.path).read()
        return [(event.record.event, event.record.step) for event in read if event.record.event != "submitted"]

    def reasons(self) -> list[str]:
        read = Journal(Path(self.spec.run), self.spec.paradigm, self.spec.path).read()
        return [event.record.reason for event in read if event.record.reason]

    def status(self) -> tuple[str, str | None]:
        row = next(row for row in run_status(Path(self.spec.run)) if row.path == self.spec.path)
        return row.state, row.reason


def requeued(slurm: FakeSlurm) -> bool:
    """Return whether the main path's job has been put back into the queue."""
    return ["scontrol", "requeue", slurm.jobs["main"]["id"]] in slurm.calls()
