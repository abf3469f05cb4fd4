"""``pathswitch submit``, ``status`` and ``cancel``: what they ask, and what they print."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pathswitch.cli.prepare import prepare_run
from pathswitch.cli.run_checkpoints import say
from pathswitch.config import PlanFile
from pathswitch.errors import ConfigError, RunError, choices
from pathswitch.launch.cancel import cancel_jobs
from pathswitch.launch.estimate import estimates, totals
from pathswitch.launch.foreground import ForegroundJobs
from pathswitch.launch.hostfile import HostfileLauncher
from pathswitch.launch.paradigm import require_trainable
from pathswitch.launch.render import job_files
from pathswitch.launch.spec import JobSpec, job_specs
from pathswitch.launch.status import PathStatus, run_status, submitted_specs
from pathswitch.launch.submit import (
    Step,
    only_submission,
    plan_submission,
    read_ds_config,
    submit_all,
    write_job_files,
)
from pathswitch.run_folder import RunFolder
from pathswitch.versions import Paradigm

WATCH_SECONDS = 2.0
LINE_SECONDS = 30.0


def submit_plan(
    plan_path: Path, plan_file: PlanFile, out: Path, paradigm: Paradigm, *, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Show what a submission starts, ask where somebody is there to answer, and do it.

    Raises:
        PathSwitchError: the plan cannot be launched as it stands; nothing has been started then.
    """
    console, base = Console(), plan_path.absolute().parent
    ds_config = read_ds_config(plan_file, base)
    specs = job_specs(plan_file, base, out, paradigm, ds_config)
    if any(spec.embedded for spec in specs):
        require_trainable(plan_file)
    for spec in specs:
        if spec.launch.kind == "hostfile":
            HostfileLauncher(spec)  # raises where the hostfile does not have what the job needs
    on_slurm = plan_file.launch.kind == "slurm"
    try:
        steps = plan_submission(specs, on_slurm=on_slurm, look_only=True)
    except RunError as error:
        if not dry_run:
            raise
        print(f"pathswitch: what waits or runs already is not shown: {error}", file=sys.stderr)
        steps = plan_submission(specs, on_slurm=False, look_only=True)
    if as_json:
        texts = {str(path): text for spec in specs for path, text in job_files(spec, ds_config).items()}
        print(json.dumps({**submission_json(plan_file, steps), "files": texts}, indent=1))
    else:
        console.print(submission_table(plan_file, steps))
    if dry_run or not _is_agreed(steps, yes):
        return
    with only_submission(out):
        if any(spec.embedded for spec in specs):
            prepare_run(plan_file, base, out, paradigm)
        else:
            RunFolder(out).open(plan_file)
        write_job_files(specs, ds_config)
        if on_slurm:
            for step in submit_all(plan_submission(specs, on_slurm=True)):
                say(console, f"{step.spec.path}: {_outcome(step)}")
            return
    _run_here(specs, plan_file.launch.parallel, out, console)


def _is_agreed(steps: Sequence[Step], yes: bool) -> bool:
    new = sum(step.action in ("submit", "hold") for step in steps)
    if yes or new == 0 or not sys.stdin.isatty():
        return True
    return typer.confirm(f"Submit {new} job{'s' if new > 1 else ''}?")


def _outcome(step: Step) -> str:
    if step.action == "done":
        return "trained to its end already"
    if step.action == "refused":
        return f"not submitted: {step.reason}"
    said = {"queued": "is there already", "submit": "submitted", "hold": "submitted, held"}[step.action]
    return f"job {step.job_id} {said}" + (f" ({step.reason})" if step.reason else "")


def _run_here(specs: Sequence[JobSpec], parallel: int, out: Path, console: Console) -> None:
    """Run the jobs from here: a table that follows them on a terminal, a line for each now and then in a log."""
    shown_at = 0.0
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def tick() -> None:
            nonlocal shown_at
            every = WATCH_SECONDS if console.is_terminal else LINE_SECONDS
            if time.monotonic() - shown_at < every:
                return
            shown_at = time.monotonic()
            rows = run_status(out)
            if console.is_terminal:
                live.update(status_table(rows), refresh=True)
            else:
                for row in rows:
                    say(console, _status_line(row))

        try:
            ForegroundJobs(specs, parallel, tick).run()
        except KeyboardInterrupt:
            print("pathswitch: the jobs have saved and ended; submit again to go on", file=sys.stderr)
            raise typer.Exit(130) from None
    console.print(status_table(run_status(out)))


def submission_json(plan_file: PlanFile, steps: Sequence[Step]) -> dict[str, Any]:
    """Return a submission as JSON values: ``jobs`` and ``gpu_hours``, with null where a step's time is not known."""
    specs, given = [step.spec for step in steps], plan_file.launch.seconds_per_step
    by_path, total = estimates(specs, given), totals(plan_file, specs, given)
    jobs = [
        {
            "path": step.spec.path,
            "action": step.action,
            "job": step.job_id,
            "reason": step.reason,
            "nodes": step.spec.nodes,
            "gpus_per_node": step.spec.gpus_per_node,
            "start_step": step.spec.start_step,
            "end_step": step.spec.end_step,
            "hours": found.hours if (found := by_path.get(step.spec.path)) else None,
            "gpu_hours": found.gpu_hours if found else None,
            "segments": found.segments if found else None,
        }
        for step in steps
    ]
    hours = {"path_switching": None, "ptfs": None, "cpt": None} if total is None else vars(total)
    return {"jobs": jobs, "gpu_hours": hours}


def submission_table(plan_file: PlanFile, steps: Sequence[Step]) -> Group:
    """Return the table of a submission's jobs, and what all of them cost beside the other paradigms."""
    content = submission_json(plan_file, steps)
    table = Table("path", "nodes x GPUs", "steps", "hours", "segments", "GPU-hours", "now", box=None, pad_edge=False)
    for job in content["jobs"]:
        now = job["action"] + (f" as {job['job']}" if job["job"] else "")
        now += f", {job['reason']}" if job["reason"] else ""
        table.add_row(
            job["path"],
            f"{job['nodes']} x {job['gpus_per_node']}",
            f"{job['start_step']:,} - {job['end_step']:,}",
            _number(job["hours"], ".2f"),
            _number(job["segments"], "d"),
            _number(job["gpu_hours"], ",.1f"),
            Text(now),
        )
    hours = content["gpu_hours"]
    if hours["ptfs"] is None:
        note = "No step's time is known: give [launch] seconds_per_step, or submit again when steps have been measured."
        return Group(table, Text(note))
    share = f"{hours['path_switching'] / hours['ptfs']:.1%} of pre-training from scratch" if hours["ptfs"] else ""
    lines = [
        f"GPU-hours: {hours['path_switching']:,.1f} ({share})",
        f"           {hours['ptfs']:,.1f} by pre-training from scratch, {hours['cpt']:,.1f} by continual pre-training",
    ]
    return Group(table, *map(Text, lines))


def show_status(run: Path, *, watch: bool, as_json: bool) -> None:
    """Print where a run's jobs stand; with ``watch``, again and again until all have ended."""
    console = Console()
    rows = run_status(run)
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
        return
    if not watch:
        console.print(status_table(rows))
        return
    with Live(status_table(rows), console=console, auto_refresh=False) as live:
        while any(row.state not in ("done", "cancelled", "gave up", "refused") for row in rows):
            time.sleep(WATCH_SECONDS)
            rows = run_status(run)
            live.update(status_table(rows), refresh=True)


def status_table(rows: Sequence[PathStatus]) -> Group:
    """Return the table of a run's paths, with the columns that have something to say, and the reasons below."""
    columns: dict[str, list[str]] = {
        "path": [row.path for row in rows],
        "state": [row.state for row in rows],
        "job": [row.job or "" for row in rows],
        "step": [f"{row.step:,}/{row.end_step:,}" for row in rows],
        "LR": [f"{row.lr:.2e}" for row in rows],
        "loss": [_number(row.loss, ".3f") for row in rows],
        "tokens/s": [_number(row.tokens_per_s, ",.0f") for row in rows],
        "saved": [_number(row.durable_step, ",d") for row in rows],
        "restarts": [str(row.restarts or "") for row in rows],
        "left": ["" if row.eta_seconds is None else str(timedelta(seconds=round(row.eta_seconds))) for row in rows],
        "next fork": [row.next_fork or "" for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(cell.strip("-") for cell in cells)}
    table = Table(*shown, box=None, pad_edge=False)
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, cells))
    reasons = [Text(f"{row.path}: {row.reason}") for row in rows if row.reason]
    return Group(table, *reasons)


def cancel_run(run: Path, path: str | None, *, now: bool) -> None:
    """End a run's jobs, or one path's; those that run save first."""
    specs = submitted_specs(run)
    if path is not None:
        names = [spec.path for spec in specs]
        if path not in names:
            raise ConfigError("PATH", given=path, allowed=choices(names, path))
        specs = [spec for spec in specs if spec.path == path]
    for line in cancel_jobs(specs, now=now):
        say(Console(), line)


def _status_line(row: PathStatus) -> str:
    details = [f"step {row.step} of {row.end_step}", f"lr {row.lr:.2e}"]
    details += [f"loss {row.loss:.3f}"] if row.loss is not None else []
    details += [row.reason] if row.reason else []
    return f"{row.path}: {row.state}, {', '.join(details)}"


def _number(value: float | int | None, form: str) -> str:
    return "-" if value is None else format(value, form)
