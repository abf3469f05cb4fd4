"""Opens the gates of a path's branches while the path is being trained, beside its agent's other work."""

from __future__ import annotations

import threading
from pathlib import Path

from pathswitch.checkpoint import read_key
from pathswitch.errors import PathSwitchError, RunError
from pathswitch.launch import slurm
from pathswitch.launch.gate import fork_source, is_open, open_gate
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import JobSpec, comment_prefix
from pathswitch.run_folder import PLAN_FILE, RunFolder
from pathswitch.versions import Path as TrainingPath


class GateKeeper:
    """Looks for due forks of one path; a fork of a large checkpoint takes a while, so it has a thread of its own."""

    def __init__(self, spec: JobSpec, attempt: str) -> None:
        self._spec, self._attempt = spec, attempt
        self._run, self._key = RunFolder(Path(spec.run)), read_key(spec.signing_key_file)
        self._seen: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._refused: dict[str, str] = {}
        """The manifest that each branch was refused; only another one is tried."""
        self._released: set[str] = set()
        self._unheard = False
        """Whether SLURM did not answer, or said no, at the last look."""

    def poll(self) -> None:
        """Look for due forks if a checkpoint or the plan has changed since the last look; returns at once."""
        if self._thread is not None and self._thread.is_alive():
            return
        now = (_changed_at(self._spec.files.checkpoints), _changed_at(self._run.out / PLAN_FILE))
        if now != self._seen:
            self._seen = now
            self._thread = threading.Thread(target=self._open_all, daemon=True)
            self._thread.start()

    def finish(self, patience_seconds: float | None = None) -> bool:
        """Open what is due now, and return whether that is done, or else SLURM was away or the patience too short."""
        if self._thread is not None:
            self._thread.join(patience_seconds)
            if self._thread.is_alive():
                return False
        self._thread = threading.Thread(target=self._open_all, daemon=True)
        self._thread.start()
        self._thread.join(patience_seconds)
        return not self._thread.is_alive() and not self._unheard

    def children(self) -> list[TrainingPath]:
        """Return the paths that start from this one."""
        paths = self._run.plan().paths(self._spec.paradigm)
        return [path for path in paths if path.parent == self._spec.path and path.steps > 0]

    def cancel_waiting(self, reason: str, attempt: str) -> None:
        """Take the branches that wait for this path out of SLURM's queue: their forks will not come."""
        if self._spec.launch.kind != "slurm":
            return
        prefix = comment_prefix(self._spec.run, self._spec.paradigm)
        live = slurm.live_jobs(prefix)
        for path in self.children():
            job = live.get(prefix + path.name)
            if job is not None and job.is_held and not is_open(self._run, path):
                slurm.cancel(job.job_id)
                Journal(self._run.out, path.paradigm, path.name).write("cancelled", attempt, None, reason)

    def _open_all(self) -> None:
        self._unheard = False
        try:
            opened = [path for path in self.children() if path.name not in self._released and self._open(path)]
            if opened and self._spec.launch.kind == "slurm":
                release(self._spec, [path.name for path in opened])
            self._released |= {path.name for path in opened}
        except (PathSwitchError, OSError) as error:
            print(f"pathswitch: branches are not started: {error}", flush=True)
            self._unheard = isinstance(error, RunError)
            self._seen = None  # look again

    def _open(self, path: TrainingPath) -> bool:
        was_open = is_open(self._run, path)
        try:
            source = None if was_open else fork_source(self._run, path)
        except PathSwitchError:
            source = None
        digest = "" if source is None else source[1].digest
        if self._refused.get(path.name) == digest != "":
            return False
        gate = open_gate(self._run, path, self._key, self._attempt)
        if was_open:
            return True
        if gate.state == "refused":
            self._refused[path.name] = digest
        if gate.state != "waiting":
            state = "may start" if gate.state == "open" else f"is not started: {gate.reason}"
            print(f"pathswitch: {path.name} {state}", flush=True)
        return gate.state == "open"


def release(spec: JobSpec, names: list[str]) -> None:
    """Release the held jobs of some paths of a run; one that is not submitted yet is submitted without hold."""
    live = slurm.live_jobs(comment_prefix(spec.run, spec.paradigm))
    for name in names:
        job = live.get(comment_prefix(spec.run, spec.paradigm) + name)
        if job is not None and job.is_held:
            # A branch of the main path's end depends on its success; with one more version, that end has moved on.
            slurm.clear_dependency(job.job_id)
            slurm.release(job.job_id)
            print(f"pathswitch: released {name}, job {job.job_id}", flush=True)


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
