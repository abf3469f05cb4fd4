"""Where the jobs of a run stand: from its ledger, its paths' files, and SLURM's queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pathswitch.config import PlanFile
from pathswitch.errors import RunError
from pathswitch.launch import slurm
from pathswitch.launch.agent_lock import holder
from pathswitch.launch.estimate import median_seconds, newest_updates
from pathswitch.launch.gate import durable_step
from pathswitch.launch.journal import Event, events_by_path
from pathswitch.launch.spec import JobSpec, comment_prefix, load_spec
from pathswitch.run_folder import PathFolder, RunFolder
from pathswitch.versions import PARADIGMS, Plan
from pathswitch.versions import Path as TrainingPath
from pathswitch.versions.ledger import run_ledger


@dataclass(frozen=True)
class PathStatus:
    """One path's job."""

    paradigm: str
    path: str
    state: str
    """done, running, queued, held, refused, cancelled, gave up, stopped, failed, waiting, or not submitted."""
    job: str | None
    """SLURM's id, or the agent's process."""
    step: int
    start_step: int
    end_step: int
    lr: float
    """Of the next update."""
    loss: float | None
    tokens_per_s: float | None
    durable_step: int | None
    """Of the newest committed checkpoint."""
    restarts: int
    eta_seconds: float | None
    next_fork: str | None
    """The next branch that leaves this path, as ``name@step``."""
    reason: str | None
    """Why it stands where it stands, where that is not its plain course."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Seen:
    """What is looked at once for all paths."""

    plan_file: PlanFile
    plan: Plan
    events: Mapping[tuple[str, str], list[Event]]
    queue: Mapping[str, slurm.SlurmJob]


def run_status(run: Path) -> list[PathStatus]:
    """Return where every path stands that has a job in the run.

    Raises:
        RunError: nothing was submitted in this folder.
    """
    folder = RunFolder(run)
    specs = submitted_specs(run)
    queue: dict[str, slurm.SlurmJob] = {}
    for prefix in {comment_prefix(spec.run, spec.paradigm) for spec in specs if spec.launch.kind == "slurm"}:
        queue |= slurm.live_jobs(prefix)
    events = events_by_path(run_ledger(run).read().records)
    seen = _Seen(folder.plan_file(), folder.plan(), events, queue)
    return [_path_status(seen, spec) for spec in specs]


def submitted_specs(run: Path) -> list[JobSpec]:
    """Return the jobs that `submit` has written in a run folder, as the plan orders them.

    Raises:
        RunError: there are none.
    """
    plan = RunFolder(run).plan() if (run / "plan.toml").is_file() else None
    specs = []
    for paradigm in PARADIGMS if plan else ():
        for path in plan.paths(paradigm) if plan else ():
            job_file = PathFolder(run / paradigm / path.name).job
            if job_file.is_file():
                specs.append(load_spec(job_file))
    if not specs:
        raise RunError(f"{run}: no jobs were submitted here; `pathswitch submit PLAN.toml --out {run}` does it")
    return specs


def _path_status(seen: _Seen, spec: JobSpec) -> PathStatus:
    path = seen.plan.path(spec.path, spec.paradigm)
    durable = durable_step(spec.files, spec.path)
    updates = newest_updates(spec.files)
    newest = updates[-1] if updates else {}
    step = min(max(int(newest.get("step", 0)), durable or 0, path.start_step), spec.end_step)
    events = seen.events.get((spec.paradigm, spec.path), [])
    state, job, reason = _state(seen, spec, events)
    seconds = median_seconds(updates)
    tokens_per_step = seen.plan_file.tokens_per_step
    running = state == "running"
    return PathStatus(
        paradigm=spec.paradigm,
        path=spec.path,
        state=state,
        job=job,
        step=step,
        start_step=spec.start_step,
        end_step=spec.end_step,
        lr=path.lr(step),
        loss=newest.get("loss"),
        tokens_per_s=tokens_per_step / seconds if running and seconds and tokens_per_step else None,
        durable_step=durable,
        restarts=max(0, sum(event.record.event == "started" for event in events) - 1),
        eta_seconds=(spec.end_step - step) * seconds if running and seconds else None,
        next_fork=_next_fork(seen.plan, path, step),
        reason=reason,
    )


def _state(seen: _Seen, spec: JobSpec, events: list[Event]) -> tuple[str, str | None, str | None]:
    """Return the state, the job, and the reason."""
    if spec.files.completed_step() >= spec.end_step:
        return "done", None, None
    last = events[-1].record if events else None
    refusal = last.reason if last is not None and last.event == "refused" else None
    job = seen.queue.get(comment_prefix(spec.run, spec.paradigm) + spec.path)
    if job is not None:
        if job.is_held:
            return ("refused" if refusal else "held"), job.job_id, refusal or _waits_for(spec)
        if job.state == "PENDING":
            return "queued", job.job_id, job.reason
        return job.state.lower(), job.job_id, f"on {job.node_list}" if job.node_list else None
    if spec.launch.kind != "slurm" and (agent := holder(spec.files)) is not None:
        return "running", agent, None
    if last is None:
        waits = spec.start_step > 0 and durable_step(spec.files, spec.path) is None
        return ("waiting", None, _waits_for(spec)) if waits else ("not submitted", None, None)
    if last.event == "completed":
        grown = f"trained to {last.step}, and the plan goes on to {spec.end_step}; submit again"
        return "stopped", None, grown
    submitted = any(event.record.event == "submitted" for event in events)
    unsaid = {"started": "lost", "submitted": "lost", "opened": "lost" if submitted else "not submitted"}
    ended = unsaid.get(last.event, last.event)
    reason = "its job is gone, and has not said why; submit again" if ended == "lost" else last.reason
    return ended, None, reason


def _waits_for(spec: JobSpec) -> str:
    return f"waits for {spec.parent}@{spec.start_step}"


def _next_fork(plan: Plan, path: TrainingPath, step: int) -> str | None:
    forks = [child for child in plan.paths(path.paradigm) if child.parent == path.name and child.start_step > step]
    first = min(forks, key=lambda child: child.start_step, default=None)
    return None if first is None else f"{first.name}@{first.start_step}"
