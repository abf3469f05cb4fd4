"""Plans to launch, their jobs, and what jobs leave behind: checkpoints of a path, events, completion records."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pathswitch.cli.jobs import submit_plan
from pathswitch.config import PlanFile, build_plan, load_plan_file
from pathswitch.launch.spec import JobSpec, job_specs
from pathswitch.launch.submit import rendered, write_files
from pathswitch.run_folder import RunFolder

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
from checkpoint_files import save

# Forks at 40, 140, 240; ends at 100, 200, 300; the main path ends at the last fork.
STEPS, DECAY = 100, 60
SCHEDULE = """
[schedule]
max_lr = 1e-3
warmup_steps = 2
alpha = 0.6
"""
ON_SLURM = """
kind = "slurm"
command = ["train.py", "--path", "{path}"]
"""
HERE = """
kind = "local"
command = ["train.py", "--path", "{path}"]
"""


def write_plan(file: Path, launch: str = ON_SLURM, versions: int = 3, more: str = "") -> Path:
    """Write a plan with so many versions of STEPS steps."""
    text = "".join(f'[[versions]]\nname = "v{number}"\nsteps = {STEPS}\n' for number in range(1, versions + 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{SCHEDULE}{text}{more}\n[launch]\n{launch}\n")
    return file


def specs_of(plan: Path, run: Path) -> list[JobSpec]:
    return job_specs(load_plan_file(plan), plan.parent, run)


def open_run(plan: Path, run: Path) -> dict[str, JobSpec]:
    """Prepare a run folder as a submission does, and return the jobs by path."""
    plan_file = load_plan_file(plan)
    RunFolder(run).open(plan_file)
    specs = job_specs(plan_file, plan.parent, run)
    write_files(rendered(specs, None))
    return {spec.path: spec for spec in specs}


def commit(spec: JobSpec, step: int, *, key: bytes | None = None, folder: Path | None = None, **changes: Any) -> Path:
    """Commit a checkpoint of a job's path, as its ranks do; ``changes`` are of its manifest."""
    plan_file: PlanFile = RunFolder(Path(spec.run)).plan_file()
    plan = build_plan(plan_file)
    path = plan.path(spec.path, spec.paradigm)
    fields = {"path": spec.path, "schedule_digest": path.digest, "plan_digest": plan.digest} | changes
    return save(folder or spec.files.checkpoints, step, key=key, **fields)


def complete(spec: JobSpec, end_step: int | None = None) -> None:
    """Write the record that a path is trained to its end."""
    spec.files.completion.parent.mkdir(parents=True, exist_ok=True)
    spec.files.completion.write_text(json.dumps({"end_step": end_step or spec.end_step}))


def submit(plan: Path, run: Path, *, dry_run: bool = False, as_json: bool = False) -> int:
    """Submit a plan as the command does, and return its exit code."""
    plan_file = load_plan_file(plan)
    return submit_plan(plan, plan_file, run, "path_switching", dry_run=dry_run, yes=True, as_json=as_json)


def wait_for(condition: Callable[[], object], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.01)
