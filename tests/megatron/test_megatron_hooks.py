"""Every hook, in a stand-in for Megatron-LM's training loop around the real OptimizerParamScheduler, one rank."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

import pytest
from preloaded import Preloaded
from pretrain_gpt import PLAN

from pathswitch.checkpoint import committed_checkpoints
from pathswitch.config import build_plan, load_plan_file
from pathswitch.versions.ledger import run_ledger
from pathswitch.versions.records import PrunedRecord
from pathswitch_megatron.batches import rampup_batches

pytestmark = pytest.mark.slow
STAND_IN = Path(__file__).parent / "stand_in"
SCRIPT = "import sys, torch\nfrom megatron.training.training import pretrain\npretrain(sys.argv[1:])\n"
# Does what ASK says behind the given number of updates, so that it is seen at the end of that iteration.
ASKED = """
import os, signal, sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
at, words = int(sys.argv.pop(1)), sys.argv.pop(1).split()
updates = 0
def ask(*_):
    global updates
    updates += 1
    if updates == at:
        for word in words:
            os.kill(os.getpid(), signal.Signals[word]) if word.startswith("SIG") else open(word, "x").close()
register_optimizer_step_post_hook(ask)
"""
UPDATE = re.compile(r"iteration (\d+) used (\S+) loss (\S+) samples (\d+)")
# An iteration -> (LR used, loss, samples consumed before it), as printed: floats in full.
Updates = dict[int, tuple[float, str, int]]


@cache
def _preloaded() -> Preloaded:
    """What Megatron's training modules import; each job imports them itself, and so the hooks, with its environment."""
    roots = f"{STAND_IN}:{os.environ.get('PYTHONPATH', '')}"
    modules = ("torch._dynamo", "megatron.core.optimizer_param_scheduler", "pathswitch.checkpoint", "pathswitch.config")
    return Preloaded(modules, {**os.environ, "PYTHONPATH": roots}, "-u", "-W", "ignore")


@dataclass(frozen=True)
class Run:
    folder: Path

    def train(
        self,
        path: str,
        *arguments: str,
        plan: str = "plan.toml",
        code: int = 0,
        ask: tuple[int, str] | None = None,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> tuple[Updates, str]:
        """Train a path; return its updates, and everything that it said.

        ``ask`` is a number of updates, and the signals that the job gets then, or the files that appear.
        """
        (self.folder / "train.py").write_text(SCRIPT)
        (self.folder / "asked.py").write_text(ASKED + SCRIPT)
        script = ["train.py"] if ask is None else ["asked.py", str(ask[0]), ask[1]]
        own = {**os.environ, "PATHSWITCH_PLAN": plan, "PATHSWITCH_PATH": path, "OMP_NUM_THREADS": "1", **environment}
        result = _preloaded().run([*script, *arguments], self.folder, own, timeout_seconds=120)
        assert result.returncode == code, result.output[-3000:]
        found = UPDATE.findall(result.output)
        return {int(n): (float(lr), loss, int(samples)) for n, lr, loss, samples in found}, result.output

    def steps(self, folder: str) -> list[int]:
        return sorted(manifest.step for _, manifest in committed_checkpoints(self.folder / folder))

    def lrs(self, path: str, first: int, last: int) -> list[float]:
        lr = build_plan(load_plan_file(self.folder / "plan.toml")).path(path).lr
        return [lr(step) for step in range(first, last)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("hooks")
    (folder / "control").mkdir()
    (folder / "plan.toml").write_text(PLAN.format(final_lr=""))
    (folder / "control" / "plan.toml").write_text(PLAN.format(final_lr="final_lr = 1e-3"))
    return Run(folder)


@pytest.fixture(scope="module")
def main(run: Run) -> Updates:
    return run.train("main", "--save", "main", "--load", "main")[0]


def lrs(updates: Updates) -> list[float]:
    return [lr for lr, _, _ in updates.values()]


def test_main_path_saves_where_branches_fork(run: Run, main: Updates) -> None:
    assert lrs(main) == run.lrs("main", 0, 40)
    assert run.steps("main") == [12, 15, 30, 40]
    assert not [file for file in (run.folder / "main").iterdir() if file.name.startswith(".")], "nothing hidden is left"


def test_control_branch_is_the_main_path(run: Run, main: Updates) -> None:
    arguments = ("--load", "main", "--ckpt-step", "12", "--save", "control")
    updates, _ = run.train("v1", *arguments, plan="control/plan.toml")
    assert updates == {n: main[n] for n in range(13, 21)}, "LR, loss and samples of every update"


def test_branch_ends_by_itself_and_stays_ended(run: Run, main: Updates) -> None:
    updates, _ = run.train("v1", "--load", "main", "--ckpt-step", "12", "--save", "v1", "--async-save")
    assert lrs(updates) == run.lrs("v1", 12, 20) and updates[13] == main[13]
    assert run.steps("v1") == [15, 20]
    assert (run.folder / "v1" / "latest_checkpointed_iteration.txt").read_text() == "20"
    again, said = run.train("v1", "--load", "v1", "--save", "v1")
    assert not again and "path 'v1' is trained to its end" in said


def test_branch_whose_job_ends_with_it_is_not_cut_short(run: Run, main: Updates) -> None:
    """Megatron evaluates once more where --train-iters ends; an exit would skip that."""
    updates, _ = run.train("v2", "--load", "main", "--ckpt-step", "30", "--save", "v2")
    assert lrs(updates) == run.lrs("v2", 30, 40) and run.steps("v2") == [40]


@pytest.mark.parametrize("last", ["11", "12"], ids=["before the fork", "the last before the fork"])
def test_skipped_iterations(run: Run, last: str) -> None:
    main, branch = f"skipped-{last}", f"skipped-{last}-v1"
    updates, _ = run.train("main", "--skip", "2", "3", last, "--exit-interval", "13", "--save", main)
    assert lrs(updates) == run.lrs("main", 0, 13)
    assert run.steps(main) == [12, 13], "the data's clock: the branch forks where its data is"
    updates, _ = run.train("v1", "--load", main, "--ckpt-step", "12", "--skip", "14", "20", "--save", branch)
    assert lrs(updates) == run.lrs("v1", 12, 20) and run.steps(branch) == [15, 20]


def test_batch_size_rampup(run: Run) -> None:
    arguments = ("--rampup-batch-size", "1", "1", "20", "--save", "rampup", "--load", "rampup")
    updates, _ = run.train("main", *arguments, "--exit-interval", "12")
    batches = rampup_batches(1, 1, 20, 4)
    assert [samples for _, _, samples in updates.values()] == [batches.samples_after(step) for step in range(12)]
    assert lrs(updates) == run.lrs("main", 0, 12)
    manifest = committed_checkpoints(run.folder / "rampup")[0][1]
    assert (manifest.step, manifest.samples_seen) == (12, batches.samples_after(12))
    resumed, _ = run.train("main", *arguments, "--exit-interval", "14")
    assert lrs(resumed) == run.lrs("main", 12, 14)


def test_retention_spares_forks(run: Run) -> None:
    arguments = ("--save-interval", "5", "--save-retain-interval", "20", "--save", "retained", "--load", "retained")
    run.train("main", *arguments)
    assert run.steps("retained") == [12, 20, 30, 40]
    pruned = [s.record for s in run_ledger(run.folder).read().records if isinstance(s.record, PrunedRecord)]
    assert sorted(record.folder for record in pruned) == [f"retained/iter_{n:07d}" for n in (5, 10, 15, 25, 35)]


def test_failed_save_leaves_what_was_there(run: Run) -> None:
    arguments = ("--save", "full", "--load", "full", "--save-interval", "6")
    _, said = run.train("main", *arguments, "--fail-at", "18", code=1)
    assert "No space left" in said and run.steps("full") == [6, 12]
    resumed, _ = run.train("main", *arguments, "--exit-interval", "18")
    assert lrs(resumed) == run.lrs("main", 12, 18) and run.steps("full") == [6, 12, 18]


SIGNALS = {"PATHSWITCH_STOP_SIGNALS": "SIGTERM,SIGUSR2"}


def test_signal_saves_and_ends_and_the_rest_is_the_same(run: Run, main: Updates) -> None:
    line, progress = ("--save", "asked", "--load", "asked", "--async-save"), run.folder / "progress.json"
    variables = {**SIGNALS, "PATHSWITCH_PROGRESS_FILE": str(progress)}
    updates, said = run.train("main", *line, ask=(7, "SIGUSR2 SIGTERM SIGUSR2"), environment=variables)
    assert list(updates) == list(range(1, 8)) and run.steps("asked") == [7]
    assert said.count("pathswitch: path 'main' asked to stop (SIGUSR2): saves into asked at step 7") == 1
    assert "a writer starts with blocked SIGTERM SIGUSR2\n" in said
    written = json.loads(progress.read_text())
    assert (written["step"], written["lr"]) == (7, run.lrs("main", 6, 7)[0])
    assert written["samples_per_s"] == pytest.approx(4 / written["seconds_per_step"])
    resumed, _ = run.train("main", *line, "--exit-interval", "20", environment=variables)
    assert updates | resumed == {n: main[n] for n in range(1, 21)} and run.steps("asked") == [7, 12, 15, 20]


def test_stop_file_beside_megatrons_own_handler(run: Run) -> None:
    line = ("--exit-signal-handler", "--save", "own", "--load", "own")
    variables = {**SIGNALS, "PATHSWITCH_STOP_FILE": str(run.folder / "stop")}
    updates, said = run.train("main", *line, ask=(2, "SIGTERM"), environment=variables)
    assert list(updates) == [1, 2] and "after receiving SIGTERM" in said and "asked to stop" not in said
    updates, said = run.train("main", *line, ask=(1, "stop"), environment=variables)
    assert list(updates) == [3] and "asked to stop (stop file " in said and "after receiving SIGTERM" not in said
    assert run.steps("own") == [2, 3]


def test_nothing_is_noted_unless_the_environment_asks_for_it(run: Run) -> None:
    updates, _ = run.train("main", "--save", "deaf", ask=(7, "SIGUSR2"), code=-signal.SIGUSR2)
    assert len(updates) == 7 and run.steps("deaf") == []


AT_12 = ("--load", "main", "--ckpt-step", "12", "--save", "refused")
REFUSALS = {
    "finetune": ("v1", (*AT_12, "--finetune"), "--finetune: it forgets"),
    "no optimizer": ("v1", (*AT_12, "--no-load-optim"), "--no-load-optim"),
    "wrong step": (
        "v1",
        ("--load", "main", "--ckpt-step", "15", "--save", "refused"),
        "at step 15; path 'v1'",
    ),
    "newest": ("v1", ("--load", "main", "--save", "refused"), "at step 40; path 'v1' can go on from its own"),
    "no load": ("v1", ("--save", "refused"), "--load: given None"),
    "nothing there": ("v1", ("--load", "empty", "--save", "refused"), "the folder holds no checkpoint"),
    "the parent's folder": ("v1", ("--load", "main", "--ckpt-step", "12", "--save", "main"), "a folder of its own"),
    "lr": ("v1", (*AT_12, "--lr", "2e-3"), "--lr: given 0.002; allowed: 0.001"),
    "train-iters": ("v1", (*AT_12, "--train-iters", "80"), "--train-iters: checkpoint 40, now 80"),
    "batch": ("v1", (*AT_12, "--global-batch-size", "8"), "--global-batch-size: checkpoint 4, now 8"),
    "old shards": ("v1", (*AT_12, "--use-distributed-optimizer"), "--ckpt-step with --ckpt-format torch"),
    "must exist": ("main", ("--load", "empty", "--exit-on-missing-checkpoint"), "holds no checkpoint, and --exit-on"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_any_step(run: Run, main: Updates, case: str) -> None:
    path, arguments, message = REFUSALS[case]
    before = sorted(run.folder.rglob("*.pt"))
    updates, said = run.train(path, *arguments, code=1)
    assert not updates and message in said.splitlines()[-1]
    assert sorted(run.folder.rglob("*.pt")) == before


def test_plans_batch_size_is_the_jobs(run: Run) -> None:
    (run.folder / "batch").mkdir()
    (run.folder / "batch" / "plan.toml").write_text(PLAN.format(final_lr="") + "\n[megatron]\nglobal_batch_size = 8\n")
    updates, said = run.train("main", plan="batch/plan.toml", code=1)
    assert not updates and "--global-batch-size: given 4; allowed: 8" in said
