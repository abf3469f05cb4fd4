"""Submissions to SLURM's commands as they behave, and misbehave: every path's job is there once, whatever happens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_slurm import FakeSlurm
from launch_jobs import HERE, ON_SLURM, commit, complete, open_run, specs_of, submit, write_plan

from pathswitch.errors import ConfigError, RunError
from pathswitch.launch.cancel import cancel_jobs
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import load_spec
from pathswitch.launch.status import submitted_specs

pytestmark = pytest.mark.usefixtures("no_pause")
ALL = ["main", "v1", "v2", "v3"]


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return write_plan(tmp_path / "plans" / "plan.toml")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine"


def test_every_path_becomes_one_job(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    assert submit(plan, run) == 0
    assert slurm.live() == ALL
    assert {name: job["reason"] for name, job in slurm.jobs.items()} == {
        "main": "Priority",
        "v1": "JobHeldUser",
        "v2": "JobHeldUser",
        "v3": "JobHeldUser",
    }
    # Of the branches, the one of the main path's end cannot start without that end.
    main = slurm.jobs["main"]["id"]
    assert {name: job["dependency"] for name, job in slurm.jobs.items() if job["dependency"]} == {
        "v3": f"afterok:{main}"
    }
    assert "--kill-on-invalid-dep=yes" in slurm.jobs["v3"]["options"]
    for spec in specs_of(plan, run):
        assert slurm.jobs[spec.path]["script"] == str(spec.files.batch_script)
        assert load_spec(spec.files.job) == spec
        (event,) = Journal(run, "path_switching", spec.path).read()
        assert (event.record.event, event.record.attempt) == ("submitted", slurm.jobs[spec.path]["id"])


def test_nothing_is_doubled_from_wherever_it_is_called(
    slurm: FakeSlurm, plan: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(plan, run)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for out in (run, Path("../runs/mine"), Path("../elsewhere/../runs/mine"), tmp_path / "link" / "mine"):
        submit(Path("../plans/plan.toml"), out)
    assert len(slurm.all_jobs()) == 4 and slurm.live() == ALL
    assert {spec.run for spec in submitted_specs(run)} == {str(run)}


def test_two_runs_of_one_plan_have_jobs_of_their_own(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    submit(plan, run)
    submit(plan, run.with_name("other"))
    assert slurm.live() == sorted(2 * ALL)


def test_a_version_added_while_the_main_path_trains_adds_its_job_alone(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    submit(plan, run)
    slurm.change("main", state="RUNNING", reason="None")
    slurm.forget_calls()
    submit(write_plan(plan, versions=4), run)
    assert slurm.live() == [*ALL, "v4"] and len(slurm.all_jobs()) == 5
    assert slurm.jobs["v4"]["dependency"] == f"afterok:{slurm.jobs['main']['id']}"
    # The main path's agent reads this when it comes to the old end.
    assert load_spec(specs_of(plan, run)[0].files.job).end_step == 340


def test_a_version_added_when_the_main_path_is_done_sends_it_on(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    submit(plan, run)
    jobs = {spec.path: spec for spec in specs_of(plan, run)}
    for step in (40, 140, 240):
        commit(jobs["main"], step)
    for spec in jobs.values():
        complete(spec)
        slurm.change(spec.path, state="COMPLETED")
    slurm.forget_calls()
    submit(plan, run)
    assert slurm.live() == []  # nothing is left to do
    submit(write_plan(plan, versions=4), run)
    assert slurm.live() == ["main", "v4"]
    assert [job["reason"] for job in slurm.all_jobs()[4:]] == ["Priority", "JobHeldUser"]


def test_a_branch_released_after_a_version_was_added_waits_no_longer_for_the_main_path(
    slurm: FakeSlurm, plan: Path, run: Path
) -> None:
    submit(plan, run)
    submit(write_plan(plan, versions=4), run)
    commit(specs_of(plan, run)[0], 240)
    submit(plan, run)
    job = slurm.jobs["v3"]
    assert (job["reason"], job["dependency"]) == ("Priority", "")
    assert slurm.jobs["v4"]["reason"] == "JobHeldUser"


def test_a_branch_whose_fork_is_there_is_submitted_without_a_hold(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    jobs = open_run(plan, run)
    commit(jobs["main"], 40)
    submit(plan, run)
    assert "--hold" not in slurm.jobs["v1"]["options"] and slurm.jobs["v1"]["reason"] == "Priority"
    assert (jobs["v1"].files.checkpoints / "global_step40" / "pathswitch.json").is_file()


def test_a_branch_with_a_damaged_fork_is_not_submitted(
    slurm: FakeSlurm, plan: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = commit(open_run(plan, run)["main"], 40)
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"short")
    assert submit(plan, run) == 1
    assert slurm.live() == ["main", "v2", "v3"]
    assert "v1: not submitted: " in (shown := capsys.readouterr().out) and "mp_rank_00_model_states.pt" in shown


def test_a_dry_run_changes_nothing(slurm: FakeSlurm, plan: Path, run: Path, tmp_path: Path) -> None:
    folder = commit(open_run(plan, run)["main"], 40)
    before = snapshot(tmp_path)
    assert submit(plan, run, dry_run=True) == 0
    assert submit(plan, run.with_name("new"), dry_run=True, as_json=True) == 0
    assert snapshot(tmp_path) == before and folder.is_dir()
    assert {call[0] for call in slurm.calls()} == {"squeue"}


def test_the_json_of_a_dry_run_holds_every_file(
    slurm: FakeSlurm, plan: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(plan, run, dry_run=True, as_json=True)
    content = json.loads(capsys.readouterr().out)
    assert [(job["path"], job["action"], job["job"]) for job in content["jobs"]] == [
        ("main", "submit", None),
        ("v1", "hold", None),
        ("v2", "hold", None),
        ("v3", "hold", None),
    ]
    submit(plan, run)
    capsys.readouterr()
    written = {str(file): file.read_text() for file in run.rglob("*") if file.name in ("job.json", "job.sbatch")}
    assert content["files"] == written


def test_the_json_of_a_submission_has_its_jobs_and_nothing_else_is_on_stdout(
    slurm: FakeSlurm, plan: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(plan, run, as_json=True)
    shown = capsys.readouterr()
    assert [job["job"] for job in json.loads(shown.out)["jobs"]] == ["1", "2", "3", "4"]
    assert "main: job 1 submitted" in shown.err


def test_a_dry_run_needs_no_slurm(
    plan: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(plan, run, dry_run=True) == 0
    shown = capsys.readouterr()
    assert "v3" in shown.out and "squeue: not found" in shown.err


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return every file and folder but the fake's own, with inode and time of change."""
    found = {}
    for file in folder.rglob("*"):
        if folder / "slurm" not in [file, *file.parents]:
            status = file.lstat()
            found[str(file)] = (status.st_ino, status.st_mtime_ns)
    return found


def test_what_was_cancelled_waiting_is_submitted_again(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    submit(plan, run)
    list(cancel_jobs(submitted_specs(run), now=False))
    assert slurm.live() == []
    submit(plan, run)
    assert slurm.live() == ALL and len(slurm.all_jobs()) == 8


def test_what_is_being_cancelled_is_submitted_again_when_it_has_ended(
    slurm: FakeSlurm, plan: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submit(plan, run)
    slurm.change("main", state="RUNNING", reason="None")
    (main,) = (spec for spec in submitted_specs(run) if spec.path == "main")
    list(cancel_jobs([main], now=False))
    assert main.files.stop.read_text().startswith("cancelled by ")
    capsys.readouterr()
    submit(plan, run)
    assert "being cancelled; submit again" in capsys.readouterr().out
    assert main.files.stop.exists() and slurm.live() == ALL and len(slurm.all_jobs()) == 4
    slurm.change("main", state="FAILED")
    submit(plan, run)
    assert slurm.live() == ALL and len(slurm.all_jobs()) == 5
    assert not main.files.stop.exists()


def test_the_environment_decides_nothing_that_the_plan_does(
    slurm: FakeSlurm, plan: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plan(plan, f'{ON_SLURM}partition = "gpu"')
    for name in ("PARTITION", "ACCOUNT", "JOB_NAME", "COMMENT", "OUTPUT", "NO_REQUEUE", "EXPORT", "SIGNAL"):
        monkeypatch.setenv(f"SBATCH_{name}", "mine")
    monkeypatch.setenv("SQUEUE_PARTITION", "other")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    submit(plan, run)
    assert all("--account=mine" in job["options"] for job in slurm.all_jobs())  # the plan has none
    assert not any(option.startswith("--partition") for job in slurm.all_jobs() for option in job["options"])
    for environ in slurm.environments():
        assert not [name for name in environ if name.startswith(("SBATCH_", "SQUEUE_"))]
        assert environ["SLURM_CONF"] == "/etc/slurm.conf"


def test_a_submission_from_within_a_job_does_not_inherit_its_options(
    slurm: FakeSlurm, plan: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"SLURM_JOB_ID": "5", "SLURM_JOB_PARTITION": "interactive", "SLURM_CONF": "/etc/slurm.conf"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    submit(plan, run)
    for environ in slurm.environments():
        assert [name for name in environ if name.startswith("SLURM_")] == ["SLURM_CONF"]
    assert not any("interactive" in option for job in slurm.all_jobs() for option in job["options"])


def test_a_plan_that_contradicts_the_run_submits_nothing(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    submit(plan, run)
    commit(specs_of(plan, run)[0], 40)
    plan.write_text(plan.read_text().replace("max_lr = 1e-3", "max_lr = 2e-3"))
    before = snapshot(run)
    slurm.forget_calls()
    with pytest.raises(RunError, match="max_lr"):
        submit(plan, run)
    assert not slurm.calls("sbatch")
    assert {name for name, stamp in snapshot(run).items() if before.get(name) != stamp} <= {str(run / "submit.lock")}


def test_a_job_that_cannot_be_written_down_stops_all_before_anything_is_written(
    slurm: FakeSlurm, plan: Path, run: Path
) -> None:
    write_plan(plan, ON_SLURM.replace('"{path}"', '"{ds_config}"') + 'ds_config = "ds.json"')
    (plan.parent / "ds.json").write_text(json.dumps({"scheduler": {"type": "WarmupLR"}}))
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="scheduler"):
            submit(plan, run, dry_run=dry_run)
    assert not run.exists() and slurm.calls() == []


def test_files_follow_the_plan_and_are_not_touched_without_need(slurm: FakeSlurm, plan: Path, run: Path) -> None:
    submit(plan, run)
    scripts = {spec.path: spec.files.batch_script for spec in specs_of(plan, run)}
    inodes = {name: script.stat().st_ino for name, script in scripts.items()}
    submit(write_plan(plan, f'{ON_SLURM}\npaths.v2 = {{time = "01:00:00"}}'), run)
    assert [name for name, script in scripts.items() if script.stat().st_ino != inodes[name]] == ["v2"]
    assert "--time=01:00:00" in scripts["v2"].read_text()


def test_no_job_at_all_is_refused(slurm: FakeSlurm, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one version"):
        submit(write_plan(tmp_path / "plan.toml", versions=0), run)


def test_a_local_plan_asks_no_slurm_for_what_it_would_do(
    plan: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit(write_plan(plan, HERE), run, dry_run=True) == 0
    shown = capsys.readouterr()
    assert "start" in shown.out and shown.err == ""
    assert not run.exists()
