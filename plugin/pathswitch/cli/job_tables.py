"""Submissions and jobs as JSON values, as tables that fit into 80 columns, and as lines of a log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from pathswitch.config import PlanFile
from pathswitch.launch.estimate import estimates, totals
from pathswitch.launch.status import PathStatus
from pathswitch.launch.submit import Step

COLUMNS, GAP = 80, 2
TEXT_COLUMNS = ("path", "GPUs", "now", "state", "job")


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
    return {"jobs": jobs, "gpu_hours": dict.fromkeys(("jobs", "ptfs", "cpt")) if total is None else vars(total)}


def submission_table(content: Mapping[str, Any], *, on_slurm: bool) -> tuple[Table, list[str]]:
    """Return the table of a submission's jobs, and lines below it: what waits and why, and what all of them cost."""
    words = {"queued": "job {}", "submit": "submit", "hold": "submit, held"}
    if not on_slurm:
        words = {"submit": "start", "hold": "wait"}
    jobs = content["jobs"]
    table = _table(
        {
            "path": [job["path"] for job in jobs],
            "GPUs": [f"{job['nodes']} x {job['gpus_per_node']}" for job in jobs],
            "from": [f"{job['start_step']:,}" for job in jobs],
            "to": [f"{job['end_step']:,}" for job in jobs],
            "hours": [_hours(job["hours"]) for job in jobs],
            "segments": [_number(job["segments"], ",d") for job in jobs],
            "GPU-hours": [_hours(job["gpu_hours"]) for job in jobs],
            "now": [words.get(job["action"], job["action"]).format(job["job"]) for job in jobs],
        }
    )
    waiting = [f"{job['path']}: {job['reason']}" for job in jobs if job["reason"] and job["action"] != "hold"]
    return table, waiting + _costs(content["gpu_hours"])


def _costs(hours: Mapping[str, float | None]) -> list[str]:
    if hours["jobs"] is None or hours["ptfs"] is None:
        return ["No step's time is known yet; [launch] seconds_per_step gives one for an estimate."]
    share = f"{hours['jobs'] / hours['ptfs']:.1%}" if hours["ptfs"] else "-"
    return [
        f"In all {_hours(hours['jobs'])} GPU-hours: {share} of pre-training every version from scratch",
        f"({_hours(hours['ptfs'])}); continual pre-training would take {_hours(hours['cpt'])}.",
    ]


def status_table(rows: Sequence[PathStatus]) -> tuple[Table, list[str]]:
    """Return the table of a run's paths, with the columns that have something to say, and lines below it."""
    table = _table(
        {
            "path": [row.path for row in rows],
            "state": [row.state for row in rows],
            "job": [re.sub(r"process (\d+) on .*", r"pid \1", row.job or "") for row in rows],
            "step": [f"{row.step}/{row.end_step}" for row in rows],
            "LR": [short_lr(row.lr) for row in rows],
            "loss": [_number(row.loss, "#.4g") for row in rows],
            "tok/s": [_short(row.tokens_per_s) for row in rows],
            "saved": [_number(row.durable_step, "d") for row in rows],
            "left": [_duration(row.eta_seconds) for row in rows],
        }
    )
    return table, [f"{row.path}: {'; '.join(notes)}" for row in rows if (notes := _notes(row))]


def status_line(row: PathStatus) -> str:
    """Return where a path stands as one line of a log."""
    details = [f"step {row.step} of {row.end_step}", f"LR {short_lr(row.lr)}"]
    details += [f"loss {row.loss:.3f}"] if row.loss is not None else []
    details += [f"{_short(row.tokens_per_s)} tokens/s"] if row.tokens_per_s is not None else []
    details += [f"{_duration(row.eta_seconds)} left"] if row.eta_seconds is not None else []
    return f"{row.path}: {row.state}, {', '.join(details + _notes(row))}"


def _notes(row: PathStatus) -> list[str]:
    notes = [row.reason] if row.reason else []
    notes += [f"next fork {row.next_fork}"] if row.next_fork and row.state == "running" else []
    notes += [f"started {row.restarts + 1} times"] if row.restarts else []
    return notes


def _table(columns: Mapping[str, list[str]]) -> Table:
    """Return a table of the columns in which a cell says something, a little closer where it would be too wide."""
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    width = sum(max(map(len, [name, *cells])) for name, cells in shown.items()) + GAP * (len(shown) - 1)
    table = Table(box=None, pad_edge=False, padding=(0, GAP if width <= COLUMNS else 1, 0, 0))
    for name in shown:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", overflow="fold")
    for cells in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def short_lr(lr: float) -> str:
    """Return an LR with three digits: ``3.00e-4``."""
    return re.sub(r"e([+-])0+(\d)", r"e\1\2", f"{lr:.2e}") if lr else "0"


def _number(value: float | int | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _hours(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _short(value: float | None) -> str:
    """Return a number with three digits: ``950``, ``41.2k``, ``1.23M``."""
    if value is None:
        return ""
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * unit:
            return f"{value / unit:#.3g}".rstrip(".") + sign
    return f"{value:.3g}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes}m" if hours else f"{minutes}m {rest}s" if minutes else f"{rest}s"
