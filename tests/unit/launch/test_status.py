"""Where jobs stand, and how it is shown: whole at 80 columns, and in lines that a log can hold."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from launch_jobs import HERE, ON_SLURM, commit, complete, open_run, submit, write_plan
from rich.console import Console
from typer.testing import CliRunner

from pathswitch.cli.app import app
from pathswitch.cli.job_tables import short_lr, status_line, status_table, submission_json, submission_table
from pathswitch.cli.jobs import show_status
from pathswitch.config import load_plan_file
from pathswitch.errors import RunError
from pathswitch.launch.agent_lock import only_agent
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import JobSpec
from pathswitch.launch.status import PathStatus, run_status
from pathswitch.launch.submit import Step, plan_submission

TRAINER = """
train = "text.txt"
test = "text.txt"
[data]
seq_len = 8
[train]
global_batch_size = 12
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def here(tmp_path: Path, run: Path) -> dict[str, JobSpec]:
    return open_run(write_plan(tmp_path / "plan.toml", HERE), run)


@pytest.fixture
def on_slurm(slurm: FakeSlurm, tmp_path: Path, run: Path) -> dict[str, JobSpec]:
    plan = write_plan(tmp_path / "plan.toml")
    submit(plan, run)
    return open_run(plan, run)


def rows(run: Path) -> dict[str, PathStatus]:
    return {row.path: row for row in run_status(run)}


def journal(job: JobSpec) -> Journal:
    return Journal(Path(job.run), job.paradigm, job.path)


def state(run: Path, path: str) -> tuple[str, str | None, str | None]:
    row = rows(run)[path]
    return row.state, row.job, row.reason


def measure(job: JobSpec, step: int, seconds: float = 0.5) -> None:
    record = {"step": step - 1, "lr": 1e-3, "loss": 2.5, "seconds": seconds, "grad_norm": 1.0}
    job.files.metrics.write_text(json.dumps(record) + "\n")


# States.


def test_nothing_was_submitted_here(run: Path, tmp_path: Path) -> None:
    for folder in (run, tmp_path):
        with pytest.raises(
            RunError, match=rf"{folder}: no jobs were submitted here; `pathswitch submit PLAN.toml --out"
        ):
            run_status(folder)


def test_jobs_in_the_queue(slurm: FakeSlurm, on_slurm: dict[str, JobSpec], run: Path) -> None:
    assert state(run, "main") == ("queued", "1", "Priority")
    assert state(run, "v1") == ("held", "2", "waits for main@40")
    slurm.change("main", state="RUNNING", reason="None")
    assert state(run, "main") == ("running", "1", None)
    slurm.change("main", state="COMPLETING")
    assert state(run, "main")[0] == "completing"
    slurm.change("main", state="PENDING", reason="BeginTime")
    assert state(run, "main") == ("queued", "1", "BeginTime")
    slurm.change("v1", reason="Resources")
    assert state(run, "v1") == ("queued", "2", "Resources")


def test_a_status_is_found_from_wherever_it_is_asked_for(
    slurm: FakeSlurm, on_slurm: dict[str, JobSpec], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in (Path("../run"), tmp_path / "link", Path("../elsewhere/../link")):
        assert state(name, "main") == ("queued", "1", "Priority")


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([("started", None)], ("lost", "its job is gone, and has not said why; submit again")),
        ([("started", None), ("stopped", "SIGTERM received")], ("stopped", "SIGTERM received")),
        ([("started", None), ("failed", "exit code 1: boom")], ("failed", "exit code 1: boom")),
        ([("started", None), ("gave up", "no luck")], ("gave up", "no luck")),
        ([("started", None), ("cancelled", "cancelled by me")], ("cancelled", "cancelled by me")),
        ([("completed", None)], ("stopped", "trained to 240, and the plan goes on to 340; submit again")),
    ],
)
def test_what_a_job_that_is_gone_has_left_behind(
    here: dict[str, JobSpec], run: Path, tmp_path: Path, events: list[tuple[str, str | None]], expected: tuple[str, str]
) -> None:
    assert state(run, "main") == ("not submitted", None, None)
    for event, reason in events:
        journal(here["main"]).write(event, "host-7.0", 240, reason)
    open_run(write_plan(tmp_path / "plan.toml", HERE, versions=4), run)
    assert state(run, "main") == (expected[0], None, expected[1])
    complete(here["main"], 340)
    assert state(run, "main") == ("done", None, None)


def test_a_job_of_slurms_that_is_gone_is_lost(slurm: FakeSlurm, on_slurm: dict[str, JobSpec], run: Path) -> None:
    slurm.change("v1", state="CANCELLED")
    assert state(run, "v1") == ("lost", None, "its job is gone, and has not said why; submit again")


def test_a_branch_that_is_forked_and_was_never_submitted(here: dict[str, JobSpec], run: Path) -> None:
    assert state(run, "v1") == ("waiting", None, "waits for main@40")
    commit(here["v1"], 40)
    journal(here["v1"]).write("opened", "submit", 40)
    assert state(run, "v1") == ("not submitted", None, None)


def test_an_agent_on_a_machine_is_a_running_job(here: dict[str, JobSpec], run: Path) -> None:
    journal(here["main"]).write("started", "host-7.0", 0)
    with only_agent(here["main"].files):
        found, job, _ = state(run, "main")
        assert found == "running" and str(job).startswith("process ")
    assert state(run, "main")[0] == "lost"


def test_all_paradigms_of_a_run_are_there(tmp_path: Path, run: Path) -> None:
    from pathswitch.launch.spec import job_specs
    from pathswitch.launch.submit import rendered, write_files

    plan = write_plan(tmp_path / "plan.toml", "", 1, TRAINER)
    open_run(plan, run)
    write_files(rendered(job_specs(load_plan_file(plan), tmp_path, run, "ptfs"), None))
    assert [(row.paradigm, row.path) for row in run_status(run)] == [
        ("path_switching", "main"),
        ("path_switching", "v1"),
        ("ptfs", "v1"),
    ]


# Numbers.


def test_the_numbers_of_a_running_job(tmp_path: Path, run: Path) -> None:
    jobs = open_run(write_plan(tmp_path / "plan.toml", "", 3, TRAINER), run)
    commit(jobs["main"], 100)
    measure(jobs["main"], 120)
    for start in range(3):
        journal(jobs["main"]).write("started", f"host-7.{start}", 0)
    with only_agent(jobs["main"].files):
        row = rows(run)["main"]
    assert (row.step, row.start_step, row.end_step, row.durable_step) == (120, 0, 240, 100)
    assert (row.lr, row.loss, row.restarts, row.next_fork) == (1e-3, 2.5, 2, "v2@140")
    assert (row.tokens_per_s, row.eta_seconds) == (8 * 12 / 0.5, 120 * 0.5)
    row = rows(run)["main"]
    assert row.state == "lost" and row.tokens_per_s is row.eta_seconds is None
    assert set(row.as_json()) == {
        *("paradigm", "path", "state", "job", "step", "start_step", "end_step", "lr", "loss", "tokens_per_s"),
        *("durable_step", "restarts", "eta_seconds", "next_fork", "reason"),
    }


def test_the_step_of_a_script_is_the_one_that_it_reports_or_its_last_checkpoint(
    here: dict[str, JobSpec], run: Path
) -> None:
    assert rows(run)["v2"].step == 140
    commit(here["main"], 100)
    assert rows(run)["main"].step == 100
    here["main"].files.progress.write_text(json.dumps({"step": 130, "seconds_per_step": 2.0}))
    assert rows(run)["main"].step == 130
    here["main"].files.progress.write_text(json.dumps({"step": 999, "seconds_per_step": 2.0}))
    with only_agent(here["main"].files):
        row = rows(run)["main"]
    assert (row.step, row.eta_seconds) == (240, 0.0)


def test_the_last_fork_has_no_next(here: dict[str, JobSpec], run: Path) -> None:
    measure(here["main"], 139)
    assert rows(run)["main"].next_fork == "v2@140"
    measure(here["main"], 140)
    assert rows(run)["main"].next_fork == "v3@240"
    measure(here["main"], 240)
    assert rows(run)["main"].next_fork is None and rows(run)["v1"].next_fork is None


# What is shown.


def row(**fields: Any) -> PathStatus:
    values: dict[str, Any] = dict.fromkeys(PathStatus.__dataclass_fields__)
    values |= {"paradigm": "path_switching", "state": "running", "step": 0, "start_step": 0, "lr": 0.0, "restarts": 0}
    return PathStatus(**values | fields)


ROWS = [
    row(
        path="main",
        job="12345678",
        step=166_000,
        end_step=366_000,
        lr=2.35e-4,
        loss=10.123,
        tokens_per_s=1_234_567.0,
        durable_step=165_000,
        restarts=2,
        eta_seconds=400_000.0,
        next_fork="v2024-11@170000",
        reason="on gpu[001-064]",
    ),
    row(path="v2024-10", state="completing", job="12345679", step=130_000, end_step=130_000, lr=0.0, loss=2.1),
    row(
        path="v2024-11",
        state="held",
        job="12345680",
        step=170_000,
        end_step=260_000,
        lr=3e-4,
        reason="waits for main@170000",
    ),
    row(
        path="v2024-12", state="cancelled", step=266_000, end_step=366_000, lr=3e-4, reason=f"/runs/{'x' * 90}: damaged"
    ),
]


def shown(table: Any, width: int) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]


def test_a_status_fits_into_80_columns() -> None:
    table, lines = status_table(ROWS)
    assert shown(table, 80) == shown(table, 200)  # nothing is cut or folded
    assert max(map(len, shown(table, 80))) <= 80 and len(shown(table, 80)) == 5
    assert lines == [
        "main: on gpu[001-064]; next fork v2024-11@170000; started 3 times",
        "v2024-11: waits for main@170000",
        f"v2024-12: /runs/{'x' * 90}: damaged",
    ]


def test_a_column_that_says_nothing_is_left_out() -> None:
    table, lines = status_table([row(path="v1", state="not submitted", end_step=10)])
    assert [line.split() for line in shown(table, 80)] == [
        ["path", "state", "step", "LR"],
        ["v1", "not", "submitted", "0/10", "0"],
    ]
    assert lines == []


@pytest.mark.parametrize(
    ("value", "text"),
    [(3e-4, "3.00e-4"), (0.0, "0"), (1.0, "1.00e+0"), (2.345678e-10, "2.35e-10"), (6e-5, "6.00e-5"), (12.5, "1.25e+1")],
)
def test_an_lr_has_three_digits(value: float, text: str) -> None:
    assert short_lr(value) == text


@pytest.mark.parametrize(
    ("tokens_per_s", "seconds", "tokens", "left"),
    [
        (950.0, 59.0, "950", "59s"),
        (9.4, 60.0, "9.4", "1m 0s"),
        (41_234.0, 3_599.4, "41.2k", "59m 59s"),
        (999_600.0, 3_600.0, "1.00M", "1h 0m"),
        (1_234_567.0, 86_399.0, "1.23M", "23h 59m"),
        (123_456_789.0, 86_400.0, "123M", "1d 0h"),
        (2.5e9, 400_000.0, "2.50G", "4d 15h"),
    ],
)
def test_large_numbers_are_short(tokens_per_s: float, seconds: float, tokens: str, left: str) -> None:
    table, _ = status_table([row(path="main", end_step=9, tokens_per_s=tokens_per_s, eta_seconds=seconds)])
    assert shown(table, 80)[1].split()[-len(left.split()) - 1 :] == [tokens, *left.split()]


def test_a_line_of_a_log_says_it_all() -> None:
    assert status_line(ROWS[0]) == (
        "main: running, step 166000 of 366000, LR 2.35e-4, loss 10.123, 1.23M tokens/s, 4d 15h left, "
        "on gpu[001-064], next fork v2024-11@170000, started 3 times"
    )
    assert status_line(ROWS[2]) == "v2024-11: held, step 170000 of 260000, LR 3.00e-4, waits for main@170000"


def test_an_agents_process_is_short_in_the_table_and_whole_in_json(here: dict[str, JobSpec], run: Path) -> None:
    with only_agent(here["main"].files):
        found = run_status(run)
    assert "pid " in "".join(shown(status_table(found)[0], 80)) and "process" not in "".join(
        shown(status_table(found)[0], 80)
    )
    assert str(found[0].job).startswith("process ")


def test_a_submission_fits_into_80_columns(tmp_path: Path, run: Path) -> None:
    sizes = "nodes = 1000\ngpus_per_node = 8\nseconds_per_step = 30.0\ntime = '24:00:00'\nbranches = {nodes = 500}"
    plan = write_plan(tmp_path / "plan.toml", ON_SLURM + sizes)
    plan.write_text(plan.read_text().replace("steps = 100", "steps = 100_000").replace("v1", "v2024-10"))
    specs = list(open_run(plan, run).values())
    steps = plan_submission(specs, on_slurm=False, look_only=True)
    steps = [
        Step(specs[0], "queued", "12345678"),
        Step(specs[1], "refused", None, f"/runs/{'x' * 90}: damaged"),
        *steps[2:],
    ]
    table, lines = submission_table(submission_json(load_plan_file(plan), steps), on_slurm=True)
    found = shown(table, 80)
    assert found == shown(table, 200) and max(map(len, found)) <= 80 and len(found) == 5
    assert found[0].split() == ["path", "GPUs", "from", "to", "hours", "segments", "GPU-hours", "now"]
    assert found[1].split()[-2:] == ["job", "12345678"] and found[2].split()[-1] == "refused"
    assert found[3].split()[-2:] == ["submit,", "held"]
    assert lines[0] == f"v2024-10: /runs/{'x' * 90}: damaged"
    assert max(map(len, lines[1:])) <= 80 and "of pre-training every version from scratch" in lines[1]


def test_elsewhere_than_on_slurm_jobs_are_started_and_wait(tmp_path: Path, run: Path) -> None:
    plan = write_plan(tmp_path / "plan.toml", HERE)
    steps = plan_submission(list(open_run(plan, run).values()), on_slurm=False, look_only=True)
    table, lines = submission_table(submission_json(load_plan_file(plan), steps), on_slurm=False)
    assert [line.split()[-1] for line in shown(table, 80)] == ["now", "start", "wait", "wait", "wait"]
    assert lines == ["No step's time is known yet; [launch] seconds_per_step gives one for an estimate."]


def test_a_log_has_no_line_that_is_broken(
    slurm: FakeSlurm,
    on_slurm: dict[str, JobSpec],
    run: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    reason = f"/runs/{'long name ' * 30}: damaged"
    slurm.change("v1", state="FAILED")
    journal(on_slurm["v1"]).write("refused", "agent.0", 40, reason)
    capsys.readouterr()
    show_status(run, watch=False, as_json=False)
    assert f"v1: {reason}" in capsys.readouterr().out.splitlines()
    show_status(run, watch=False, as_json=True)
    assert [row["path"] for row in json.loads(capsys.readouterr().out)] == ["main", "v1", "v2", "v3"]


def test_a_log_is_as_wide_as_the_names_in_it(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    plan, name = write_plan(tmp_path / "plan.toml", HERE, versions=1), "v" * 64
    plan.write_text(plan.read_text().replace('"v1"', f'"{name}"'))
    submit(plan, run, dry_run=True)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[:3]] == ["path", "main", name]
    monkeypatch.setenv("COLUMNS", "50")
    submit(plan, run, dry_run=True)
    assert max(map(len, capsys.readouterr().out.splitlines()[:3])) <= 50


def test_watching_ends_when_no_job_is_left(
    slurm: FakeSlurm,
    on_slurm: dict[str, JobSpec],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    looks = []

    def pass_by(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            for name in ("main", "v1", "v2", "v3"):
                slurm.change(name, state="FAILED")
        assert len(looks) < 10

    monkeypatch.setattr("pathswitch.cli.jobs.time", SimpleNamespace(sleep=pass_by))
    show_status(run, watch=True, as_json=False)
    assert len(looks) == 4
    assert "lost" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["submit", "status", "cancel"])
def test_help_names_the_plans_sections(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert shown.count("[launch]") == (1 if command == "submit" else 0)
    assert "--json" in shown or command == "cancel"
