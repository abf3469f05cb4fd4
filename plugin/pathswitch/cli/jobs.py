"""``pathswitch submit``, ``status`` and ``cancel``: what they ask, and what they print."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.prompt import Confirm
from rich.table import Table
from rich.text import Text

from pathswitch.cli.job_tables import status_line, status_table, submission_json, submission_table
from pathswitch.cli.prepare import prepare_run
from pathswitch.cli.run_checkpoints import say
from pathswitch.config import PlanFile
from pathswitch.errors import ConfigError, RunError, choices
from pathswitch.launch.cancel import cancel_jobs
from pathswitch.launch.foreground import ForegroundJobs
from pathswitch.launch.hostfile import HostfileLauncher
from pathswitch.launch.paradigm import require_trainable
from pathswitch.launch.spec import JobSpec, job_specs
from pathswitch.launch.status import PathStatus, run_status, submitted_specs
from pathswitch.launch.submit import (
    Step,
    only_submission,
    plan_submission,
    read_ds_config,
    rendered,
    submit_all,
    write_files,
)
from pathswitch.run_folder import RunFolder
from pathswitch.versions import Paradigm

WATCH_SECONDS = 2.0
LINE_SECONDS = 30.0
LOG_COLUMNS = 200
NOT_ALL, INTERRUPTED = 1, 130


def submit_plan(
    plan_path: Path, plan_file: PlanFile, out: Path, paradigm: Paradigm, *, dry_run: bool, yes: bool, as_json: bool
) -> int:
    """Show what a submission starts, ask where somebody is there to answer, do it, and return the exit code.

    Raises:
        PathSwitchError: the plan cannot be launched as it stands; nothing has been started then.
    """
    console, base = _console(stderr=as_json), plan_path.absolute().parent
    ds_config = read_ds_config(plan_file, base)
    specs = job_specs(plan_file, base, out, paradigm, ds_config)
    embedded, on_slurm = any(spec.embedded for spec in specs), plan_file.launch.kind == "slurm"
    if embedded:
        require_trainable(plan_file)
    for spec in specs:
        if spec.launch.kind == "hostfile":
            HostfileLauncher(spec)  # raises where the hostfile does not have what the job needs
    files = rendered(specs, ds_config)
    steps = _planned(specs, on_slurm=on_slurm, dry_run=dry_run)
    content = submission_json(plan_file, steps)
    _show(console, *submission_table(content, on_slurm=on_slurm))
    if not dry_run and not _is_agreed(console, steps, yes):
        return NOT_ALL
    if not dry_run:
        with only_submission(out):
            if embedded:
                prepare_run(plan_file, base, out, paradigm, console)
            else:
                RunFolder(out).open(plan_file)
            write_files(files)
            if on_slurm:
                steps = _submitted(specs, console)
        if not on_slurm and (code := _run_here(specs, plan_file.launch.parallel, out, console)):
            return code
    if as_json:
        texts = {str(path): text for path, text in files.items()}
        print(json.dumps({**submission_json(plan_file, steps), "files": texts}, indent=1))
    return NOT_ALL if any(step.action == "refused" for step in steps) else 0


def _console(*, stderr: bool = False) -> Console:
    """Return a console; a log is no narrower than what is written to it, unless COLUMNS says so."""
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LOG_COLUMNS
    return console


def _show(console: Console, table: Table, lines: Sequence[str]) -> None:
    console.print(table)
    for line in lines:
        say(console, line)


def _planned(specs: Sequence[JobSpec], *, on_slurm: bool, dry_run: bool) -> list[Step]:
    """Return what a submission would do; a dry run shows files and costs also where there is no SLURM."""
    try:
        return plan_submission(specs, on_slurm=on_slurm, look_only=True)
    except RunError as error:
        if not dry_run:
            raise
        print(f"pathswitch: what waits or runs already is not shown: {error}", file=sys.stderr)
        return plan_submission(specs, on_slurm=False, look_only=True)


def _is_agreed(console: Console, steps: Sequence[Step], yes: bool) -> bool:
    new = sum(step.action in ("submit", "hold") for step in steps)
    if yes or new == 0 or not sys.stdin.isatty():
        return True
    return Confirm.ask(f"Submit {new} job{'s' if new > 1 else ''}?", console=console)


def _submitted(specs: Sequence[JobSpec], console: Console) -> list[Step]:
    steps = []
    for step in submit_all(plan_submission(specs, on_slurm=True)):
        say(console, f"{step.spec.path}: {_outcome(step)}")
        steps.append(step)
    return steps


def _outcome(step: Step) -> str:
    if step.action == "done":
        return "trained to its end already"
    if step.action == "refused":
        return f"not submitted: {step.reason}"
    said = {"queued": "is there already", "submit": "submitted", "hold": "submitted, held"}[step.action]
    return f"job {step.job_id} {said}" + (f" ({step.reason})" if step.reason else "")


def _run_here(specs: Sequence[JobSpec], parallel: int, out: Path, console: Console) -> int:
    """Run the jobs from here: a table that follows them on a terminal, a line for each now and then in a log."""
    shown_at = 0.0 if console.is_terminal else time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:

        def tick() -> None:
            nonlocal shown_at
            every = WATCH_SECONDS if console.is_terminal else LINE_SECONDS
            if time.monotonic() - shown_at < every:
                return
            shown_at = time.monotonic()
            rows = run_status(out)
            if console.is_terminal:
                live.update(_status_group(rows), refresh=True)
            else:
                for row in rows:
                    say(console, status_line(row))

        try:
            ForegroundJobs(specs, parallel, tick).run()
        except KeyboardInterrupt:
            print("pathswitch: the jobs have saved and ended; submit again to go on", file=sys.stderr)
            return INTERRUPTED
    _show(console, *status_table(run_status(out)))
    return 0


def show_status(run: Path, *, watch: bool, as_json: bool) -> None:
    """Print where a run's jobs stand; with ``watch``, again and again until none waits or runs any more."""
    console, rows = _console(), run_status(run)
    if as_json:
        print(json.dumps([row.as_json() for row in rows], indent=1))
        return
    if watch:
        idle = 0
        with Live(_status_group(rows), console=console, auto_refresh=False, transient=True) as live:
            # Between two jobs on this machine there may be none for a moment.
            while (idle := 0 if any(row.job for row in rows) else idle + 1) < 2:
                time.sleep(WATCH_SECONDS)
                rows = run_status(run)
                live.update(_status_group(rows), refresh=True)
    _show(console, *status_table(rows))


def _status_group(rows: Sequence[PathStatus]) -> Group:
    table, lines = status_table(rows)
    return Group(table, *map(Text, lines))


def cancel_run(run: Path, path: str | None, *, now: bool) -> None:
    """End a run's jobs, or one path's; those that run save first."""
    specs = submitted_specs(run)
    if path is not None:
        names = [spec.path for spec in specs]
        if path not in names:
            raise ConfigError("PATH", given=path, allowed=choices(names, path))
        specs = [spec for spec in specs if spec.path == path]
    for line in cancel_jobs(specs, now=now):
        say(_console(), line)
