"""Submission: every path of a plan becomes a job, once, however often and from wherever this is called again."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pathswitch.atomic import write_text_atomic
from pathswitch.checkpoint import read_key
from pathswitch.config import PlanFile
from pathswitch.errors import ConfigError, RunError
from pathswitch.launch import slurm
from pathswitch.launch.agent import is_cancelled
from pathswitch.launch.agent_lock import no_locks
from pathswitch.launch.gate import OPEN, Gate, durable_step, open_gate
from pathswitch.launch.gatekeeper import release
from pathswitch.launch.journal import Journal
from pathswitch.launch.render import job_comment, job_files
from pathswitch.launch.spec import JobSpec, comment_prefix
from pathswitch.run_folder import PLAN_FILE, RunFolder

SETTLE_SECONDS = 60.0

Action = Literal["done", "queued", "submit", "hold", "refused"]


@dataclass(frozen=True)
class Step:
    """What submission does about one job."""

    spec: JobSpec
    action: Action
    job_id: str | None = None
    """Of the job that is queued or runs already."""
    reason: str | None = None
    """Why the branch may not start, or what it waits for."""


def read_ds_config(plan_file: PlanFile, base: Path) -> dict[str, Any] | None:
    """Return the content of the plan's [launch] ds_config, None where it has none.

    Raises:
        ConfigError: it cannot be read, or is not an object in JSON.
    """
    if plan_file.launch.ds_config is None:
        return None
    path = base / plan_file.launch.ds_config
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError("[launch] ds_config", given=str(path), allowed=f"a readable JSON file ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError("[launch] ds_config", given=str(path), allowed="a file with an object in JSON")
    return content


def rendered(specs: Sequence[JobSpec], ds_config: Mapping[str, Any] | None) -> dict[Path, str]:
    """Return the text of every file of all jobs by its place.

    Raises:
        ConfigError: something cannot be written down so that it arrives as it is.
    """
    return {path: text for spec in specs for path, text in job_files(spec, ds_config).items()}


def write_files(texts: Mapping[Path, str]) -> None:
    """Write files where they are not yet as they should be.

    Raises:
        RunError: one cannot be written.
    """
    for path, text in texts.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_text() != text:
                write_text_atomic(path, text)
        except OSError as error:
            raise RunError(f"{path}: cannot be written ({error.strerror})") from None


def plan_submission(specs: Sequence[JobSpec], *, on_slurm: bool, look_only: bool = False) -> list[Step]:
    """Return what is to be done about each job; a gate that can be opened is opened on the way.

    Args:
        specs: the jobs.
        on_slurm: whether SLURM has to be asked what waits or runs.
        look_only: change nothing: a branch whose fork has not been made yet waits.
    """
    live = _settled_jobs(specs[0], wait=not look_only) if on_slurm else {}
    return [_step(spec, live.get(job_comment(spec)), look_only) for spec in specs]


def _settled_jobs(spec: JobSpec, *, wait: bool) -> dict[str, slurm.SlurmJob]:
    """Return the live jobs of a run; those that are ending are waited for, as they may be queued again, or not."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        live = slurm.live_jobs(comment_prefix(spec.run, spec.paradigm))
        ending = any(job.state == "COMPLETING" for job in live.values())
        if not ending or not wait or time.monotonic() > deadline:
            return live
        time.sleep(1)


def _step(spec: JobSpec, job: slurm.SlurmJob | None, look_only: bool) -> Step:
    if spec.files.completed_step() >= spec.end_step:
        return Step(spec, "done")
    gate = gate_of(spec, look_only)
    if job is not None:
        ending = "it is being cancelled; submit again when it has ended" if is_cancelled(spec) else None
        return Step(spec, "queued", job.job_id, ending or gate.reason)
    if gate.state == "refused":
        return Step(spec, "refused", reason=gate.reason)
    return Step(spec, "submit" if gate.state == "open" else "hold", reason=gate.reason)


def gate_of(spec: JobSpec, look_only: bool = False) -> Gate:
    """Return whether a job may start; a gate that can be opened is opened, unless this is to change nothing."""
    run = RunFolder(Path(spec.run))
    if spec.start_step == 0 or durable_step(spec.files, spec.path) is not None:
        return OPEN
    waiting = Gate("waiting", f"until {spec.parent}@{spec.start_step}")
    if look_only or not (run.out / PLAN_FILE).is_file():
        return waiting
    path = run.plan().path(spec.path, spec.paradigm)
    return open_gate(run, path, read_key(spec.signing_key_file), "submit")


def submit_all(steps: Sequence[Step]) -> Iterator[Step]:
    """Submit what is to be submitted, and yield each job as it stands then.

    Raises:
        RunError: SLURM refuses a job; those before it are submitted.
    """
    job_ids: dict[str, str] = {}
    for step in steps:
        spec = step.spec
        if step.action in ("submit", "hold"):
            forget_cancellation(spec)
            after = None
            # A path that starts where its parent ends cannot start without it; a branch leaves before.
            if step.action == "hold" and spec.parent in job_ids and _starts_at_end(spec, steps):
                after = f"afterok:{job_ids[spec.parent]}"
            held = step.action == "hold"
            job_id = slurm.submit(spec.files.batch_script, job_comment(spec), held=held, after=after)
            Journal(Path(spec.run), spec.paradigm, spec.path).write("submitted", job_id)
            step = Step(spec, step.action, job_id, step.reason)
        if step.job_id is not None:
            job_ids[spec.path] = step.job_id
        # The parent may have come to the fork since: then nobody else would release the job.
        if step.job_id is not None and spec.parent is not None and gate_of(spec).state == "open":
            release(spec, [spec.path])
        yield step


def _starts_at_end(spec: JobSpec, steps: Sequence[Step]) -> bool:
    return any(step.spec.path == spec.parent and step.spec.end_step == spec.start_step for step in steps)


def forget_cancellation(spec: JobSpec) -> None:
    """Let a job start again that was cancelled."""
    if is_cancelled(spec):
        spec.files.stop.unlink(missing_ok=True)


@contextmanager
def only_submission(run: Path) -> Iterator[None]:
    """Hold the run's lock for submissions.

    Raises:
        RunError: another submission is at work, or the folder cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / "submit.lock").open("w")
    except OSError as error:
        raise RunError(f"--out {run}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(f"{run}: another `pathswitch submit` is at work on this run") from None
        except OSError as error:
            raise no_locks(run, error) from None
        yield
