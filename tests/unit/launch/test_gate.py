"""The gate before a branch opens for a committed and verified checkpoint of its parent's, and for nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from launch_jobs import HERE, commit, open_run, write_plan

from pathswitch.cli.jobs import submit_plan
from pathswitch.config import build_plan, load_plan_file
from pathswitch.launch import gate as gate_module
from pathswitch.launch.gate import OPEN, Gate, durable_step, open_gate
from pathswitch.launch.gatekeeper import GateKeeper
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import JobSpec
from pathswitch.launch.status import run_status
from pathswitch.run_folder import RunFolder
from pathswitch.versions.ledger import run_ledger
from pathswitch.versions.records import BranchRecord, JobRecord

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
from checkpoint_files import SHARDS, flip_bit

KEY, OTHER_KEY = b"0123456789abcdef", b"fedcba9876543210"


@pytest.fixture
def jobs(tmp_path: Path) -> dict[str, JobSpec]:
    return open_run(write_plan(tmp_path / "plan.toml"), tmp_path / "run")


def ask(job: JobSpec, key: bytes | None = None) -> Gate:
    run = RunFolder(Path(job.run))
    return open_gate(run, build_plan(run.plan_file()).path(job.path), key, "test")


def events(job: JobSpec) -> list[tuple[str, str | None]]:
    return [
        (event.record.event, event.record.reason) for event in Journal(Path(job.run), job.paradigm, job.path).read()
    ]


def branch_records(job: JobSpec) -> list[BranchRecord]:
    records = [stored.record for stored in run_ledger(Path(job.run)).read().records]
    return [record for record in records if isinstance(record, BranchRecord)]


def fork_of(job: JobSpec) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((job.files.checkpoints / "global_step40/pathswitch.json").read_text())
    return manifest


def test_it_opens_for_a_committed_checkpoint_by_forking_it(jobs: dict[str, JobSpec]) -> None:
    source = commit(jobs["main"], 40)
    assert ask(jobs["v1"]) == OPEN
    own = jobs["v1"].files.checkpoints
    assert (own / "latest").read_text() == "global_step40"
    for shard in SHARDS:
        assert (own / "global_step40" / shard).read_bytes() == (source / shard).read_bytes()
    parent = json.loads((source / "pathswitch.json").read_text())["digest"]
    assert fork_of(jobs["v1"])["manifest"]["forked_from"] == parent
    (record,) = branch_records(jobs["v1"])
    assert (record.path, record.parent_path, record.fork_step) == ("v1", "main", 40)
    assert (record.parent, record.manifest) == (parent, fork_of(jobs["v1"])["digest"])
    assert record.folder == "path_switching/v1/checkpoints/global_step40"
    assert events(jobs["v1"]) == [("opened", None)]
    assert durable_step(jobs["v1"].files, "v1") == 40
    assert ask(jobs["v2"]).state == "waiting"


def test_it_stays_open_and_is_recorded_once(jobs: dict[str, JobSpec]) -> None:
    source = commit(jobs["main"], 40)
    assert ask(jobs["v1"]) == ask(jobs["v1"]) == OPEN
    shutil.rmtree(source)  # the parent has pruned it
    assert ask(jobs["v1"]) == OPEN
    commit(jobs["main"], 40, text="another")
    assert ask(jobs["v1"]) == OPEN
    assert len(branch_records(jobs["v1"])) == 1 and events(jobs["v1"]) == [("opened", None)]


def test_a_path_from_scratch_needs_no_checkpoint(jobs: dict[str, JobSpec]) -> None:
    assert ask(jobs["main"]) == OPEN
    assert branch_records(jobs["main"]) == []


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "another step", "a save in progress", "a hidden copy"])
def test_it_waits_while_there_is_no_such_checkpoint(jobs: dict[str, JobSpec], there: str) -> None:
    checkpoints = jobs["main"].files.checkpoints
    if there == "an empty folder":
        checkpoints.mkdir(parents=True)
    elif there == "another step":
        commit(jobs["main"], 39)
        commit(jobs["main"], 140)
    elif there != "nothing":
        commit(jobs["main"], 40)
        hidden = ".global_step40.saving" if there == "a save in progress" else ".global_step40.replaced"
        (checkpoints / "global_step40").rename(checkpoints / hidden)
    assert ask(jobs["v1"]) == Gate("waiting", "until main@40")
    assert events(jobs["v1"]) == [] and not jobs["v1"].files.checkpoints.exists()


def test_a_folder_of_the_right_name_is_no_checkpoint(jobs: dict[str, JobSpec]) -> None:
    commit(jobs["main"], 40)
    (jobs["main"].files.checkpoints / "global_step40/pathswitch.json").unlink()
    gate = ask(jobs["v1"])
    assert gate.state == "refused" and "not committed" in str(gate.reason)
    assert not jobs["v1"].files.checkpoints.exists()


def test_steps_that_were_skipped_do_not_count(jobs: dict[str, JobSpec]) -> None:
    """With fp16, DeepSpeed's own count of steps, after which it names its folders, is ahead of the updates done."""
    checkpoints = jobs["main"].files.checkpoints
    commit(jobs["main"], 38, global_steps=40).rename(checkpoints / "global_step40")
    assert ask(jobs["v1"]) == Gate("waiting", "until main@40")
    commit(jobs["main"], 40, folder=checkpoints / "aside", global_steps=42).rename(checkpoints / "global_step42")
    assert ask(jobs["v1"]) == OPEN
    assert (jobs["v1"].files.checkpoints / "latest").read_text() == "global_step42"


def damage_bit(folder: Path) -> None:
    flip_bit(folder / SHARDS[1])


def truncate(folder: Path) -> None:
    (folder / SHARDS[0]).write_bytes((folder / SHARDS[0]).read_bytes()[:-1])


def remove(folder: Path) -> None:
    (folder / SHARDS[2]).unlink()


def add(folder: Path) -> None:
    (folder / "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(b"foreign")


def edit(folder: Path) -> None:
    file = folder / "pathswitch.json"
    file.write_text(file.read_text().replace('"step": 40', '"step": 41'))


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a flipped bit": (damage_bit, f"{SHARDS[1]}: expected blake3 "),
    "a short shard": (truncate, f"{SHARDS[0]}: expected 300 bytes, found 299 bytes"),
    "a missing shard": (remove, f"{SHARDS[2]}: expected 300 bytes, found no such file"),
    "a foreign shard": (add, "zero_pp_rank_7_mp_rank_00_optim_states.pt: expected no such file"),
    "an edited manifest": (edit, "pathswitch.json: edited: digest expected "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_refuses_a_damaged_checkpoint_until_there_is_a_whole_one(jobs: dict[str, JobSpec], damage: str) -> None:
    harm, message = DAMAGES[damage]
    harm(commit(jobs["main"], 40))
    gate = ask(jobs["v1"])
    assert gate.state == "refused" and message in str(gate.reason)
    assert events(jobs["v1"]) == [("refused", gate.reason)]
    assert durable_step(jobs["v1"].files, "v1") is None
    shutil.rmtree(jobs["main"].files.checkpoints / "global_step40")
    commit(jobs["main"], 40, text="whole")
    assert ask(jobs["v1"]) == OPEN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "v9"}, "of v9 (path_switching) at step 40; allowed: of main (path_switching) at step 40"),
        ({"paradigm": "ptfs"}, "of main (ptfs) at step 40; allowed: of main (path_switching) at step 40"),
        ({"schedule_digest": "9" * 64}, "trained by another schedule than the plan's 'main'"),
    ],
)
def test_it_refuses_what_is_no_checkpoint_of_the_parents(
    jobs: dict[str, JobSpec], changes: dict[str, Any], message: str
) -> None:
    commit(jobs["main"], 40, **changes)
    gate = ask(jobs["v1"])
    assert gate.state == "refused" and message in str(gate.reason)
    assert not jobs["v1"].files.checkpoints.exists()


def test_with_a_key_it_opens_for_a_signature_alone(jobs: dict[str, JobSpec]) -> None:
    for key, message in ((None, "is not signed"), (OTHER_KEY, "is signed with another key")):
        commit(jobs["main"], 40, key=key)
        gate = ask(jobs["v1"], KEY)
        assert gate.state == "refused" and message in str(gate.reason)
    commit(jobs["main"], 40, key=KEY)
    assert ask(jobs["v1"], KEY) == OPEN
    assert fork_of(jobs["v1"])["hmac_sha256"] is not None


def test_a_checkpoint_that_was_saved_again_is_the_one_that_is_forked(jobs: dict[str, JobSpec]) -> None:
    commit(jobs["main"], 40, text="first")
    assert durable_step(jobs["main"].files, "main") == 40
    digest = json.loads((commit(jobs["main"], 40, text="second") / "pathswitch.json").read_text())["digest"]
    assert ask(jobs["v1"]) == OPEN
    assert fork_of(jobs["v1"])["manifest"]["forked_from"] == digest


def test_the_newest_committed_step_is_of_the_path_itself_and_readable(jobs: dict[str, JobSpec]) -> None:
    main = jobs["main"]
    assert durable_step(main.files, "main") is None
    commit(main, 20)
    commit(main, 30)
    commit(main, 35, path="v1")
    edit_me = commit(main, 50)
    assert durable_step(main.files, "main") == 50
    (edit_me / "pathswitch.json").write_text("{")
    (main.files.checkpoints / "global_step60").mkdir()
    assert durable_step(main.files, "main") == 30
    shutil.rmtree(main.files.checkpoints / "global_step30")
    assert durable_step(main.files, "main") == 20


@pytest.mark.parametrize("point", ["write_latest", "record_fork", "journal"])
def test_a_fork_killed_behind_its_commit_is_finished_at_the_next_look(
    jobs: dict[str, JobSpec], point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(jobs["main"], 40)

    def killed() -> None:
        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        target = {
            "write_latest": "pathswitch.checkpoint.layout.Layout.write_latest",
            "record_fork": "pathswitch.launch.gate.record_fork",
            "journal": "pathswitch.launch.gate.Journal.write",
        }[point]
        monkeypatch.setattr(target, die)
        ask(jobs["v1"])

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL
    own = jobs["v1"].files.checkpoints
    assert (own / "global_step40/pathswitch.json").is_file()
    assert (own / "latest").exists() == (point != "write_latest")
    assert ask(jobs["v1"]) == OPEN
    assert (own / "latest").read_text() == "global_step40"
    assert [record.manifest for record in branch_records(jobs["v1"])] == [fork_of(jobs["v1"])["digest"]]


def test_a_refusal_is_in_the_status_with_its_reason(slurm: FakeSlurm, tmp_path: Path) -> None:
    plan, run = write_plan(tmp_path / "plan.toml"), tmp_path / "run"
    submit_plan(plan, load_plan_file(plan), run, "path_switching", dry_run=False, yes=True, as_json=False)
    jobs = open_run(plan, run)
    damage_bit(commit(jobs["main"], 40))
    keeper(jobs["main"]).finish()
    rows = {row.path: row for row in run_status(run)}
    assert rows["v1"].state == "refused" and f"{SHARDS[1]}: expected blake3" in str(rows["v1"].reason)
    assert (rows["v2"].state, rows["v2"].reason) == ("held", "waits for main@140")
    assert slurm.jobs["v1"]["reason"] == "JobHeldUser"


def keeper(job: JobSpec) -> GateKeeper:
    return GateKeeper(job, "agent.0")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"not within 30 s: {what}"
        time.sleep(0.01)


@pytest.fixture
def submitted(slurm: FakeSlurm, tmp_path: Path) -> dict[str, JobSpec]:
    plan, run = write_plan(tmp_path / "plan.toml"), tmp_path / "run"
    submit_plan(plan, load_plan_file(plan), run, "path_switching", dry_run=False, yes=True, as_json=False)
    slurm.change("main", state="RUNNING", reason="None")
    slurm.forget_calls()
    return open_run(plan, run)


def held(slurm: FakeSlurm) -> list[str]:
    return [name for name, job in slurm.jobs.items() if job["reason"] == "JobHeldUser"]


def test_the_keeper_releases_branches_as_their_forks_come(slurm: FakeSlurm, submitted: dict[str, JobSpec]) -> None:
    gates = keeper(submitted["main"])
    gates.poll()
    commit(submitted["main"], 40)
    wait_for(lambda: gates.poll() or held(slurm) == ["v2", "v3"], "v1 is released")
    commit(submitted["main"], 140)
    commit(submitted["main"], 240)
    wait_for(lambda: gates.poll() or held(slurm) == [], "v2 and v3 are released")
    gates.finish()
    released = [call[2] for call in slurm.calls("scontrol") if call[1] == "release"]
    assert sorted(released) == sorted(slurm.jobs[name]["id"] for name in ("v1", "v2", "v3"))


def test_the_keeper_looks_when_something_has_changed_and_not_before(
    submitted: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []
    children = GateKeeper.children
    monkeypatch.setattr(GateKeeper, "children", lambda gates: looks.append("") or children(gates))
    gates = keeper(submitted["main"])
    commit(submitted["main"], 10)
    for count, step in enumerate((20, 30, 40), 1):
        wait_for(lambda: gates.poll() or len(looks) == count, "a look")  # noqa: B023
        for _ in range(20):
            gates.poll()
            time.sleep(0.01)
        assert len(looks) == count
        commit(submitted["main"], step)


def test_the_keeper_sees_a_version_that_is_added(
    slurm: FakeSlurm, submitted: dict[str, JobSpec], tmp_path: Path
) -> None:
    gates = keeper(submitted["main"])
    commit(submitted["main"], 240)
    gates.finish()
    assert [path.name for path in gates.children()] == ["v1", "v2", "v3"]
    open_run(write_plan(tmp_path / "plan.toml", versions=4), tmp_path / "run")
    commit(submitted["main"], 340)
    gates.finish()
    assert durable_step(open_run(tmp_path / "plan.toml", tmp_path / "run")["v4"].files, "v4") == 340


def test_the_keeper_tries_a_refused_checkpoint_once_and_the_next_one_again(
    slurm: FakeSlurm, submitted: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def counted(run: RunFolder, path: Any, *arguments: Any) -> Gate:
        tried.append(path.name)
        return open_gate(run, path, *arguments)

    monkeypatch.setattr("pathswitch.launch.gatekeeper.open_gate", counted)
    damage_bit(commit(submitted["main"], 40))
    gates = keeper(submitted["main"])
    for step in (41, 42, 43):
        commit(submitted["main"], step)
        gates.finish()
    assert tried.count("v1") == 1 and tried.count("v2") == 3 and held(slurm) == ["v1", "v2", "v3"]
    commit(submitted["main"], 40, text="whole")
    gates.finish()
    assert tried.count("v1") == 2 and held(slurm) == ["v2", "v3"]


def test_the_keeper_looks_again_when_the_controller_was_away(
    slurm: FakeSlurm, submitted: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pathswitch.launch.slurm.RETRY_SECONDS", 0.0)
    (slurm.folder / "down").touch()
    gates = keeper(submitted["main"])
    commit(submitted["main"], 40)
    wait_for(lambda: gates.poll() or "branches are not started: squeue" in capsys.readouterr().out, "a look")
    assert not gates.finish()
    (slurm.folder / "down").unlink()
    wait_for(lambda: gates.poll() or held(slurm) == ["v2", "v3"], "v1 is released")


def test_the_keeper_waits_no_longer_than_it_has_patience(
    submitted: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*_: Any) -> Gate:
        time.sleep(5)
        return Gate("waiting")

    monkeypatch.setattr("pathswitch.launch.gatekeeper.open_gate", slowly)
    gates, started = keeper(submitted["main"]), time.monotonic()
    assert not gates.finish(0.2) and not gates.finish(0.2)
    assert time.monotonic() - started < 4


def test_branches_that_wait_in_vain_leave_the_queue(slurm: FakeSlurm, submitted: dict[str, JobSpec]) -> None:
    commit(submitted["main"], 40)
    assert ask(submitted["v1"]) == OPEN  # and somebody holds it all the same
    gates = keeper(submitted["main"])
    gates.cancel_waiting("main gave up: disk full", "agent.0")
    assert {name: job["state"] for name, job in slurm.jobs.items()} == {
        "main": "RUNNING",
        "v1": "PENDING",  # it has its fork
        "v2": "CANCELLED",
        "v3": "CANCELLED",
    }
    assert events(submitted["v3"])[-1] == ("cancelled", "main gave up: disk full")
    rows = {row.path: row for row in run_status(Path(submitted["main"].run))}
    assert (rows["v2"].state, rows["v2"].reason) == ("cancelled", "main gave up: disk full")


def test_elsewhere_than_on_slurm_the_keeper_asks_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    jobs = open_run(write_plan(tmp_path / "plan.toml", HERE), tmp_path / "run")
    commit(jobs["main"], 40)
    gates = keeper(jobs["main"])
    gates.finish()
    gates.cancel_waiting("why", "agent.0")
    assert durable_step(jobs["v1"].files, "v1") == 40


def test_a_manifest_is_read_once_however_often_it_is_asked_for(
    jobs: dict[str, JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    original = gate_module.read_manifest
    monkeypatch.setattr(gate_module, "read_manifest", lambda folder: read.append(folder) or original(folder))
    for step in (10, 20, 30):
        commit(jobs["main"], step)
    for _ in range(3):
        for name in ("v1", "v2", "v3"):
            assert ask(jobs[name]).state == "waiting"
    assert len(read) == 3


def test_events_of_others_are_not_mixed_in(jobs: dict[str, JobSpec]) -> None:
    ledger = run_ledger(Path(jobs["main"].run))
    ledger.append(JobRecord("ptfs", "v1", "started", "x.0", 0, None))
    Journal(Path(jobs["main"].run), "path_switching", "v1").write("started", "y.0", 40)
    assert events(jobs["v1"]) == [("started", None)]
