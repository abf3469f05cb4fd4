"""Megatron core alone, tensor parallelism 1 and 2: the same bits after forks, kills and resumes; faults are refused."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import core_ranks
import pytest
from typer.testing import CliRunner

from pathswitch.checkpoint import MANIFEST_FILE, committed_checkpoints, iteration_folder, read_manifest
from pathswitch.cli.app import app
from pathswitch.config import build_plan, load_plan_file
from pathswitch.versions.ledger import run_ledger

pytestmark = pytest.mark.slow
PLAN = """
[schedule]
max_lr = 1e-3
warmup_steps = 5
{final_lr}

[[versions]]
name = "v1"
steps = 40
decay_steps = 17
"""
FORK, END = 23, 40


@dataclass
class Core:
    """A folder with a plan, to train in with Megatron core over some tensor-parallel ranks."""

    folder: Path
    ranks: int

    def train(self, name: str, jobs: list[dict[str, Any]], plan: str = "plan.toml", *, dies: bool = False) -> list[Any]:
        """Train jobs in one launch; return for each job what every rank says."""
        (self.folder / f"{name}.json").write_text(json.dumps(jobs))
        result = core_ranks.run(
            "worker_core.py", f"{name}.json", folder=self.folder, ranks=self.ranks, extra={"PATHSWITCH_PLAN": plan}
        )
        assert (result.returncode != 0) == dies, result.output[-4000:]
        if dies:
            return []
        ranks = [json.loads((self.folder / f"{name}-rank{rank}.json").read_text()) for rank in range(self.ranks)]
        return list(zip(*ranks, strict=True))


@pytest.fixture(scope="module", params=[1, 2], ids=["TP 1", "TP 2"])
def core(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Core:
    folder = tmp_path_factory.mktemp(f"core{request.param}")
    (folder / "plan.toml").write_text(PLAN.format(final_lr=""))
    return Core(folder, int(request.param))


@pytest.fixture(scope="module")
def whole(core: Core) -> dict[str, Any]:
    """The main path in one go, and its branch from the checkpoint at the fork."""
    main, branch = core.train(
        "whole",
        [
            {"path": "main", "until": END, "save": "main", "save_at": [12, FORK, END]},
            {"path": "v1", "until": END, "load": "main", "iteration": FORK, "save": "v1", "save_at": [30, END]},
        ],
    )
    return {"main": main, "v1": branch}


def lrs(outcome: dict[str, Any]) -> list[float]:
    return [lr for _, lr, _ in outcome["steps"]]


def test_every_update_uses_the_plans_lr(core: Core, whole: dict[str, Any]) -> None:
    plan = build_plan(load_plan_file(core.folder / "plan.toml"))
    for path, first in (("main", 0), ("v1", FORK)):
        for rank in whole[path]:
            assert lrs(rank) == [plan.path(path).lr(step) for step in range(first, END)]
    assert whole["main"][0]["steps"][FORK] == whole["v1"][0]["steps"][0], "the branch's first update is the main path's"
    assert whole["main"][0]["digest"] != whole["v1"][0]["digest"]


def test_manifests_and_ledger(core: Core, whole: dict[str, Any]) -> None:
    folder = core.folder / "main" / iteration_folder(FORK)
    manifest = read_manifest(folder)
    names = manifest.files.keys()
    assert {".metadata", "metadata.json", "common.pt"} <= names
    assert {manifest.files[name].rank for name in names if name.endswith(".distcp")} == set(range(core.ranks))
    assert (manifest.path, manifest.step, manifest.samples_seen, manifest.next_lr) == ("main", FORK, 4 * FORK, 1e-3)
    assert manifest.parallelism.tensor_parallel_size == core.ranks
    assert (core.folder / "main" / "latest_checkpointed_iteration.txt").read_text() == str(END)
    branch = read_manifest(core.folder / "v1" / iteration_folder(30))
    assert branch.parent == manifest.digest
    recorded = {stored.record.manifest for stored in run_ledger(core.folder).read().records}  # type: ignore[union-attr]
    folders = [core.folder / "main", core.folder / "v1"]
    assert {m.digest for f in folders for _, m in committed_checkpoints(f)} <= recorded


def test_killed_and_resumed_is_the_same_bits(core: Core, whole: dict[str, Any]) -> None:
    job = {"path": "main", "until": END, "save": "killed", "save_at": [12, FORK, END], "load": "killed"}
    core.train("killed", [{**job, "kill_at": 31}], dies=True)
    branch = {"path": "v1", "until": END, "load": "main", "iteration": FORK, "save": "killed-v1", "save_at": [30]}
    core.train("killed-branch", [{**branch, "kill_at": 35}], dies=True)
    main, resumed = core.train("resumed", [job, {"path": "v1", "until": END, "load": "killed-v1"}])
    for rank in range(core.ranks):
        assert main[rank]["steps"] == whole["main"][rank]["steps"][FORK:]
        assert main[rank]["digest"] == whole["main"][rank]["digest"]
        assert resumed[rank]["steps"] == whole["v1"][rank]["steps"][30 - FORK :]
        assert resumed[rank]["digest"] == whole["v1"][rank]["digest"]


def test_constant_branch_is_the_main_path(core: Core, whole: dict[str, Any]) -> None:
    (core.folder / "control").mkdir()
    (core.folder / "control" / "plan.toml").write_text(PLAN.format(final_lr="final_lr = 1e-3"))
    (control,) = core.train(
        "control", [{"path": "v1", "until": END, "load": "main", "iteration": FORK}], "control/plan.toml"
    )
    assert [rank["steps"] for rank in control] == [rank["steps"][FORK:] for rank in whole["main"]]
    assert [rank["digest"] for rank in control] == [rank["digest"] for rank in whole["main"]]


def test_a_stock_jobs_checkpoint_is_adopted_and_forked(core: Core) -> None:
    own = Path("path_switching", "main", "checkpoints")
    stock = {"path": "main", "until": FORK + 1, "stock": True, "save": str(own), "save_at": [FORK]}
    branch = {"path": "v1", "until": FORK + 1, "load": "stock-v1"}
    (trained,) = core.train("stock", [stock])
    folder, plan = core.folder / own / iteration_folder(FORK), str(core.folder / "plan.toml")
    (unknown,) = core.train("unknown", [{**branch, "load": str(own), "iteration": FORK}])
    assert all("not committed" in rank["error"] for rank in unknown)
    for command in (
        ["adopt", str(folder), "--step", str(FORK), "--plan", plan],
        ["fork", str(core.folder), f"main@{FORK}", "--to", "v1", "--into", str(core.folder / "stock-v1")],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, (done.output, done.exception)
    manifest = read_manifest(core.folder / "stock-v1" / folder.name)
    assert manifest.forked_from == read_manifest(folder).digest
    assert (manifest.samples_seen, manifest.tokens_seen) == (4 * FORK, 4 * 32 * FORK)
    assert manifest.settings == {"seed": 1, "seq_length": 32, "global_batch_size": 4}
    assert manifest.parallelism.tensor_parallel_size == core.ranks
    forked, resumed = core.train("adopted", [branch, {"path": "main", "until": FORK + 1, "load": str(own)}])
    for rank, before in enumerate(trained):
        assert forked[rank]["steps"] == resumed[rank]["steps"] == before["steps"][FORK:], "the stock job's next update"
        assert forked[rank]["digest"] == resumed[rank]["digest"] == before["digest"]


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(file: Path) -> None:
    file.unlink()


SHARD = "__0_0.distcp"
# Fault -> (what is done to the files of the fork's checkpoint, what the error says).
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated shard": (lambda f: truncate(f / SHARD), f"{SHARD}: expected"),
    "flipped shard": (lambda f: flip(f / SHARD), f"{SHARD}: expected blake3"),
    "missing shard": (lambda f: remove(f / SHARD), f"{SHARD}: expected"),
    "flipped metadata": (lambda f: flip(f / ".metadata"), ".metadata: expected blake3"),
    "missing metadata": (lambda f: remove(f / ".metadata"), ".metadata: expected"),
    "flipped common state": (lambda f: flip(f / "common.pt"), "common.pt: expected blake3"),
    "foreign shard": (
        lambda f: shutil.copy(f.with_name("iter_0000012") / SHARD, f / SHARD),
        f"{SHARD}: expected blake3",
    ),
    "smuggled pickle": (lambda f: shutil.copy(f / "common.pt", f / "extra.pt"), "extra.pt: expected no such file"),
    "edited manifest": (
        lambda f: (f / MANIFEST_FILE).write_text((f / MANIFEST_FILE).read_text().replace('"step": 23', '"step": 24')),
        "edited",
    ),
    "no manifest": (lambda f: remove(f / MANIFEST_FILE), "not committed"),
    "no checkpoint": (lambda f: shutil.rmtree(f), "there is no such checkpoint"),
    "empty tracker": (lambda f: _tracker(f).write_text(""), "is empty, but the folder holds checkpoints"),
    "garbled tracker": (lambda f: _tracker(f).write_text("4x0"), "names '4x0', but the folder holds checkpoints"),
    "tracker past the commit": (lambda f: _tracker(f).write_text("50"), "names 'iter_0000050', but the folder"),
    "no tracker": (lambda f: _tracker(f).unlink(), "is missing, but the folder holds checkpoints"),
}


def _tracker(folder: Path) -> Path:
    return folder.with_name("latest_checkpointed_iteration.txt")


def test_fault_table(core: Core, whole: dict[str, Any]) -> None:
    """Every fault is refused by all ranks with one message, for a resume and for a fork, before anything is loaded."""
    jobs, expected = [], []
    for fault, (damage, message) in FAULTS.items():
        copy = core.folder / "faults" / fault.replace(" ", "-")
        shutil.copytree(core.folder / "main", copy)
        shutil.rmtree(copy / iteration_folder(END))
        _tracker(copy / iteration_folder(FORK)).write_text(str(FORK))
        damage(copy / iteration_folder(FORK))
        jobs.append({"path": "main", "until": FORK, "load": str(copy)})
        expected.append((fault, "resume", message))
        if "tracker" not in fault:
            jobs.append({"path": "v1", "until": FORK, "load": str(copy), "iteration": FORK})
            expected.append((fault, "fork", message))
    outcomes = core.train("faults", jobs)
    for (fault, action, message), ranks in zip(expected, outcomes, strict=True):
        (said,) = {rank.get("error", "loaded") for rank in ranks}
        # A folder that has lost its checkpoint is one that the tracker names in vain.
        allowed = (message, "names 'iter_0000023', but the folder") if fault == "no checkpoint" else (message,)
        assert any(text in said for text in allowed), f"{fault}, {action}: {said}"


def test_goes_back_if_asked_to(core: Core, whole: dict[str, Any]) -> None:
    (core.folder / "lenient").mkdir()
    lenient = PLAN.format(final_lr="") + '\n[megatron.checkpoint]\non_damage = "previous"\n'
    (core.folder / "lenient" / "plan.toml").write_text(lenient)
    shutil.copytree(core.folder / "main", core.folder / "damaged")
    flip(core.folder / "damaged" / iteration_folder(END) / SHARD)
    flip(core.folder / "damaged" / iteration_folder(FORK) / ".metadata")
    (outcome,) = core.train("back", [{"path": "main", "until": 15, "load": "damaged"}], "lenient/plan.toml")
    assert [rank["steps"] for rank in outcome] == [rank["steps"][12:15] for rank in whole["main"]]


def test_wrong_checkpoints_are_refused(core: Core, whole: dict[str, Any]) -> None:
    jobs = [
        {"path": "v1", "until": END, "load": "main", "iteration": 12},
        {"path": "v1", "until": END, "load": "main"},
        {"path": "main", "until": END, "load": "v1"},
        {"path": "v1", "until": END, "load": "nowhere"},
        {"path": "v1", "until": END},
        {"path": "v1", "until": END + 1, "load": "v1"},
    ]
    messages = [
        "a checkpoint of 'main' (path_switching) at step 12; path 'v1' can go on from its own, or of 'main' at step 23",
        "at step 40; path 'v1' can go on from its own",
        "a checkpoint of 'v1' (path_switching) at step 40; path 'main' can go on from its own",
        "the folder holds no checkpoint: path 'v1' starts from a checkpoint of 'main' at step 23",
        "path 'v1' starts from a checkpoint of 'main' at step 23, but the counter stands at 0",
        "path 'v1' ends at step 40 by its plan",
    ]
    for message, ranks in zip(messages, core.train("wrong", jobs), strict=True):
        (said,) = {rank.get("error", "trained") for rank in ranks}
        assert message in said
