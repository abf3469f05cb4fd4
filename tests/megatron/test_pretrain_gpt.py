"""An unchanged pretrain_gpt.py under a plan: main path, branches, kills and refusals, in a real Megatron-LM.

MEGATRON_PATH names the checkout. It needs its compiled dataset helpers for this Python (`make` in
megatron/core/datasets, or those of the installed megatron-core), triton, six and psutil.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from pretrain_gpt import PLAN, Checkout, Outcome, last_rank, write_data
from typer.testing import CliRunner

from pathswitch.checkpoint import committed_checkpoints, read_manifest
from pathswitch.cli.app import app
from pathswitch.config import build_plan, load_plan_file
from pathswitch.versions.ledger import run_ledger
from pathswitch.versions.records import CheckpointRecord

MEGATRON_PATH = os.environ.get("MEGATRON_PATH")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MEGATRON_PATH,
        reason="set MEGATRON_PATH to a checkout of NVIDIA/Megatron-LM with built megatron/core/datasets",
    ),
]
FORKS, ENDS = {"v1": 12, "v2": 30}, {"v1": 20, "v2": 40}


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, ranks: int) -> Checkout:
    folder = tmp_path_factory.mktemp(f"megatron{ranks}")
    (folder / "plan.toml").write_text(PLAN.format(final_lr=""))
    (folder / "control").mkdir()
    (folder / "control" / "plan.toml").write_text(PLAN.format(final_lr="final_lr = 1e-3"))
    write_data(folder / "data", 100, seed=1)
    return Checkout(Path(str(MEGATRON_PATH)).resolve(), folder, "plan.toml")


@pytest.fixture(scope="module")
def main(checkout: Checkout, ranks: int) -> Outcome:
    outcome = checkout.train("main", "--save", "main", "--load", "main", ranks=ranks)
    assert outcome.code == 0, outcome.log[-3000:]
    return outcome


def follows(outcome: Outcome, checkout: Checkout, path: str, first: int, last: int) -> bool:
    """Return whether the LR printed after each iteration n is that of the next one; newer Megatrons print a float32."""
    lr = build_plan(load_plan_file(checkout.folder / checkout.plan)).path(path).lr
    steps = range(first, last + 1)
    printed = [outcome.lrs[n] for n in outcome.lrs]
    exact, single = [f"{lr(n):.6E}" for n in steps], [f"{np.float32(lr(n)):.6E}" for n in steps]
    return [*outcome.lrs] == [*steps] and printed in (exact, single)


def steps_in(folder: Path) -> list[int]:
    return sorted(manifest.step for _, manifest in committed_checkpoints(folder))


def test_main_path(checkout: Checkout, main: Outcome) -> None:
    assert follows(main, checkout, "main", 1, 40)
    assert steps_in(checkout.folder / "main") == [12, 15, 30, 40], "saved where branches fork, whatever the interval"
    records = [stored.record for stored in run_ledger(checkout.folder).read().records]
    recorded = [r.step for r in records if isinstance(r, CheckpointRecord) and r.path == "main"]
    assert sorted(recorded) == [12, 15, 30, 40]
    _, manifest = committed_checkpoints(checkout.folder / "main")[0]
    assert {".metadata", "metadata.json"} <= manifest.files.keys() and manifest.samples_seen == 160


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_control_branch_equals_the_main_path(checkout: Checkout, main: Outcome, ranks: int, version: str) -> None:
    arguments = ("--load", "main", "--ckpt-step", str(FORKS[version]), "--save", f"control-{version}")
    control = checkout.train(version, *arguments, ranks=ranks, plan="control/plan.toml")
    assert control.code == 0, control.log[-3000:]
    steps = range(FORKS[version] + 1, ENDS[version] + 1)
    # Megatron prints the mean of the first two losses as the second loss of a job.
    same = [n for n in steps if n != FORKS[version] + 2]
    assert [control.losses[n] for n in same] == [main.losses[n] for n in same]
    assert set(control.lrs.values()) == {"1.000000E-03"}


def test_branch_in_place_ends_by_itself(checkout: Checkout, main: Outcome, ranks: int) -> None:
    arguments = ("--load", "main", "--ckpt-step", "12", "--save", "v1", "--async-save")
    known = "".join(file.read_text() for file in (checkout.megatron / "megatron" / "training").rglob("*.py"))
    if "use_persistent_ckpt_worker" in known or "use-persistent-ckpt-worker" in known:
        arguments += ("--use-persistent-ckpt-worker",)
    if "async_strategy" in known:  # Megatron core's own writer; the default one is a package for GPUs
        arguments += ("--async-strategy", "mcore")
    branch = checkout.train("v1", *arguments, ranks=ranks)
    assert branch.code == 0, branch.log[-3000:]
    assert follows(branch, checkout, "v1", 13, 20) and branch.lrs[20] == "0.000000E+00"
    assert branch.losses[13] == main.losses[13], "the first update of a branch is the main path's own next one"
    assert steps_in(checkout.folder / "v1") == [15, 20]


def test_killed_branch_goes_on_to_the_same_losses(checkout: Checkout, main: Outcome, ranks: int) -> None:
    for folder in ("v2", "whole"):
        arguments = ["fork", ".", "main@30", "--to", "v2", "--into", folder]
        before = os.getcwd()
        os.chdir(checkout.folder)
        try:
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        finally:
            os.chdir(before)
        assert result.exit_code == 0, result.output
    line = ("--save-interval", "2")
    whole = checkout.train("v2", *line, "--load", "whole", "--save", "whole", ranks=ranks)
    assert whole.code == 0 and follows(whole, checkout, "v2", 31, 40), whole.log[-3000:]
    killed = checkout.train("v2", *line, "--load", "v2", "--save", "v2", ranks=ranks, kill_at=(35, signal.SIGKILL))
    assert killed.code != 0
    resumed = checkout.train("v2", *line, "--load", "v2", "--save", "v2", ranks=ranks)
    assert resumed.code == 0, resumed.log[-3000:]
    first = min(resumed.losses)
    assert 33 <= first <= 39
    same = [n for n in resumed.losses if n != first + 1]
    assert [resumed.losses[n] for n in same] == [whole.losses[n] for n in same]
    assert follows(resumed, checkout, "v2", first, 40)


def test_a_stock_jobs_checkpoint_is_adopted(checkout: Checkout, ranks: int) -> None:
    until = ("--exit-interval", "13")
    saves = ("--lr-decay-style", "constant", "--save-interval", "12", "--save", "stock")
    stock = checkout.train(None, *until, *saves, ranks=ranks)
    assert stock.code == 0, stock.log[-3000:]
    folder = checkout.folder / "stock" / "iter_0000012"
    arguments = ["adopt", str(folder), "--step", "12", "--plan", str(checkout.folder / "plan.toml")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    manifest = read_manifest(folder)
    assert manifest.samples_seen == 48 and manifest.parallelism.world_size == ranks
    branch = checkout.train("v1", *until, "--load", "stock", "--ckpt-step", "12", ranks=ranks)
    assert branch.code == 0, branch.log[-3000:]
    assert branch.losses == {13: stock.losses[13]}, "the first update of a branch is the stock job's own next one"


def test_preemption_saves(checkout: Checkout, main: Outcome, ranks: int) -> None:
    arguments = ("--exit-signal-handler", "--save", "preempted", "--load", "preempted", "--save-interval", "1000")
    stopped = checkout.train("main", *arguments, ranks=ranks, kill_at=(5, signal.SIGTERM))
    (step,) = [s for s in steps_in(checkout.folder / "preempted") if s != 12]
    assert step >= 5 and step == max(stopped.losses)


@pytest.mark.parametrize("saves", [(), ("--async-save",)], ids=["at once", "asynchronously"])
def test_asked_to_stop(checkout: Checkout, main: Outcome, ranks: int, saves: tuple[str, ...]) -> None:
    """A signal to the last rank alone, then the stop file; Megatron's own handler of another signal is left alone."""
    name = "stopped" + "".join(saves)
    arguments = ("--save", name, "--load", name, "--save-interval", "1000", *saves)
    stop_file = checkout.folder / f"{name}.stop"
    extra = {"PATHSWITCH_STOP_SIGNALS": "SIGTERM,SIGUSR2", "PATHSWITCH_STOP_FILE": str(stop_file)}

    def signal_last_rank(launcher: int) -> None:
        os.kill(last_rank(launcher), signal.SIGUSR2)

    first = checkout.train("main", *arguments, ranks=ranks, kill_at=(5, signal_last_rank), extra=extra)
    (step,) = steps_in(checkout.folder / name)
    assert first.code == 0 and 5 <= step == max(first.losses) < 12, first.log[-3000:]
    assert f"path 'main' asked to stop (SIGUSR2): saves into {name} at step {step}" in first.log
    wait = (step + 2, lambda _: stop_file.touch())
    second = checkout.train("main", *arguments, "--exit-signal-handler", ranks=ranks, kill_at=wait, extra=extra)
    last = max(steps_in(checkout.folder / name))
    assert second.code == 0 and step + 2 <= last == max(second.losses) < 40, second.log[-3000:]
    assert f"asked to stop (stop file {stop_file})" in second.log
    same = [n for n in range(1, last + 1) if n not in (2, step + 2)]  # Megatron prints a job's first two as one mean
    assert [(first.losses | second.losses)[n] for n in same] == [main.losses[n] for n in same]


REFUSALS = {
    "finetune": ("v1", ["--load", "main", "--ckpt-step", "12", "--finetune"], "--finetune"),
    "no optimizer": ("v1", ["--load", "main", "--ckpt-step", "12", "--no-load-optim"], "--no-load-optim"),
    "wrong iteration": ("v1", ["--load", "main", "--ckpt-step", "15"], "forks"),
    "another branch's fork": ("v2", ["--load", "main", "--ckpt-step", "12"], "at step 30, where it forks"),
    "nothing to load": ("v1", ["--load", "empty"], "starts from a checkpoint of 'main' at step 12"),
    "no load": ("v1", [], "--load"),
    "the parent's folder": ("v1", ["--load", "main", "--ckpt-step", "12", "--save", "main"], "a folder of its own"),
    "train-iters": (
        "v1",
        ["--load", "main", "--ckpt-step", "12", "--train-iters", "80"],
        "--train-iters: checkpoint 40, now 80",
    ),
    "seed": ("v1", ["--load", "main", "--ckpt-step", "12", "--seed", "7"], "--seed: checkpoint 1234, now 7"),
    "split": ("v1", ["--load", "main", "--ckpt-step", "12", "--split", "90,10,0"], "--split"),
    "seq-length": (
        "v1",
        ["--load", "main", "--ckpt-step", "12", "--seq-length", "16"],
        "--seq-length: checkpoint 32, now 16",
    ),
    "batch": ("v1", ["--load", "main", "--ckpt-step", "12", "--global-batch-size", "8"], "--global-batch-size"),
    "vocabulary": (
        "v1",
        ["--load", "main", "--ckpt-step", "12", "--make-vocab-size-divisible-by", "512"],
        "--padded-vocab-size",
    ),
    "lr": ("v1", ["--load", "main", "--ckpt-step", "12", "--lr", "2e-3"], "--lr: given 0.002"),
    "unknown path": ("v7", ["--load", "main"], "v7"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_any_step(checkout: Checkout, main: Outcome, ranks: int, case: str) -> None:
    if ranks == 2 and case not in ("wrong iteration", "seed"):
        pytest.skip("the same on one rank; two cases show that both ranks say so")
    path, arguments, message = REFUSALS[case]
    save = [] if "--save" in arguments else ["--save", f"refused-{case.replace(' ', '-')}"]
    before = sorted((checkout.folder / "main").rglob("*"))
    outcome = checkout.train(path, *arguments, *save, ranks=ranks)
    assert outcome.code != 0 and not outcome.losses, outcome.log[-3000:]
    assert outcome.log.count("Error: ") >= ranks and message in outcome.log, outcome.log[-3000:]
    assert sorted((checkout.folder / "main").rglob("*")) == before, "nothing is lost or half-written"


def test_without_the_variable_nothing_is_patched(checkout: Checkout, ranks: int) -> None:
    if ranks == 2:
        pytest.skip("the same on one rank")
    outcome = checkout.train(None, "--save", "stock", "--exit-interval", "4")
    assert outcome.code == 0 and "pathswitch" not in outcome.log
    assert outcome.lrs[3] == "9.984630E-04", "Megatron's own cosine from --lr 1e-3 to --min-lr 1e-4"
