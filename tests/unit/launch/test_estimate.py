"""What jobs will cost, and from which measurement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from launch_jobs import ON_SLURM, open_run, write_plan

from pathswitch.cli.job_tables import submission_json
from pathswitch.config import PlanFile, build_plan, load_plan_file
from pathswitch.launch.estimate import (
    RECENT_STEPS,
    estimates,
    measured_seconds_per_step,
    newest_updates,
    seconds_per_step,
    totals,
)
from pathswitch.launch.spec import JobSpec
from pathswitch.launch.submit import plan_submission

GPUS = "nodes = 4\ngpus_per_node = 2\nbranches = {nodes = 2}\npaths.v2 = {nodes = 1}\n"


@pytest.fixture
def jobs(tmp_path: Path) -> dict[str, JobSpec]:
    """The main path on 8 GPUs, branches on 4, and v2 on 2."""
    return open_run(write_plan(tmp_path / "plan.toml", ON_SLURM + GPUS), tmp_path / "run")


@pytest.fixture
def plan_file(jobs: dict[str, JobSpec], tmp_path: Path) -> PlanFile:
    return load_plan_file(tmp_path / "plan.toml")


def measure(job: JobSpec, *seconds: float, last: str = "") -> None:
    lines = [json.dumps({"step": step, "lr": 1e-3, "seconds": value}) for step, value in enumerate(seconds)]
    job.files.metrics.write_text("\n".join([*lines, last]))


def report(job: JobSpec, seconds: float) -> None:
    job.files.progress.write_text(json.dumps({"step": 7, "lr": 1e-3, "seconds_per_step": seconds}))


def test_a_steps_time_is_the_median_of_the_last_ones(jobs: dict[str, JobSpec]) -> None:
    main = jobs["main"]
    assert measured_seconds_per_step(main.files) is None
    measure(main, *[9.0] * 30, *[1.0, 2.0, 8.0] * (RECENT_STEPS // 3 + 1), last='{"step": 99, "lr":')
    assert measured_seconds_per_step(main.files) == 2.0
    assert newest_updates(main.files)[-1]["step"] == 30 + 3 * (RECENT_STEPS // 3 + 1)  # as updates done


def test_of_a_long_file_the_end_alone_is_read(jobs: dict[str, JobSpec]) -> None:
    main = jobs["main"]
    measure(main, *[1.0] * 200_000, *[3.0] * RECENT_STEPS)
    assert measured_seconds_per_step(main.files) == 3.0
    assert len(newest_updates(main.files)) == RECENT_STEPS


def test_a_scripts_report_counts_where_there_are_no_metrics(jobs: dict[str, JobSpec]) -> None:
    report(jobs["main"], 4.0)
    assert measured_seconds_per_step(jobs["main"].files) == 4.0
    assert newest_updates(jobs["main"].files)[-1]["step"] == 7
    measure(jobs["main"], last='{"step"')
    assert measured_seconds_per_step(jobs["main"].files) == 4.0


def test_times_of_other_paths_follow_from_their_ranks(jobs: dict[str, JobSpec]) -> None:
    specs = list(jobs.values())
    assert seconds_per_step(specs, None) == {}
    assert seconds_per_step(specs, 1.0) == {"main": 1.0, "v1": 2.0, "v2": 4.0, "v3": 2.0}
    report(jobs["v1"], 3.0)
    assert seconds_per_step(specs, 1.0) == {"main": 1.5, "v1": 3.0, "v2": 6.0, "v3": 3.0}
    report(jobs["main"], 1.0)
    assert seconds_per_step(specs, 9.0) == {"main": 1.0, "v1": 3.0, "v2": 4.0, "v3": 2.0}


def test_a_job_takes_its_steps_on_its_gpus(jobs: dict[str, JobSpec]) -> None:
    found = estimates(list(jobs.values()), 36.0)
    assert {name: (job.hours, job.gpu_hours) for name, job in found.items()} == {
        "main": (240 * 0.01, pytest.approx(240 * 0.01 * 8)),
        "v1": (pytest.approx(60 * 0.02), pytest.approx(60 * 0.02 * 4)),
        "v2": (pytest.approx(60 * 0.04), pytest.approx(60 * 0.04 * 2)),
        "v3": (pytest.approx(60 * 0.02), pytest.approx(60 * 0.02 * 4)),
    }
    assert estimates(list(jobs.values()), None) == {}


@pytest.mark.parametrize(
    ("time", "signal_seconds", "segments"),
    [("", 300, 1), ("02:00:00", 600, 2), ("01:10:00", 600, 3), ("01:09:59", 600, 4)],
)
def test_a_job_is_queued_as_often_as_its_time_limit_makes_it(
    tmp_path: Path, time: str, signal_seconds: int, segments: int
) -> None:
    limit = f'time = "{time}"\n' if time else ""
    launch = f"{ON_SLURM}{limit}signal_seconds = {signal_seconds}"
    main = open_run(write_plan(tmp_path / "plan.toml", launch), tmp_path / "run")["main"]
    # 240 steps of 45 s are three hours; the last part of a limit is for the save.
    assert estimates([main], 45.0)["main"].segments == segments


def test_other_paradigms_are_counted_on_the_main_paths_gpus(jobs: dict[str, JobSpec], plan_file: PlanFile) -> None:
    cost = build_plan(plan_file).cost
    assert (cost.ptfs_steps, cost.cpt_steps) == (600, 300)
    total = totals(plan_file, list(jobs.values()), 36.0)
    assert total is not None
    assert total.ptfs == pytest.approx(600 * 0.01 * 8) and total.cpt == pytest.approx(300 * 0.01 * 8)
    assert total.jobs == pytest.approx((240 + 60 + 60 + 60) * 0.01 * 8)
    assert totals(plan_file, list(jobs.values()), None) is None


def test_what_is_not_known_is_null(jobs: dict[str, JobSpec], plan_file: PlanFile) -> None:
    steps = plan_submission(list(jobs.values()), on_slurm=False, look_only=True)
    content: dict[str, Any] = json.loads(json.dumps(submission_json(plan_file, steps)))
    assert content["gpu_hours"] == {"jobs": None, "ptfs": None, "cpt": None}
    assert {job["hours"] for job in content["jobs"]} == {None}
    report(jobs["main"], 36.0)
    content = submission_json(plan_file, steps)
    assert content["gpu_hours"]["ptfs"] == pytest.approx(48.0) and content["jobs"][1]["gpu_hours"] == pytest.approx(4.8)
