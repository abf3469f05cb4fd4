"""Checkpoints of PathSwitchAdamW: resumes behind a kill, other numbers of ranks, other optimizers, a fork's policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ds_ranks
import pytest
from same_steps import assert_same_steps

pytestmark = pytest.mark.slow

Records = dict[str, list[dict[str, Any]]]
RESUMED = ("0_fp32", "0_bf16", "1_fp32", "1_bf16", "1_bf16_fp32-sums", "2_bf16", "3_bf16", "3_fp32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adamw_checkpoints")


@pytest.fixture(scope="module")
def records(folder: Path) -> Records:
    """Records of the job that is killed and of the one behind it, by part and rank."""
    killed = ds_ranks.run("worker_adamw_checkpoints.py", str(folder), "first", folder=folder)
    assert killed.returncode == -9, killed.output[-4000:]
    job = ds_ranks.run("worker_adamw_checkpoints.py", str(folder), "resumed", folder=folder)
    assert job.returncode == 0, job.output[-4000:]
    first = [json.loads((folder / f"first{rank}.json").read_text()) for rank in (0, 1)]
    return {
        "first": first,
        "resumed": [json.loads((folder / "resumed" / f"rank{rank}.json").read_text()) for rank in (0, 1)],
    }


@pytest.mark.parametrize("name", RESUMED)
def test_a_resume_goes_on_to_the_same_bits(records: Records, name: str) -> None:
    for first, resumed in zip(records["first"], records["resumed"], strict=True):
        assert resumed[name]["loaded"] == first[name]["saved"] != first[name]["weights"]
        for what in ("losses", "norms", "weights"):
            assert resumed[name][what] == first[name][what]


@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_a_run_of_torchs_adamw_goes_on_with_ours_and_back(records: Records, stage: int) -> None:
    for resumed in records["resumed"]:
        switched, stock = resumed[f"switched_{stage}"]["losses"], resumed[f"not_switched_{stage}"]["losses"]
        assert len(switched) == 9
        assert switched == pytest.approx(stock, rel=1e-5)


def test_a_forks_policy(records: Records) -> None:
    for resumed in records["resumed"]:
        stock, ours, one_pass = (resumed[f"policy_{name}"] for name in ("stock", "ours", "one_pass"))
        for job in (stock, ours, one_pass):
            assert (job["moments"], job["steps"], job["steps_then"]) == (0, [0, 0], [3, 3])
            assert job["losses"] == pytest.approx(stock["losses"], rel=1e-5)
        assert_same_steps(one_pass, ours, is_clipped=True)
        assert ours["means_kept"] and ours["means"] == 2


def test_another_number_of_ranks(records: Records, folder: Path) -> None:
    """One rank adds the same gradients, halved, in the same order, and its norm has no rounding of a part."""
    job = ds_ranks.run("worker_adamw_checkpoints.py", str(folder), "alone", folder=folder, ranks=1)
    assert job.returncode == 0, job.output[-4000:]
    alone = json.loads((folder / "alone" / "rank0.json").read_text())
    for name in ("2_bf16", "3_fp32"):
        first = records["first"][0][name]
        assert alone[name]["losses"] == first["losses"]
        assert alone[name]["norms"] == pytest.approx(first["norms"], rel=2**-22, abs=0)
        assert alone[name]["weights"].partition(" ")[0] == first["weights"].partition(" ")[0]
    lost = "pathswitch: DeepSpeed's converter leaves out the running average: it begins with these weights"
    assert (alone["2_bf16"]["warnings"], alone["3_fp32"]["warnings"]) == ([lost], [])
