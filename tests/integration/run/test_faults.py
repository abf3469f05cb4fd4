"""Killed, interrupted and misled runs: an error that says why, nothing left running, and the same bits after all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from run_harness import SIZE, Write, assert_equal_runs, pathswitch, ranks_of, start, wait_for_step, wait_until_gone

pytestmark = pytest.mark.slow


def test_kill_9_of_one_rank_then_the_same_bits(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start("run", corpus / "faults.toml", "--out", out)
    wait_for_step(run, out, 10)
    ranks = ranks_of(out)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2
    assert "path_switching/main did not complete" in errors
    wait_until_gone(ranks)
    again = pathswitch("run", corpus / "faults.toml", "--out", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "starting at step 0 " not in again.stdout
    assert_equal_runs(out, uninterrupted)


def test_a_dead_launcher_takes_its_ranks_with_it(write_plan: Write, tmp_path: Path) -> None:
    """Killed by signal 9, DeepSpeed's launcher leaves its ranks training."""
    plan, out = write_plan("long", **{**SIZE, "steps": 5000}), tmp_path / "run"
    run = start("run", plan, "--out", out)
    wait_for_step(run, out, 2)
    ranks = ranks_of(out)
    launcher = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGKILL)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 2
    assert "did not complete (launcher exit code -9)" in errors
    wait_until_gone(ranks)


def test_sigterm_ends_all_ranks_and_the_next_call_goes_on(uninterrupted: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start("run", corpus / "faults.toml", "--out", out)
    wait_for_step(run, out, 6)
    ranks = ranks_of(out)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 130
    assert "run the same command again" in errors
    wait_until_gone(ranks)
    again = pathswitch("run", corpus / "faults.toml", "--out", out)
    assert again.returncode == 0, again.stdout + again.stderr
    assert_equal_runs(out, uninterrupted)


def test_two_runs_of_one_path_cannot_mix(write_plan: Write, tmp_path: Path) -> None:
    plan, out = write_plan("long", **{**SIZE, "steps": 5000}), tmp_path / "run"
    first = start("run", plan, "--out", out)
    wait_for_step(first, out, 1)
    second = pathswitch("run", plan, "--out", out)
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert second.returncode == 2
    assert "is training this path" in second.stderr


def test_a_plan_that_disagrees_with_its_folder_is_refused(uninterrupted: Path, write_plan: Write) -> None:
    longer = write_plan("longer", **{**SIZE, "steps": 50})
    other_model = write_plan("other", **{**SIZE, "hidden_size": 64})
    other_seed = pathswitch("run", longer.with_name("faults.toml"), "--out", uninterrupted, "--seed", 7)
    for done, words in (
        (pathswitch("run", longer, "--out", uninterrupted), ["[version v1] steps", "40", "50"]),
        (pathswitch("run", other_model, "--out", uninterrupted), ["[model] hidden_size", "128", "64"]),
        (other_seed, ["[train] seed", "1", "7"]),
    ):
        assert done.returncode == 2
        assert all(word in done.stderr for word in words), done.stderr
        assert done.stderr.count("\n") == 1


def test_more_frequent_saves_are_not_another_plan(uninterrupted: Path, write_plan: Write) -> None:
    plan = write_plan("saves", **{**SIZE, "train": "save_every_steps = 5"})
    done = pathswitch("run", plan, "--out", uninterrupted)
    assert done.returncode == 0, done.stderr
