"""The gate before a branch opens for a committed and verified checkpoint of its parent's, and for nothing else."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch_jobs import commit, open_run, write_plan

from pathswitch.config import build_plan
from pathswitch.launch import gate as gate_module
from pathswitch.launch.gate import OPEN, Gate, durable_step, open_gate
from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import JobSpec
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
