"""An unchanged pretrain_gpt.py of Megatron-DeepSpeed under a plan, with ZeRO 0 and 1.

MEGATRON_DEEPSPEED_PATH names the checkout, with its dataset helpers built (`make` in megatron/data).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from pretrain_gpt import PLAN, DeepSpeedCheckout, Outcome, last_rank, write_data

from pathswitch.checkpoint import committed_checkpoints
from pathswitch.config import build_plan, load_plan_file
from pathswitch.versions.ledger import run_ledger

CHECKOUT = os.environ.get("MEGATRON_DEEPSPEED_PATH")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHECKOUT,
        reason="set MEGATRON_DEEPSPEED_PATH to a checkout of deepspeedai/Megatron-DeepSpeed with built megatron/data",
    ),
]
CASES = {"ZeRO 0, 1 rank": (0, 1), "ZeRO 1, 2 ranks": (1, 2)}


class Case:
    """One ZeRO stage on some ranks."""

    def __init__(self, folder: Path, stage: int, ranks: int) -> None:
        self.checkout = DeepSpeedCheckout(Path(str(CHECKOUT)).resolve(), folder, "plan.toml")
        self.ranks = ranks
        config = {
            "train_batch_size": 4,
            "train_micro_batch_size_per_gpu": 2,
            "steps_per_print": 1000,
            "zero_optimization": {"stage": stage},
        }
        (folder / "ds.json").write_text(json.dumps(config))
        self.arguments = ("--deepspeed_config", "ds.json", "--zero-stage", str(stage))

    def train(
        self,
        path: str,
        *arguments: str,
        plan: str | None = None,
        kill_at: int | None = None,
        ask_at: tuple[int, Callable[[int], object]] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Outcome:
        kill = ask_at if kill_at is None else (kill_at, signal.SIGKILL)
        return self.checkout.train(
            path,
            *self.arguments,
            *arguments,
            ranks=self.ranks,
            plan=plan,
            kill_at=kill,
            module="megatron_deepspeed_cpu",
            extra=extra,
        )


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("mds")
    (folder / "plan.toml").write_text(PLAN.format(final_lr=""))
    (folder / "control").mkdir()
    (folder / "control" / "plan.toml").write_text(PLAN.format(final_lr="final_lr = 1e-3"))
    write_data(folder / "data", 100, seed=1)
    return Case(folder, *CASES[request.param])


@pytest.fixture(scope="module")
def main(case: Case) -> Outcome:
    outcome = case.train("main", "--save", "main", "--load", "main")
    assert outcome.code == 0, outcome.log[-3000:]
    return outcome


def follows(outcome: Outcome, case: Case, path: str, first: int, last: int) -> bool:
    lr = build_plan(load_plan_file(case.checkout.folder / "plan.toml")).path(path).lr
    return outcome.lrs == {n: f"{lr(n):.3E}" for n in range(first, last + 1)}


def test_main_path(case: Case, main: Outcome) -> None:
    assert follows(main, case, "main", 1, 40)
    folder = case.checkout.folder
    assert sorted(m.step for _, m in committed_checkpoints(folder / "main")) == [6, 12, 18, 24, 30, 36, 40]
    assert len(run_ledger(folder).read().records) == 7
    newest = committed_checkpoints(folder / "main")[0][1]
    assert newest.settings is not None and newest.settings["seed"] == 1234 and newest.tokens_seen == 40 * 4 * 32


def test_branch(case: Case, main: Outcome) -> None:
    branch = case.train("v1", "--save", "v1", "--load", "main", "--load-tag", "global_step12")
    assert branch.code == 0 and follows(branch, case, "v1", 13, 20), branch.log[-3000:]
    assert branch.lrs[20] == "0.000E+00" and branch.losses[13] == main.losses[13]
    again = case.train("v1", "--save", "v1", "--load", "v1")
    assert not again.losses, "a branch that has ended trains no further"


def test_control_branch_equals_the_main_path(case: Case, main: Outcome) -> None:
    arguments = ("--save", "control-v2", "--load", "main", "--load-tag", "global_step30")
    control = case.train("v2", *arguments, plan="control/plan.toml")
    assert control.code == 0, control.log[-3000:]
    same = [n for n in range(31, 41) if n != 32]  # Megatron prints the mean of a job's first two losses as the second
    assert [control.losses[n] for n in same] == [main.losses[n] for n in same]


def test_killed_and_resumed(case: Case, main: Outcome) -> None:
    line = ("--save", "killed", "--load", "killed", "--save-interval", "3")
    assert case.train("main", *line, kill_at=20).code != 0
    resumed = case.train("main", *line)
    first = min(resumed.losses)
    assert resumed.code == 0 and 19 <= first <= 31, resumed.log[-3000:]
    same = [n for n in resumed.losses if n != first + 1]
    assert [resumed.losses[n] for n in same] == [main.losses[n] for n in same]


def test_asked_to_stop(case: Case, main: Outcome) -> None:
    line, stop_file = ("--save", "stopped", "--load", "stopped"), case.checkout.folder / "stop"
    extra = {"PATHSWITCH_STOP_SIGNALS": "SIGTERM,SIGUSR2", "PATHSWITCH_STOP_FILE": str(stop_file)}

    def signal_last_rank(launcher: int) -> None:
        os.kill(last_rank(launcher), signal.SIGUSR2)

    first = case.train("main", *line, ask_at=(7, signal_last_rank), extra=extra)
    step = max(first.losses)
    assert first.code == 0 and 7 <= step < 12, first.log[-3000:]
    assert f"path 'main' asked to stop (SIGUSR2): saves into stopped at step {step}" in first.log
    second = case.train("main", *line, ask_at=(step + 2, lambda _: stop_file.touch()), extra=extra)
    last = max(second.losses)
    assert second.code == 0 and step + 2 <= last < 40 and f"asked to stop (stop file {stop_file})" in second.log
    saved = sorted(m.step for _, m in committed_checkpoints(case.checkout.folder / "stopped"))
    assert {step, last} <= {*saved} and last == saved[-1]
    same = [n for n in range(1, last + 1) if n not in (2, step + 2)]
    assert [(first.losses | second.losses)[n] for n in same] == [main.losses[n] for n in same]


REFUSALS = {
    "wrong step": (["--load", "main", "--load-tag", "global_step18"], "forks from 'main' at step 12"),
    "seed": (["--load", "main", "--load-tag", "global_step12", "--seed", "7"], "--seed: checkpoint 1234, now 7"),
    "finetune": (["--load", "main", "--load-tag", "global_step12", "--finetune"], "--finetune"),
    "lr": (["--load", "main", "--load-tag", "global_step12", "--lr", "2e-3"], "--lr: given 0.002"),
    "exit interval": (["--load", "main", "--load-tag", "global_step12", "--exit-interval", "7"], "--exit-interval"),
    "nothing": (["--load", "empty"], "starts from a checkpoint of 'main' at step 12"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_refused_before_any_step(case: Case, main: Outcome, refusal: str) -> None:
    if case.ranks == 2 and refusal not in ("wrong step", "seed"):
        pytest.skip("the same on one rank; two cases show that both ranks say so")
    arguments, message = REFUSALS[refusal]
    outcome = case.train("v1", "--save", "refused", *arguments)
    assert outcome.code != 0 and not outcome.losses and message in outcome.log, outcome.log[-3000:]


def test_save_interval_must_meet_the_forks(case: Case, main: Outcome) -> None:
    if case.ranks == 2:
        pytest.skip("the same on one rank")
    outcome = case.train("main", "--save", "odd", "--load", "odd", "--save-interval", "7")
    assert not outcome.losses and "--save-interval: given 7; allowed: a divisor of 12, where v1 forks" in outcome.log
