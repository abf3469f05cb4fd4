"""ZeRO's step in one pass: overflows, accumulation, schedulers and hooks, memory, averages; and when it is not done."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import ds_ranks
import pytest
from same_steps import assert_same_steps

pytestmark = pytest.mark.slow

SCHEDULED = ("1_PathSwitchLR", "1_WarmupLR_fp32-sums", "2_PathSwitchLR_fp32-sums")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Both ranks' records of one job that runs everything."""
    folder = tmp_path_factory.mktemp("one_pass")
    job = ds_ranks.run("worker_one_pass.py", str(folder), folder=folder, timeout_seconds=500)
    assert job.returncode == 0, job.output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def pair(record: dict[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return record[f"{name}_ours"], record[f"{name}_one_pass"]


@pytest.mark.parametrize("job", ("1", "2", "2_fp32-sums"))
def test_overflows_are_skipped_and_the_loss_scale_moves(records: list[dict[str, Any]], job: str) -> None:
    for record in records:
        ours, one_pass = pair(record, f"overflows_{job}")
        assert_same_steps(one_pass, ours, is_clipped=True)
        for what in ("scales", "skipped", "micro_step"):
            assert one_pass[what] == ours[what]
        scales = one_pass["scales"]
        assert one_pass["skipped"] >= 3
        assert any(after > before for before, after in pairwise(scales)), "it must grow as well"
        assert one_pass["norms"].count(float("inf")) == one_pass["skipped"]
        assert one_pass["timers"] == [["optimizer_allgather", "optimizer_gradients", "optimizer_step"]] * 16


@pytest.mark.parametrize("kind", ("checked", "fp32-sums"))
def test_gradients_that_are_not_finite_change_nothing(records: list[dict[str, Any]], kind: str) -> None:
    for record in records:
        ours, one_pass = pair(record, f"not_finite_{kind}")
        assert one_pass["unchanged"] and one_pass["overflow"] and one_pass["norm"] == float("inf")
        assert one_pass["skipped"] == ours["skipped"] == 1
        assert_same_steps(one_pass, ours, is_clipped=False)


def test_in_bf16_nobody_looks_unless_asked_to(records: list[dict[str, Any]]) -> None:
    for record in records:
        for job in pair(record, "not_finite_unchecked"):
            assert (job["unchanged"], job["overflow"], job["skipped"]) == (False, False, 0)


@pytest.mark.parametrize("name", SCHEDULED)
def test_accumulation_and_schedulers(records: list[dict[str, Any]], name: str) -> None:
    for record in records:
        ours, one_pass = pair(record, f"scheduled_{name}")
        assert_same_steps(one_pass, ours, is_clipped=False)
        groups_at_once = len(ours["lrs"][0])  # DeepSpeed's own step shows the optimizer one group at a time
        assert one_pass["lrs"] == [lrs * (2 // groups_at_once) for lrs in ours["lrs"][:: 2 // groups_at_once]]
        assert len({lrs[0] for lrs in one_pass["lrs"]}) > 1
        assert one_pass["post_hooks"] == len(one_pass["lrs"]) == 4


@pytest.mark.parametrize("clip", (0.0, 0.2))
@pytest.mark.parametrize("kind", ("bf16", "fp32-sums"))
def test_pipelines_with_a_tied_layer(records: list[dict[str, Any]], kind: str, clip: float) -> None:
    for record in records:
        ours, one_pass = pair(record, f"pipeline_{kind}_{clip}")
        assert (ours["replaced"], one_pass["replaced"]) == (False, True)
        assert min(one_pass["norms"]) > 0.2, "gradients must be clipped by 0.2"
        assert_same_steps(one_pass, ours, is_clipped=clip == 0.2)
        assert one_pass["norms"] == records[0][f"pipeline_{kind}_{clip}_one_pass"]["norms"]


@pytest.mark.parametrize("clip", (0.0, 0.2))
@pytest.mark.parametrize("kind", ("1_bf16", "1_bf16_fp32-sums", "2_bf16", "2_fp32"))
def test_tensor_parallel_models(records: list[dict[str, Any]], kind: str, clip: float) -> None:
    first, second = (record[f"tensor-parallel_{kind}_{clip}_one_pass"] for record in records)
    assert first["norms"] == second["norms"] and first["losses"] == second["losses"]
    assert first["first"] == second["first"] and first["weights"] != second["weights"]
    for record in records:
        ours, one_pass = pair(record, f"tensor-parallel_{kind}_{clip}")
        assert (ours["replaced"], one_pass["replaced"]) == (False, True)
        assert min(one_pass["norms"]) > 0.2, "gradients must be clipped by 0.2"
        assert_same_steps(one_pass, ours, is_clipped=clip == 0.2)


def test_the_plans_lr_is_used(records: list[dict[str, Any]]) -> None:
    for record in records:  # init_lr 1e-5, max_lr 1e-3 and two steps of warm-up
        assert record["scheduled_1_PathSwitchLR_one_pass"]["lrs"] == [[0.000505] * 2, *[[1e-3] * 2] * 3]


@pytest.mark.parametrize("kind", ("", "_fp32-sums"))
def test_no_copy_of_the_gradients(records: list[dict[str, Any]], kind: str) -> None:
    for record in records:
        ours, one_pass = pair(record, f"allocations{kind}")
        assert one_pass["shard"] == 4032
        assert max(one_pass["largest"].values()) < 16, "nothing that grows with the model"
        if not kind:
            assert ours["largest"]["torch.float32"] >= 4032 and ours["largest"]["torch.float64"] >= 4032


@pytest.mark.parametrize("average", ("decay", "mean"))
@pytest.mark.parametrize("job", ("0_ours", "1_one_pass", "2_one_pass", "3_ours"))
def test_running_average(records: list[dict[str, Any]], average: str, job: str) -> None:
    for record in records:
        kept = record[f"average_{average}_{job}"]
        assert kept["error"] < 3e-7 < 1e-3 < kept["distance"]
        assert record[f"average_{average}_1_ours"]["bits"] == record[f"average_{average}_1_one_pass"]["bits"]


REASONS = {
    "stage_0": "FP16_UnfusedOptimizer (ZeRO stage 0) keeps its own step",
    "stage_3": "DeepSpeedZeroOptimizer_Stage3 (ZeRO stage 3) keeps its own step",
    "offload": "not together with offload of the optimizer",
    "changed": "this DeepSpeedZeroOptimizer is not one of those whose source is known",
}


@pytest.mark.parametrize("name", REASONS)
def test_elsewhere_deepspeeds_step_is_kept(records: list[dict[str, Any]], name: str) -> None:
    kept = "DeepSpeed's own step is used, with PathSwitchAdamW in it"
    for rank, record in enumerate(records):
        done, ours = record["fallbacks"][name], record["fallbacks"][f"{name}_ours"]
        assert not done["replaced"]
        assert done["warnings"] == ([] if rank else [f"pathswitch: one_pass: {REASONS[name]}: {kept}"])
        assert (done["losses"], done["weights"]) == (ours["losses"], ours["weights"])
        assert record["fallbacks"]["as_it_was"] == {"replaced": True, "warnings": []}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("unknown", "params: given 'momentum'; allowed: lr, betas, eps, weight_decay, one_pass, average, "),
        ("torch_adam", "torch_adam: given True; allowed: False, or leave the key out"),
        ("not_decoupled", "adam_w_mode: given False; allowed: True, or leave the key out"),
        ("max_norm", "max_norm: given 1.0; allowed: 0, or no such key: under DeepSpeed gradients are clipped by "),
        ("client", "max_norm: given 1.0; allowed: 0, or no such key: under DeepSpeed gradients are clipped by "),
        ("string", "lr: given '1e-3'; allowed: a number"),
        ("average", "average: given 2.0; allowed: a decay 0 < d < 1"),
        ("one_pass", "one_pass: given 'yes'; allowed: true or false"),
    ],
)
def test_wrong_parameters_are_refused_on_every_rank(records: list[dict[str, Any]], name: str, said: str) -> None:
    for record in records:
        assert record["refusals"][name].startswith(f"ConfigError: PathSwitchAdamW {said}")


def test_kernels_that_cannot_be_had_are_missed_before_any_step(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["refusals"]["no_compiler"] == "KernelError: nothing compiles for cpu"
        assert record["refusals"]["reference"] == ""
