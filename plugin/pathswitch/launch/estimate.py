"""What jobs will cost, from a step's time that was measured in the run, or given in the plan."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from pathswitch.config import PlanFile, build_plan
from pathswitch.config.launch import time_seconds
from pathswitch.launch.spec import JobSpec
from pathswitch.run_folder import PathFolder

RECENT_STEPS = 50
TAIL_BYTES = 1 << 14  # more than as many lines of metrics


@dataclass(frozen=True)
class JobEstimate:
    """What a job will take from its first step to its last, if it runs alone and never waits."""

    hours: float
    gpu_hours: float
    segments: int
    """How often it will be queued, by its time limit."""


@dataclass(frozen=True)
class Totals:
    """GPU-hours of the jobs, and of other paradigms with the first job's GPUs and its step's time."""

    jobs: float
    ptfs: float
    cpt: float


def newest_updates(files: PathFolder) -> list[dict[str, Any]]:
    """Return the last updates that a path has written down, the oldest first, with ``step`` as updates done."""
    if files.metrics.is_file():
        with files.metrics.open("rb") as file:
            file.seek(max(0, files.metrics.stat().st_size - TAIL_BYTES))
            lines = [line for line in file.read().splitlines() if line.startswith(b"{") and line.endswith(b"}")]
        if lines:
            records = [json.loads(line) for line in lines[-RECENT_STEPS:]]
            return [record | {"step": record["step"] + 1} for record in records]
    if files.progress.is_file():
        progress: dict[str, Any] = json.loads(files.progress.read_text())
        return [progress | {"seconds": progress["seconds_per_step"]}]
    return []


def measured_seconds_per_step(files: PathFolder) -> float | None:
    """Return the median of a path's last steps, None where none has been measured."""
    return median_seconds(newest_updates(files))


def median_seconds(updates: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the median time of some updates, None if there are none."""
    return median(float(update["seconds"]) for update in updates) if updates else None


def seconds_per_step(specs: Sequence[JobSpec], given: float | None) -> dict[str, float]:
    """Return every path's step time: its own, or another's, with time that falls as the number of ranks grows.

    Args:
        specs: the jobs, the main path first.
        given: [launch] seconds_per_step, that of the first job; what has been measured goes before it.
    """
    measured = {spec.path: seconds for spec in specs if (seconds := measured_seconds_per_step(spec.files)) is not None}
    source = next((spec for spec in specs if spec.path in measured), None)
    if source is not None:
        base, ranks = measured[source.path], source.ranks
    elif given is not None:
        base, ranks = given, specs[0].ranks
    else:
        return {}
    return {spec.path: measured.get(spec.path, base * ranks / spec.ranks) for spec in specs}


def estimates(specs: Sequence[JobSpec], given: float | None) -> dict[str, JobEstimate]:
    """Return what every job takes, by path; nothing where no step's time is known."""
    times, found = seconds_per_step(specs, given), {}
    for spec in specs:
        if spec.path not in times:
            continue
        seconds = (spec.end_step - spec.start_step) * times[spec.path]
        segments = 1
        if spec.launch.time is not None:
            usable = max(1.0, time_seconds(spec.launch.time) - spec.launch.signal_seconds)
            segments = max(1, -(-int(seconds) // int(usable)))
        found[spec.path] = JobEstimate(seconds / 3600, seconds / 3600 * spec.ranks, segments)
    return found


def totals(plan_file: PlanFile, specs: Sequence[JobSpec], given: float | None) -> Totals | None:
    """Return the GPU-hours of the plan's paradigms, None where no step's time is known."""
    by_path = estimates(specs, given)
    times = seconds_per_step(specs, given)
    if not specs or not times:
        return None
    cost = build_plan(plan_file).cost
    per_step = times[specs[0].path] * specs[0].ranks / 3600
    return Totals(
        jobs=sum(estimate.gpu_hours for estimate in by_path.values()),
        ptfs=cost.ptfs_steps * per_step,
        cpt=cost.cpt_steps * per_step,
    )
