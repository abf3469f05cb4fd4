"""ZeRO 0-3 on two ranks: the LR that torch's Adam really computed each update with, bit for bit the plan's."""

from __future__ import annotations

import json
from typing import Any

import ds_ranks
import pytest

from pathswitch.config import plan_from_params
from pathswitch.versions import Paradigm

pytestmark = pytest.mark.slow

# The plan of tiny_plan.py, written down again: the expectation does not come from the code under test's process.
PLAN = plan_from_params(
    {
        "max_lr": 1e-3,
        "init_lr": 1e-5,
        "warmup_steps": 2,
        "versions": [
            {"name": "v1", "steps": 8, "alpha": 0.5},
            {"name": "v2", "steps": 8, "alpha": 0.5, "shape": "linear"},
        ],
    }
)
STAGES, DTYPES = (0, 1, 2, 3), ("fp32", "bf16")
ELEMENTS = dict.fromkeys(("weights", "exp_avg", "exp_avg_sq"), 2 * (8 * 8 + 8))


def lrs(path: str, first: int, count: int, paradigm: Paradigm = "path_switching") -> list[float]:
    lr = PLAN.path(path, paradigm).lr
    return [lr(step) for step in range(first, first + count)]


def one_group(*args: Any, **kwargs: Any) -> list[list[float]]:
    return [[lr] for lr in lrs(*args, **kwargs)]


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Both ranks' records of one job that runs everything."""
    folder = tmp_path_factory.mktemp("matrix")
    job = ds_ranks.run("worker_matrix.py", str(folder), folder=folder, timeout_seconds=500)
    assert job.returncode == 0, job.output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_main_fork_resume(records: list[dict[str, Any]], stage: int, dtype: str) -> None:
    for rank in records:
        record = rank[f"matrix_{stage}_{dtype}"]
        assert record["main"] == one_group("main", 0, 12)
        assert record["main_counters"] == [6, 6]
        assert record["v1"] == one_group("v1", 4, 4)
        assert record["v1_counters"] == [8, 8]
        assert record["lr_after_load"] == lrs("v1", 6, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_fork_has_the_digest_that_its_parent_was_saved_with(
    records: list[dict[str, Any]], stage: int, dtype: str
) -> None:
    for rank in records:
        record = rank[f"matrix_{stage}_{dtype}"]
        assert record["forked_digest"] == record["saved_digest"]
        assert {stream: digest["elements"] for stream, digest in record["saved_digest"].items()} == ELEMENTS
        assert record["saved_digest"]["weights"] != record["initial_digest"]["weights"]


@pytest.mark.parametrize(("dtype", "stages"), [("fp32", STAGES), ("bf16", (1, 2, 3))])
def test_the_digest_does_not_depend_on_the_stage(
    records: list[dict[str, Any]], dtype: str, stages: tuple[int, ...]
) -> None:
    # Stage 0 in bf16 begins with a step of its own on zero gradients, which decays the weights.
    initial = {
        rank[f"matrix_{stage}_{dtype}"]["initial_digest"]["weights"]["digest"] for rank in records for stage in stages
    }
    assert len(initial) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stage", STAGES)
def test_past_the_plan_the_update_does_not_happen(records: list[dict[str, Any]], stage: int, dtype: str) -> None:
    for rank in records:
        record = rank[f"matrix_{stage}_{dtype}"]
        assert record["past_end"].startswith("ScheduleError: path 'v1' ends at step 8 by its plan")
        assert not record["past_end_changed"]


@pytest.mark.parametrize("stage", STAGES)
def test_param_groups_keep_their_multiples(records: list[dict[str, Any]], stage: int) -> None:
    multiples = [1.0, 1e-4 / 1e-3, 3e-3 / 1e-3]
    for rank in records:
        record = rank[f"groups_{stage}"]
        for path, first in (("main", 0), ("v1", 4)):
            expected = [[multiple * lr for multiple in multiples] for lr in lrs(path, first, 4)]
            assert record[path] == expected


@pytest.mark.parametrize("job", [*(f"parent_{stage}" for stage in STAGES), "universal_1", "universal_3"])
def test_parents_lr_does_not_come_back_with_the_optimizer(records: list[dict[str, Any]], job: str) -> None:
    expected = one_group("v2", 8, 3, paradigm="cpt_rewarm")
    parents_last = PLAN.path("v1", "cpt_rewarm").lr(8)
    for rank in records:
        assert rank[job]["right"] == expected
        control = rank[job]["control"]
        if job == "parent_0":  # only here does DeepSpeed load the scheduler after the optimizer
            assert control == expected
        else:
            assert control == [[parents_last], *expected[1:]] != expected


@pytest.mark.parametrize("stage", (1, 3))
def test_param_groups_through_a_universal_checkpoint(records: list[dict[str, Any]], stage: int) -> None:
    multiples = [1.0, 1e-4 / 1e-3, 3e-3 / 1e-3]
    expected = [[multiple * lr for multiple in multiples] for lr in lrs("v2", 8, 3, paradigm="cpt_rewarm")]
    for rank in records:
        assert rank[f"universal_groups_{stage}"]["right"] == expected


@pytest.mark.parametrize("stage", (1, 2))
def test_fp16_overflows_do_not_count(records: list[dict[str, Any]], stage: int) -> None:
    for rank in records:
        record = rank[f"overflow_{stage}"]
        attempts: list[list[float]] = record["main"]
        assert attempts[0] == [], "the first attempt must overflow for this test to mean anything"
        assert [lr for lr in attempts if lr] == one_group("main", 0, 3)
        assert record["skipped"] == len(attempts) - 3
        assert record["counters"] == record["after_load"] == [3, 3]
        assert record["saved_digest"] == record["loaded_digest"] and record["saved_digest"].keys() == ELEMENTS.keys()
        assert [lr for lr in record["resumed"] if lr] == one_group(
            "main", 3, len([lr for lr in record["resumed"] if lr])
        )


def test_accumulation_counts_updates(records: list[dict[str, Any]]) -> None:
    for rank in records:
        assert rank["accumulation"] == {
            "main": one_group("main", 0, 5), "counters": [5, 5], "micro_steps": 10
        }  # fmt: skip
