"""The checkpoints of a run as a user handles them: log, verify, fork, damage, another number of ranks, gc."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from run_harness import checkpoint, metrics, pathswitch, write_tiny_plan

from pathswitch.checkpoint import read_manifest, verify_checkpoint

pytestmark = pytest.mark.slow

# Versions of 10 steps with alpha 0.6: forks at 4, 14 and 24.
FORK_2, END_2, FORK_3 = 14, 20, 24


def log_of(run: Path) -> str:
    shown = pathswitch("log", run)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout


def shard(folder: Path) -> Path:
    return max(folder.glob("*optim_states.pt"))


@pytest.fixture
def copied(two_versions: Path, tmp_path: Path) -> Path:
    """A copy of the run with two versions."""
    return shutil.copytree(two_versions, tmp_path / "run")


@pytest.fixture(scope="module")
def extended(two_versions: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The run, forked with a policy, damaged, and extended by a version on another number of ranks."""
    run = shutil.copytree(two_versions, tmp_path_factory.mktemp("extended") / "run")
    paths, seen = run / "path_switching", {}
    shutil.rmtree(paths / "v2")
    options = ("--to", "v2", "--beta2", 0.5, "--weight-decay", 0.02, "--reset-moments")
    seen["dry"] = pathswitch("fork", run, f"main@{FORK_2}", *options, "--dry-run")
    seen["nothing yet"] = not (paths / "v2").exists()
    seen["fork"] = pathswitch("fork", run, f"main@{FORK_2}", *options)
    seen["again"] = pathswitch("fork", run, f"main@{FORK_2}", *options)
    seen["otherwise"] = pathswitch("fork", run, f"main@{FORK_2}", "--to", "v2")
    newest = shard(paths / "main" / "checkpoints" / f"global_step{FORK_2}")
    # Not in place: the fork's file is the same one.
    content = newest.read_bytes()[:-7]
    newest.unlink()
    newest.write_bytes(content)
    plan = write_tiny_plan(corpus, "extended", versions=3, train="ranks = 1")
    plan.write_text(plan.read_text().replace("ranks = 2\n", ""))
    seen["refused"] = pathswitch("run", plan, "--out", run)
    seen["steps when refused"] = len(metrics(paths, "main"))
    seen["run"] = pathswitch("run", plan, "--out", run, "--on-damage", "previous")
    seen["path"] = run
    yield seen


def test_log_shows_the_lineage(two_versions: Path) -> None:
    text = log_of(two_versions)
    assert text.index("v2") < text.index("main"), "newest on top"
    for expected in ("main", "v1", "v2", "release ", "committed", "perplexity"):
        assert expected in text
    shown = json.loads(pathswitch("log", two_versions, "--json").stdout)
    assert json.dumps(shown).count('"committed"') >= 6


def test_verify_names_what_is_damaged(copied: Path) -> None:
    assert pathswitch("verify", copied).returncode == 0
    victim = shard(copied / "path_switching" / "v2" / "checkpoints" / f"global_step{END_2}")
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    damaged = pathswitch("verify", copied)
    assert damaged.returncode == 1
    assert victim.name in "".join(damaged.stdout.split())
    assert pathswitch("verify", copied, "--mode", "sizes").returncode == 0


def test_a_fork_is_shown_before_it_is_made(extended: dict[str, Any]) -> None:
    for shown in (extended["dry"], extended["fork"]):
        assert shown.returncode == 0, shown.stderr
        assert all(f"{step}" in shown.stdout for step in (FORK_2 - 1, FORK_2, FORK_2 + 1))
        for expected in ("0.5", "0.02", "moments", "random", "data"):
            assert expected in shown.stdout
    assert extended["nothing yet"]


def test_a_fork_can_be_repeated_but_not_changed(extended: dict[str, Any]) -> None:
    assert extended["again"].returncode == 0
    assert extended["otherwise"].returncode == 2
    assert "already" in extended["otherwise"].stderr


def test_a_fork_survives_damage_to_its_parent(extended: dict[str, Any]) -> None:
    """What replaced the parent's shard is another file; the branch is trained by its policy."""
    end = extended["path"] / "path_switching" / "v2" / "checkpoints" / f"global_step{END_2}"
    manifest = verify_checkpoint(end)
    assert manifest.policy.changes() == {"beta2": 0.5, "weight_decay": 0.02, "reset_moments": True}
    groups = torch.load(shard(end), weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]
    assert [(group["betas"][1], group["weight_decay"]) for group in groups] == [(0.5, 0.02), (0.5, 0.0)]


def test_damage_is_refused_until_the_user_asks_to_go_back(extended: dict[str, Any]) -> None:
    refused = extended["refused"]
    assert refused.returncode == 2
    assert f"main/checkpoints/global_step{FORK_2}: damaged: " in refused.stderr
    assert "optim_states.pt: expected " in refused.stderr
    assert "on_damage" in refused.stderr
    assert extended["steps when refused"] == FORK_2, "no update was trained"
    assert extended["run"].returncode == 0, extended["run"].stdout + extended["run"].stderr


def test_the_main_path_went_on_with_one_rank_at_the_same_lr(extended: dict[str, Any], two_versions: Path) -> None:
    """The steps behind the older checkpoint are the same updates, added up in another order."""
    before = metrics(two_versions / "path_switching", "main")
    after = metrics(extended["path"] / "path_switching", "main")
    assert len(after) == FORK_3
    assert after[:4] == before[:4]
    for old, new in zip(before, after, strict=False):
        assert new["lr"] == old["lr"]
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-5)
    end = extended["path"] / "path_switching" / "v3" / "checkpoints" / "global_step30"
    assert read_manifest(end).parallelism.world_size == 1
    assert checkpoint(extended["path"] / "path_switching", "v3", 30)


def test_the_ledger_tells_it_all(extended: dict[str, Any]) -> None:
    text = log_of(extended["path"])
    for expected in ("v3", "main", f"from main {FORK_2}", "committed"):
        assert expected in text
    assert pathswitch("verify", extended["path"]).returncode == 0, "the damaged checkpoint was saved again"


def test_gc_keeps_what_is_needed(copied: Path, corpus: Path) -> None:
    main = copied / "path_switching" / "main" / "checkpoints"
    before = sorted(folder.name for folder in main.iterdir())
    dry = pathswitch("gc", copied, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert sorted(folder.name for folder in main.iterdir()) == before
    done = pathswitch("gc", copied)
    assert done.returncode == 0, done.stderr
    assert {"global_step4", "global_step14"} <= {folder.name for folder in main.iterdir()}
    assert pathswitch("verify", copied).returncode == 0
    three = write_tiny_plan(corpus, "after_gc", versions=3)
    again = pathswitch("run", three, "--out", copied)
    assert again.returncode == 0, again.stdout + again.stderr
