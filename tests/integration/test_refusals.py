"""What PathSwitchLR refuses and accepts under DeepSpeed on two ranks: the same on both, before any update."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import ds_ranks
import pytest

from pathswitch.config import plan_from_params

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one job that tries everything."""
    folder = tmp_path_factory.mktemp("refusals")
    job = ds_ranks.run("worker_refusals.py", str(folder), folder=folder)
    assert job.returncode == 0, job.output[-4000:]
    return folder


@pytest.fixture(scope="module")
def record(folder: Path) -> dict[str, Any]:
    """What rank 0 saw, once rank 1 is known to have seen the same."""
    first, second = (json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "a refusal on one rank only leaves the others waiting"
    assert isinstance(first, dict)
    return first


REFUSED = {
    ("latest", "empty, branch"): "CheckpointError: * is empty, but the folder holds checkpoints (again, global_step4)",
    ("latest", "empty, main"): "CheckpointError: * is empty, but the folder holds checkpoints (again, global_step4)",
    (
        "latest",
        "missing, branch",
    ): "CheckpointError: * is missing, but the folder holds checkpoints (again, global_step4)",
    (
        "latest",
        "missing, main",
    ): "CheckpointError: * is missing, but the folder holds checkpoints (again, global_step4)",
    ("latest", "missing beside another's, branch"): "CheckpointError: * is missing, but the folder holds checkpoints",
    ("latest", "no checkpoint, branch"): "CheckpointError: * path 'v1' starts from a checkpoint of 'main' at step 4",
    ("latest", "empty without checkpoints, main"): "CheckpointError: * is empty and the folder holds no checkpoint",
    ("partial", "never loaded"): "ScheduleError: path 'v1' starts from a checkpoint of 'main' at step 4, but",
    ("partial", "without scheduler states"): "ScheduleError: path 'v1' starts from a checkpoint of 'main' at step 4",
    ("partial", "module only"): "ScheduleError: path 'v1' starts from a checkpoint of 'main' at step 4, but",
    ("partial", "module only, load"): "ScheduleError: path 'v1' starts from a checkpoint of 'main' at step 4, but",
    ("partial", "positional"): "ScheduleError: path 'v1' starts from a checkpoint of 'main' at step 4, but",
    ("other", "not committed"): "CheckpointError: * not committed: it has no pathswitch.json* pathswitch adopt",
    ("other", "no state"): "ScheduleError: the checkpoint holds no scheduler state; * initial_step",
    ("other", "foreign state"): "ScheduleError: * another scheduler (keys last_batch_iteration); * initial_step",
    ("other", "not at the fork step"): "ScheduleError: path 'v1' forks from 'main' at step 4, * stands at step 6",
    ("other", "another branch"): "ScheduleError: path 'v2' * belongs to path 'v1' * allowed: 'v2' or its parent 'main'",
    ("other", "a branch on main"): "ScheduleError: path 'main' * belongs to path 'v1' * allowed: 'main'",
    ("other", "max_lr"): "ScheduleError: path 'main' * max_lr: checkpoint 0.001, plan 0.002",
    ("other", "max_lr, fork"): "ScheduleError: path 'main' * max_lr: checkpoint 0.001, plan 0.002",
    ("other", "warmup_steps"): "* init_lr: checkpoint 1e-05, plan 0.0; warmup_steps: checkpoint 2, plan 3",
    ("other", "shape"): "ScheduleError: path 'v1' * shape: checkpoint 'cosine', plan 'knee'",
    ("other", "alpha"): "* fork_step: checkpoint 4, plan 2; decay_steps: checkpoint 4, plan 6",
    ("bad", "unknown key"): "ConfigError: PathSwitchLR parameters* 'max_lrr'* did you mean 'max_lr'?",
    ("bad", "alpha"): "ConfigError: PathSwitchLR parameters* number 1 ('v1') alpha: given 1.5; allowed: ",
    ("bad", "path"): "ConfigError: PathSwitchLR path: given 'v9'; allowed: main, v1, v2",
    ("bad", "path type"): "ConfigError: PathSwitchLR path: given 3; allowed: a name",
    ("bad", "paradigm"): "ConfigError: PathSwitchLR paradigm: given 'cpt'; allowed: path_switching, ",
    ("bad", "NaN"): "ConfigError: PathSwitchLR parameters* max_lr: given nan; allowed: a finite LR > 0",
    ("bad", "missing plan"): "ConfigError: plan file: given * allowed: a readable TOML file",
    ("bad", "plan and inline"): "ConfigError: * given 'plan and max_lr'; allowed: a plan file or inline parameters",
    ("bad", "initial_step"): "ConfigError: PathSwitchLR initial_step: given -1; allowed: a whole number >= 0",
}
ACCEPTED = [
    ("latest", "by tag"),
    ("latest", "missing beside one, branch"),
    ("latest", "missing beside one, main"),
    ("latest", "no checkpoint, main"),
    ("latest", "no folder, main"),
    ("partial", "all"),
    ("partial", "module only, main"),
    ("other", "adopted, initial_step"),
    ("other", "no state, initial_step"),
    ("other", "foreign state, initial_step"),
    ("other", "extended, main"),
    ("other", "extended, branch"),
    ("other", "same branch"),
]


def contains(text: str, parts: str) -> bool:
    """Say whether the parts between the asterisks occur in this order, the first one at the beginning."""
    position = 0
    for number, part in enumerate(parts.split("*")):
        found = text.find(part.strip(), position)
        if found < 0 or (number == 0 and found > 0):
            return False
        position = found + len(part.strip())
    return True


@pytest.mark.parametrize(("group", "case"), REFUSED)
def test_refused(record: dict[str, Any], group: str, case: str) -> None:
    assert contains(record[group][case], REFUSED[group, case]), record[group][case]


@pytest.mark.parametrize(("group", "case"), ACCEPTED)
def test_accepted(record: dict[str, Any], group: str, case: str) -> None:
    assert record[group][case] == ""


def test_every_case_is_expected(record: dict[str, Any]) -> None:
    cases = {(group, case) for group in ("latest", "partial", "other", "bad") for case in record[group]}
    assert cases == {*REFUSED, *ACCEPTED}


def test_first_update_behind_a_foreign_main_path(record: dict[str, Any]) -> None:
    plan = plan_from_params({"max_lr": 1e-3, "warmup_steps": 2, "versions": [{"name": "v1", "steps": 8, "alpha": 0.5}]})
    assert record["foreign_parent"]["lrs"] == [[plan.path("v1").lr(step)] for step in range(4, 8)]


def test_type_error_in_step_does_not_move_the_counter(record: dict[str, Any]) -> None:
    error = record["type_error"]
    assert error["error"].startswith("ScheduleError: PathSwitchLR.step() takes no step number, given 4")
    assert error["counter"] == 2


def test_engine_shows_the_lr_that_the_update_used(record: dict[str, Any]) -> None:
    ours, stock = record["monitor"]["ours"], record["monitor"]["stock"]
    assert ours["get_lr"] == ours["used"]
    assert ours["in_groups"] != ours["used"], "the groups hold the next LR: the stock engine would show that"
    assert stock["get_lr"] == stock["in_groups"] != stock["used"], "the stock scheduler's engine is left alone"


@pytest.mark.parametrize("name", ["ours", "stock"])
def test_monitors(record: dict[str, Any], folder: Path, name: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = record["monitor"][name]
    samples = [expected["train_batch_size"] * number for number in range(1, 5)]
    with (folder / "csv_monitor" / name / "Train_Samples_lr.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "lr"]
    assert [int(row[0]) for row in rows] == samples
    assert [float(row[1]) for row in rows] == expected["get_lr"]
    events = EventAccumulator(str(folder / "tensorboard" / name))
    events.Reload()
    scalars = events.Scalars("Train/Samples/lr")
    assert [event.step for event in scalars] == samples
    # TensorBoard stores single precision.
    assert [event.value for event in scalars] == pytest.approx(expected["get_lr"], rel=1e-6)
