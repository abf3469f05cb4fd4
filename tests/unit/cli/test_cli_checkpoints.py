"""``pathswitch fork``, ``gc``, ``verify`` and ``adopt`` as a user meets them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pathswitch.checkpoint import MANIFEST_FILE, Policy, begin_save, read_manifest, verify_checkpoint
from pathswitch.cli.app import main
from pathswitch.config import PlanFile, build_plan
from pathswitch.run_folder import RunFolder, tag
from pathswitch.versions.ledger import Ledger
from pathswitch.versions.records import BranchRecord, CheckpointRecord, PrunedRecord, ReleaseRecord

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
from checkpoint_files import SHARDS, flip_bit, save, snapshot

# Forks at 4, 14 and 24; ends at 10, 20 and 30.
PLAN_FILE = PlanFile.model_validate(
    {
        "schedule": {"max_lr": 1e-3, "warmup_steps": 2},
        "versions": tuple({"name": name, "steps": 10} for name in ("v1", "v2", "v3")),
    }
)
PLAN = build_plan(PLAN_FILE)
KEY = "a signing key of enough bytes"


class Done(NamedTuple):
    code: int
    out: str
    err: str


def pathswitch(*arguments: object) -> Done:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pathswitch", *map(str, arguments)])
        try:
            main()
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return Done(code, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """Run a command that must fail with one line, and return it."""
    done = pathswitch(*arguments)
    assert done.code == 2 and done.err.startswith("pathswitch: error: ") and done.err.count("\n") == 1, done
    return done.err


def checkpoint(checkpoints: Path, path: str, step: int, paradigm: str = "path_switching", **options: Any) -> Path:
    of = PLAN.path(path, paradigm)  # type: ignore[arg-type]
    fields = {"schedule_digest": of.digest, "plan_digest": PLAN.digest, "next_lr": of.lr(step)}
    return save(checkpoints, step, path=path, paradigm=paradigm, **fields, **options)


def place(run: Path, path: str, paradigm: str = "path_switching") -> Path:
    return run / paradigm / path / "checkpoints"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose main path has checkpoints at 4, 14 and 16."""
    folder = RunFolder(tmp_path / "run")
    folder.open(PLAN_FILE)
    for step in (4, 14, 16):
        checkpoint(place(folder.out, "main"), "main", step)
    return folder.out


def records(run: Path, kind: type[Any]) -> list[Any]:
    return [stored.record for stored in Ledger(run / "ledger").read().records if isinstance(stored.record, kind)]


def recorded(run: Path, folder: Path, name: str) -> None:
    manifest = read_manifest(folder)
    known = ("paradigm", "path", "step", "samples_seen", "tokens_seen", "next_lr", "parent")
    fields = {field: getattr(manifest, field) for field in known}
    Ledger(run / "ledger").append(CheckpointRecord(manifest=manifest.digest, folder=name, **fields))


@contextlib.contextmanager
def locked(run: Path, path: str, *, held: bool = True) -> Iterator[None]:
    """The lock file of a path that was trained; held by a live process or not."""
    file = run / "path_switching" / path / "lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        if held:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# fork


def test_fork_says_what_it_does_and_does_it(run: Path) -> None:
    arguments = ("fork", run, "main@14", "--to", "v2", "--beta2", 0.98, "--weight-decay", 0)
    before = snapshot(run)
    dry = pathswitch(*arguments, "--dry-run")
    assert dry.code == 0 and snapshot(run) == before
    source, main_path, branch = place(run, "main") / tag(14), PLAN.path("main"), PLAN.path("v2")
    for step in (13, 14, 15):
        assert f"{step}  {main_path.lr(step)!r}" in dry.out and repr(branch.lr(step)) in dry.out
    for shown in (source, read_manifest(source).digest[:12], "224 samples", "world size 1", "ZeRO stage 1"):
        assert str(shown) in dry.out
    assert "kept        weights, Adam's moments and step, random states, place in the data" in dry.out
    assert "changed     path and LR schedule, beta2 = 0.98, weight_decay = 0.0" in dry.out
    done = pathswitch(*arguments)
    assert done.code == 0 and done.out.startswith(dry.out)
    target = place(run, "v2") / tag(14)
    assert target.samefile(done.out.split()[-1]) and " forked by " in done.out
    manifest = verify_checkpoint(target)
    assert (manifest.path, manifest.policy) == ("v2", Policy(beta2=0.98, weight_decay=0.0))
    assert manifest.next_lr == branch.lr(14)
    assert records(run, BranchRecord) == [
        BranchRecord(
            manifest=manifest.digest,
            folder="path_switching/v2/checkpoints/global_step14",
            paradigm="path_switching",
            path="v2",
            parent_path="main",
            fork_step=14,
            parent=read_manifest(source).digest,
            policy={"beta2": 0.98, "weight_decay": 0.0},
        )
    ]


def test_fork_again_says_so_and_completes_the_ledger(run: Path) -> None:
    arguments = ("fork", run, "main@14", "--to", "v2", "--reset-moments", "--gradient-clipping", 0.5)
    assert "kept        weights, random states" in pathswitch(*arguments).out
    shutil.rmtree(run / "ledger")
    for _ in range(2):
        done = pathswitch(*arguments)
        assert done.code == 0 and "v2: forked already" in done.out
        assert [r.policy for r in records(run, BranchRecord)] == [{"reset_moments": True, "gradient_clipping": 0.5}]
    assert "there is already" in refused(*arguments[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["main@16", "--to", "v2"],
            "given 'main@16'; allowed: main@14, where v2 forks by the plan; committed checkpoi",
        ),
        (["main@16", "--to", "v2"], "committed checkpoints of main: 4, 14, 16"),
        (["main@latest", "--to", "v2"], "given 'main@latest (step 16)'; allowed: main@14"),
        (["v1@14", "--to", "v2"], "given 'v1@14'; allowed: main@STEP, main@latest or latest"),
        (["14", "--to", "v2"], "given '14'; allowed: main@STEP"),
        (["main@24", "--to", "v3"], "main has no committed checkpoint at step 24, where v3 forks; committed checkpoi"),
        (["main@14", "--to", "main"], "--to: given 'main'; allowed: a branch of the plan: v1, v2, v3"),
        (["main@14", "--to", "v22"], "did you mean 'v2'?"),
        (["main@14", "--to", "v2", "--beta2", "1"], "--beta2: given 1.0; allowed: 0 < beta2 < 1"),
        (["main@14", "--to", "v2", "--beta2", "nan"], "--beta2: given nan"),
        (
            ["main@14", "--to", "v2", "--weight-decay", "-1"],
            "--weight-decay: given -1.0; allowed: a finite number >= 0",
        ),
        (["main@14", "--to", "v2", "--gradient-clipping", "inf"], "--gradient-clipping: given inf"),
        (["main@14", "--to", "v2", "--verify", "off"], "--verify: given 'off'; allowed: full, sizes"),
        (["main@14", "--to", "v2", "--signing-key-file", "nowhere"], "signing_key_file: given 'nowhere'"),
    ],
)
def test_fork_refuses(run: Path, arguments: list[str], message: str) -> None:
    before = snapshot(run)
    assert message in refused("fork", run, *arguments)
    assert snapshot(run) == before


def test_latest_is_the_newest_of_main(run: Path) -> None:
    shutil.rmtree(place(run, "main") / tag(16))
    for source in ("latest", "main@latest"):
        assert pathswitch("fork", run, source, "--to", "v2").code == 0


def test_a_branch_from_scratch_has_nothing_to_fork(tmp_path: Path) -> None:
    versions = ({"name": "v1", "steps": 10, "alpha": 1.0},)
    RunFolder(tmp_path).open(PlanFile.model_validate({"schedule": {"max_lr": 1e-3}, "versions": versions}))
    said = refused("fork", tmp_path, "main@0", "--to", "v1", "--beta2", 0.9)
    assert "--to: given 'v1'; allowed: a branch that forks after step 0: this one starts from scratch" in said


def test_a_run_without_a_plan(tmp_path: Path) -> None:
    for command in (["fork", tmp_path, "main@14", "--to", "v2"], ["gc", tmp_path]):
        assert "plan.toml" in refused(*command)


def test_damage_is_named_and_sizes_do_not_see_it(run: Path) -> None:
    flip_bit(place(run, "main") / tag(14) / SHARDS[0])
    assert f"{SHARDS[0]}: expected blake3" in refused("fork", run, "main@14", "--to", "v2")
    (place(run, "main") / tag(4) / MANIFEST_FILE).unlink()
    assert f"{tag(4)}: not committed" in refused("fork", run, "main@4", "--to", "v1")
    assert pathswitch("fork", run, "main@14", "--to", "v2", "--verify", "sizes").code == 0


def test_a_checkpoint_of_another_schedule_is_not_forked(run: Path) -> None:
    save(place(run, "main"), 14)
    assert "trained by another schedule than path 'main'" in refused("fork", run, "main@14", "--to", "v2")


@pytest.mark.parametrize("outside", [False, True])
def test_checkpoints_of_a_users_own_script_are_found_by_the_ledger(run: Path, tmp_path: Path, outside: bool) -> None:
    shutil.rmtree(place(run, "main"))
    own = tmp_path / "scratch" if outside else run / "ckpts"
    folder = checkpoint(own, "main", 14)
    recorded(run, folder, str(folder) if outside else f"ckpts/{tag(14)}")
    into = tmp_path / "branches" / "v2"
    done = pathswitch("fork", run, "main@latest", "--to", "v2", "--into", into)
    assert done.code == 0 and verify_checkpoint(into / tag(14)).path == "v2"
    assert records(run, BranchRecord)[0].folder == str(into / tag(14))
    assert not (run / "path_switching" / "v2").exists()


def test_two_forks_may_run_at_once(run: Path) -> None:
    with locked(run, "v2", held=False), (run / "path_switching" / "v2" / "lock").open() as other_fork:
        fcntl.flock(other_fork, fcntl.LOCK_SH)
        assert pathswitch("fork", run, "main@14", "--to", "v2").code == 0


def test_a_branch_that_is_trained_is_not_forked(run: Path) -> None:
    with locked(run, "v2"):
        assert "a job is training 'v2'" in refused("fork", run, "main@14", "--to", "v2")
    assert pathswitch("fork", run, "main@14", "--to", "v2").code == 0


def test_keys(run: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "short").write_text("short")
    fork = ("fork", run, "main@14", "--to", "v2", "--signing-key-file")
    assert "is not signed" in refused(*fork, tmp_path / "key")
    assert "signing_key_file" in refused(*fork, tmp_path / "short")
    checkpoint(place(run, "main"), "main", 14, key=KEY.encode())
    assert "--verify: given 'sizes'; allowed: full" in refused(*fork, tmp_path / "key", "--verify", "sizes")
    assert pathswitch(*fork, tmp_path / "key").code == 0
    verify = ("verify", place(run, "v2"), "--signing-key-file", tmp_path / "key")
    assert pathswitch(*verify).code == 0
    assert "--mode: given 'sizes'; allowed: full" in refused(*verify, "--mode", "sizes")
    (tmp_path / "key").write_text("another key of enough bytes")
    done = pathswitch(*verify)
    assert done.code == 1 and "is signed with another key" in done.out


# verify


def test_verify_names_every_problem(run: Path) -> None:
    assert pathswitch("verify", run).code == 0
    damaged, unfinished = place(run, "main") / tag(14), place(run, "main") / tag(16)
    flip_bit(damaged / SHARDS[0])
    (damaged / SHARDS[1]).unlink()
    (unfinished / MANIFEST_FILE).unlink()
    done = pathswitch("verify", run)
    assert done.code == 1
    assert f"{damaged}: {SHARDS[0]}: expected blake3" in done.out
    assert f"{damaged}: {SHARDS[1]}: expected 300 bytes, found no such file" in done.out
    assert (
        f"{unfinished}: {MANIFEST_FILE}: expected the manifest of a whole checkpoint, found not committed" in done.out
    )
    by_step = {result.get("step"): result for result in json.loads(pathswitch("verify", run, "--json").out)}
    assert by_step[4] == {
        "folder": str(place(run, "main") / tag(4)),
        "paradigm": "path_switching",
        "path": "main",
        "step": 4,
        "digest": read_manifest(place(run, "main") / tag(4)).digest,
        "whole": True,
        "problems": [],
    }
    assert [problem["file"] for problem in by_step[14]["problems"]] == [SHARDS[0], SHARDS[1]]
    assert by_step[None]["whole"] is False and by_step[None]["digest"] is None
    assert pathswitch("verify", place(run, "main") / tag(4)).code == 0
    (damaged / "extra_states.pt").write_bytes(b"")
    sizes = json.loads(pathswitch("verify", damaged, "--mode", "sizes", "--json").out)
    assert [problem["file"] for problem in sizes[0]["problems"]] == ["extra_states.pt", SHARDS[1]]


def test_verify_finds_what_the_ledger_places_elsewhere(run: Path, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "scratch", "main", 12)
    recorded(run, folder, str(folder))
    recorded(run, place(run, "main") / tag(4), f"path_switching/main/checkpoints/{tag(4)}")
    found = [result["step"] for result in json.loads(pathswitch("verify", run, "--json").out)]
    assert found == [4, 14, 16, 12]


def test_verify_without_any_checkpoint(tmp_path: Path) -> None:
    assert f"PATH: given '{tmp_path}'" in refused("verify", tmp_path)
    assert "PATH: given" in refused("verify", tmp_path / "nowhere")
    assert "--mode: given 'off'" in refused("verify", tmp_path, "--mode", "off")


# gc


def garbage(run: Path, *options: object) -> dict[str, Any]:
    done = pathswitch("gc", run, "--json", *options)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def steps(found: dict[str, Any], keep: bool) -> list[tuple[str, int]]:
    return [(item["path"], item["step"]) for item in found["checkpoints"] if item["keep"] == keep]


def test_gc_prunes_what_no_path_needs(run: Path) -> None:
    main_path = place(run, "main")
    for step in (6, 8, 18):
        checkpoint(main_path, "main", step)
    before = snapshot(run)
    dry = garbage(run, "--dry-run")
    assert snapshot(run) == before and steps(dry, False) == [("main", 6), ("main", 8), ("main", 16)]
    assert dry["freed_bytes"] > 3 * 900
    digests = [read_manifest(main_path / tag(step)).digest for step in (6, 8, 16)]
    assert garbage(run) == dry
    assert sorted(os.listdir(main_path)) == ["global_step14", "global_step18", "global_step4", "latest"]
    pruned = records(run, PrunedRecord)
    assert sorted(r.manifest for r in pruned) == sorted(digests)
    assert {r.folder for r in pruned} == {f"path_switching/main/checkpoints/{tag(step)}" for step in (6, 8, 16)}
    again = garbage(run)
    assert steps(again, False) == [] and again["freed_bytes"] == 0
    shown = pathswitch("gc", run, "--keep-last", 2).out
    assert "freed 0 bytes" in shown and "v2 forks from it" in shown


def test_gc_keeps_more_resume_points_if_asked(run: Path) -> None:
    for step in (6, 8, 18):
        checkpoint(place(run, "main"), "main", step)
    assert steps(garbage(run, "--keep-last", 3), False) == [("main", 6), ("main", 8)]
    assert pathswitch("gc", run, "--keep-last", 0).code == 2


def test_gc_knows_all_paradigms_and_what_has_ended(run: Path) -> None:
    chain = {"v1": (5, 10), "v2": (12, 15)}
    for name, at in chain.items():
        for step in at:
            checkpoint(place(run, name, "wsd_s"), name, step, "wsd_s")
    for step in (6, 10):
        checkpoint(place(run, "v1"), "v1", step)
    (run / "path_switching" / "v1" / "done.json").write_text(json.dumps({"end_step": 10}))
    found = garbage(run)
    assert steps(found, False) == [("v1", 6), ("v1", 5), ("v2", 12)]
    reasons = {(item["paradigm"], item["path"], item["step"]): item["reason"] for item in found["checkpoints"]}
    assert reasons["path_switching", "main", 4] == "v1 forked from it"
    assert reasons["path_switching", "v1", 10] == "v1 ended there"
    assert reasons["wsd_s", "v1", 10] == "v2 forks from it"


def test_gc_keeps_what_the_ledger_says_was_forked_or_released(run: Path) -> None:
    main_path = place(run, "main")
    forked, released = (checkpoint(main_path, "main", step) for step in (6, 8))
    digests = [read_manifest(folder).digest for folder in (forked, released)]
    ledger = Ledger(run / "ledger")
    ledger.append(BranchRecord("f" * 64, "gone", "path_switching", "v0", "main", 6, digests[0], {}))
    ledger.append(ReleaseRecord("release", "path_switching", "main", 8, digests[1], "d" * 64))
    reasons = {item["step"]: item["reason"] for item in garbage(run)["checkpoints"]}
    assert (reasons[6], reasons[8]) == ("v0 was forked from it", "main was released from it")


def test_gc_leaves_damaged_and_uncommitted_folders_alone(run: Path) -> None:
    main_path = place(run, "main")
    for step in (18, 20):
        checkpoint(main_path, "main", step)
    (main_path / tag(20) / SHARDS[0]).write_bytes(b"cut")
    (main_path / tag(18) / MANIFEST_FILE).unlink()
    found = garbage(run)
    assert steps(found, False) == [] and steps(found, True)[-1] == ("main", 16)  # the newest that is whole
    said = {Path(item["folder"]).name: item["reason"] for item in found["unusable"]}
    assert "not committed" in said[tag(18)] and "expected 300 bytes, found 3 bytes" in said[tag(20)]
    assert (main_path / tag(18)).is_dir() and (main_path / tag(20)).is_dir()
    assert "left alone: " in pathswitch("gc", run).out


def test_gc_of_a_users_own_checkpoints(run: Path, tmp_path: Path) -> None:
    own = tmp_path / "scratch"
    for step in (5, 7, 9):
        recorded(run, checkpoint(own, "main", step), str(own / tag(step)))
    checkpoint(own, "main", 6)  # not in this run's ledger
    checkpoint(own, "main", 5, text="another job's")
    recorded(run, checkpoint(own, "main", 3), str(own / tag(3)))
    (own / tag(3)).rename(begun := own / f".{tag(3)}.pruning")
    checkpoint(own, "main", 9)
    found = garbage(run)
    assert not begun.exists()
    assert ("main", 7) in steps(found, False)
    assert [item["folder"] for item in found["unusable"]] == [str(own / tag(5))]
    assert sorted(os.listdir(own)) == ["global_step5", "global_step6", "global_step9", "latest"]
    pruned = {r.folder for r in records(run, PrunedRecord)}
    assert {str(own / tag(step)) for step in (3, 7)} == {folder for folder in pruned if folder.startswith(str(own))}


def test_gc_finishes_what_a_killed_one_began(run: Path) -> None:
    main_path = place(run, "main")
    folder = checkpoint(main_path, "main", 6)
    digest, hidden = read_manifest(folder).digest, main_path / f".{tag(6)}.pruning"
    folder.rename(hidden)
    (hidden / SHARDS[0]).unlink()
    assert garbage(run, "--dry-run")["unfinished"] == [f"path_switching/main/checkpoints/.{tag(6)}.pruning"]
    assert records(run, PrunedRecord) == [] and hidden.is_dir()
    garbage(run)
    assert not hidden.exists()
    assert records(run, PrunedRecord) == [PrunedRecord(digest, f"path_switching/main/checkpoints/{tag(6)}")]


def test_gc_sweeps_only_where_no_job_can_be(run: Path) -> None:
    main_path, v2 = place(run, "main"), place(run, "v2")
    begin_save(main_path / tag(18))
    (main_path / f".{tag(14)}.universal-path_switching-v2.0a1b").mkdir()
    v2.mkdir(parents=True)
    (v2 / f".{tag(14)}.forking-0a").mkdir()
    assert garbage(run)["leftovers"] == []  # without lock files nobody knows
    with locked(run, "main"), locked(run, "v2", held=False):
        assert garbage(run)["leftovers"] == [f"path_switching/v2/checkpoints/.{tag(14)}.forking-0a"]
    with locked(run, "v2"):
        assert garbage(run)["leftovers"] == [f"path_switching/main/checkpoints/.{tag(18)}.saving"]
    assert (main_path / f".{tag(14)}.universal-path_switching-v2.0a1b").is_dir()  # v2's job is loading it
    assert len(garbage(run)["leftovers"]) == 1
    assert [f for f in (*os.listdir(main_path), *os.listdir(v2)) if f.startswith(".")] == []


def test_gc_keeps_what_latest_names(run: Path) -> None:
    for step in (18, 6):  # the last save moved `latest` back
        checkpoint(place(run, "main"), "main", step)
    assert steps(garbage(run), False) == [("main", 16)]


def test_gc_of_a_plan_that_suits_path_switching_alone(tmp_path: Path) -> None:
    versions = ({"name": "v1", "steps": 10}, {"name": "v2", "steps": 3})  # too short for a warm-up of its own
    RunFolder(tmp_path).open(
        PlanFile.model_validate({"schedule": {"max_lr": 1e-3, "warmup_steps": 4}, "versions": versions})
    )
    for step in (2, 4, 6):
        save(place(tmp_path, "main"), step)
    assert steps(garbage(tmp_path), False) == [("main", 2)]


def test_gc_of_a_running_path_prunes_what_is_surely_old(run: Path) -> None:
    for step in (6, 18):
        checkpoint(place(run, "main"), "main", step)
    with locked(run, "main"):
        assert steps(garbage(run), False) == [("main", 6), ("main", 16)]


def test_a_failing_removal_is_one_error_and_the_next_gc_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place(run, "main") / tag(16)
    checkpoint(place(run, "main"), "main", 18)

    def fail(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        assert "cannot be removed (Permission denied)" in refused("gc", run)
    assert not folder.exists() and records(run, PrunedRecord) == []
    garbage(run)
    assert len(records(run, PrunedRecord)) == 1


# adopt


def deepspeed_files(folder: Path, stage: int = 1, ranks: int = 2, **changes: Any) -> Path:
    """What DeepSpeed writes, as far as adoption reads it."""
    folder.mkdir(parents=True)
    state: dict[str, Any] = {
        "module": {"weight": torch.ones(2, dtype=torch.bfloat16)},
        "lr_scheduler": None,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "global_steps": 15,
        "global_samples": 240,
        "ds_config": {"zero_optimization": {"stage": stage}} if stage else {},
        "ds_version": "0.19.8",
        **changes,
    }
    names = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)]
    for name in names if stage == 3 else ["mp_rank_00_model_states.pt"]:
        torch.save(state, folder / name)
    for rank in range(ranks) if stage else ():
        prefix = "bf16_" if stage == 2 else ""
        torch.save({}, folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def scheduler_state(path: str, step: int, paradigm: str = "path_switching") -> dict[str, Any]:
    of = PLAN.path(path, paradigm)  # type: ignore[arg-type]
    known = {"format": 1, "step": step, "paradigm": paradigm, "path": path}
    return {**known, "schedule": dict(of.fields), "digest": of.digest}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adopt_reads_what_the_checkpoint_says_of_itself(tmp_path: Path, stage: int) -> None:
    folder = deepspeed_files(tmp_path / tag(15), stage, lr_scheduler=scheduler_state("v2", 14))
    done = pathswitch("adopt", folder)
    assert done.code == 0 and "unpickled" in done.out and "committed as step 14 of path_switching/v2" in done.out
    manifest = verify_checkpoint(folder)
    assert (manifest.tag, manifest.path, manifest.step, manifest.global_steps) == (tag(15), "v2", 14, 15)
    assert (manifest.samples_seen, manifest.dtype, manifest.parent) == (240, "bf16", None)
    assert manifest.next_lr == PLAN.path("v2").lr(14) and manifest.schedule_digest == PLAN.path("v2").digest
    sizes = manifest.parallelism
    assert (sizes.zero_stage, sizes.world_size, sizes.data_parallel_size) == (stage, 2, 2)
    assert set(manifest.files) == set(os.listdir(folder)) - {MANIFEST_FILE}
    assert "has a manifest already" in refused("adopt", folder)


@pytest.mark.parametrize(("stage", "told"), [(0, 0), (1, 1), (2, 1), (3, 3)])
def test_adopt_tells_the_stage_by_the_files_where_the_ds_config_was_one(tmp_path: Path, stage: int, told: int) -> None:
    saved = scheduler_state("main", 14)
    folder = deepspeed_files(tmp_path / tag(15), stage, lr_scheduler=saved, ds_config="ds_config.json")
    assert pathswitch("adopt", folder).code == 0
    assert read_manifest(folder).parallelism.zero_stage == told  # stages 1 and 2 are cut alike


@pytest.mark.parametrize(
    ("path", "paradigm"),
    [("main", "path_switching"), ("v3", "path_switching"), ("v1", "ptfs"), ("v2", "cpt_rewarm"), ("v2", "cpt_floor")],
)
def test_adopt_finds_the_lr_in_the_saved_schedule(tmp_path: Path, path: str, paradigm: str) -> None:
    folder = deepspeed_files(tmp_path / tag(15), lr_scheduler=scheduler_state(path, 13, paradigm))
    assert pathswitch("adopt", folder).code == 0
    assert read_manifest(folder).next_lr == PLAN.path(path, paradigm).lr(13)  # type: ignore[arg-type]


@pytest.mark.parametrize("fields", [{"max_lr": 1e-3}, {"constant_lr": 1e-4, "drops": 3}, {"shape": "spiral"}])
def test_adopt_does_not_guess_an_unknown_schedule(tmp_path: Path, fields: dict[str, Any]) -> None:
    saved = scheduler_state("main", 13)
    known = {} if "constant_lr" in fields else saved["schedule"]
    unknown = {**known, **fields} if fields.keys() != {"max_lr"} else fields
    folder = deepspeed_files(tmp_path / tag(15), lr_scheduler={**saved, "schedule": unknown})
    assert "is not known here: give its plan (--plan)" in refused("adopt", folder)


def test_adopt_of_another_schedulers_checkpoint(tmp_path: Path, run: Path) -> None:
    folder = deepspeed_files(tmp_path / tag(15), lr_scheduler={"last_batch_iteration": 14}, ds_config="ds.json")
    assert "--step: given 'nothing'; allowed: a value:" in refused("adopt", folder)
    assert "--plan: given 'nothing'" in refused("adopt", folder, "--step", 14)
    plan = ("--plan", run / "plan.toml")
    assert "given 'v9'" in refused("adopt", folder, "--step", 14, "--path", "v9", *plan)
    assert "--step: given 9; allowed: 14 to 20" in refused("adopt", folder, "--step", 9, "--path", "v2", *plan)
    assert not (folder / MANIFEST_FILE).exists()
    assert pathswitch("adopt", folder, "--step", 14, *plan).code == 0
    manifest = verify_checkpoint(folder)
    assert (manifest.path, manifest.step, manifest.next_lr) == ("main", 14, 1e-3)
    assert manifest.parallelism.zero_stage == 1 and manifest.plan_digest == PLAN.digest
    # It can be forked like any other.
    folder.rename(place(run, "main") / tag(24))
    shutil.rmtree(place(run, "main") / tag(14))
    assert pathswitch("fork", run, "main@14", "--to", "v2").code == 0


def test_adopt_does_not_contradict_the_checkpoint(tmp_path: Path, run: Path) -> None:
    folder = deepspeed_files(tmp_path / tag(15), lr_scheduler=scheduler_state("v2", 14))
    assert "--step: given 15; allowed: 14" in refused("adopt", folder, "--step", 15)
    assert "--path: given 'main'; allowed: v2" in refused("adopt", folder, "--path", "main")
    changed = tmp_path / "changed.toml"
    changed.write_text((run / "plan.toml").read_text().replace("0.001", "0.002"))
    assert "trained by another schedule than path 'v2'" in refused("adopt", folder, "--plan", changed)
    assert pathswitch("adopt", folder, "--step", 14, "--path", "v2", "--plan", run / "plan.toml").code == 0


@pytest.mark.parametrize(
    ("stage", "name"),
    [(1, "zero_pp_rank_1_mp_rank_00_optim_states.pt"), (3, "zero_pp_rank_1_mp_rank_00_model_states.pt")],
)
def test_adopt_refuses_what_is_visibly_incomplete(tmp_path: Path, stage: int, name: str) -> None:
    folder = deepspeed_files(tmp_path / tag(15), stage, lr_scheduler=scheduler_state("main", 14))
    (folder / name).write_bytes(b"")
    assert f"{name} is empty; saved under ZeRO stage {stage} by 2 data-parallel" in refused("adopt", folder)
    (folder / name).unlink()
    assert f"{name} is missing" in refused("adopt", folder)
    assert not (folder / MANIFEST_FILE).exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "cannot be read"), (b"PK\x03\x04 half a file", "cannot be read"), (None, "holds no module")],
)
def test_adopt_refuses_what_deepspeed_did_not_write(tmp_path: Path, content: bytes | None, message: str) -> None:
    folder = tmp_path / tag(15)
    assert "not a checkpoint of DeepSpeed" in refused("adopt", folder)
    folder.mkdir()
    if content is None:
        torch.save({"weights": torch.ones(1)}, folder / "mp_rank_00_model_states.pt")
    else:
        (folder / "mp_rank_00_model_states.pt").write_bytes(content)
    assert message in refused("adopt", folder)
    (folder / "layer_00-model_states.pt").write_bytes(b"")
    assert "of a pipeline engine" in refused("adopt", folder)


def test_fork_gc_and_verify_need_neither_torch_nor_deepspeed(run: Path) -> None:
    commands = [["fork", str(run), "main@14", "--to", "v2"], ["gc", str(run)], ["verify", str(run)]]
    code = (
        "import sys; from pathswitch.cli.app import app\n"
        f"for command in {commands!r}:\n"
        "    try: app(command)\n"
        "    except SystemExit as done: assert not done.code\n"
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
