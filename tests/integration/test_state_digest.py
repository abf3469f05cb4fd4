"""The optimizer state that is loaded is the one that was saved, to the bit, whatever the files say of themselves."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import ds_job
import ds_ranks
import pytest

pytestmark = pytest.mark.slow
STAGES = (0, 1, 2, 3)
LAYOUTS = ("float32 gradients", "another order", "aligned", "offloaded 2", "offloaded 3", "many groups")
FAULTS = {"flip_bit": "exp_avg_sq", "swap": "weights", "drop": "exp_avg"}
OTHERS = {stream: {*FAULTS.values()} - {stream} for stream in FAULTS.values()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("state_digest")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """All ranks' records: two of them save, three load."""
    records = {}
    for phase, ranks in (("save", 2), ("load", 3)):
        job = ds_ranks.run(
            "worker_state_digest.py", f"--phase={phase}", str(folder), folder=folder, ranks=ranks, timeout_seconds=120
        )
        assert job.returncode == 0, job.output[-4000:]
        records[phase] = [json.loads((folder / phase / f"rank{rank}.json").read_text()) for rank in range(ranks)]
    return records


@pytest.mark.parametrize("stage", (0, 1, 3))
def test_three_ranks_load_what_two_have_saved(ranks: dict[str, list[dict[str, Any]]], stage: int) -> None:
    saved = ranks["save"][0][f"saved{stage}"]
    assert saved.keys() == OTHERS.keys()
    for rank in ranks["load"]:
        assert (rank[f"error{stage}"], rank[f"loaded{stage}"]) == ("", saved)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("stage", STAGES)
def test_damage_in_whole_files_is_refused_by_all_ranks(
    ranks: dict[str, list[dict[str, Any]]], stage: int, fault: str
) -> None:
    saved, stream = ranks["save"][0][f"saved{stage}"], FAULTS[fault]
    for rank in ranks["save"]:
        error = rank[f"faults{stage}"][fault]
        assert f"{fault}{stage}/global_step4: saved by 2 ranks, loaded by 2: the loaded optimizer state is not" in error
        assert f"{stream}: expected {saved[stream]['digest']} of 144 elements, found " in error
        assert not any(f"{other}: expected" in error for other in OTHERS[stream])


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_asked_for_is_neither_compared_nor_recorded(
    ranks: dict[str, list[dict[str, Any]]], stage: int
) -> None:
    for rank in ranks["save"]:
        assert rank[f"faults{stage}"]["not compared"] == ""
        assert rank[f"faults{stage}"]["not recorded"] is None


@pytest.mark.parametrize("stage", STAGES)
def test_moments_are_reset_behind_the_comparison(ranks: dict[str, list[dict[str, Any]]], stage: int) -> None:
    saved = ranks["save"][0][f"saved{stage}"]
    for rank in ranks["save"]:
        record = rank[f"reset{stage}"]
        assert (record["error"], record["forked"]) == ("", saved)
        assert record["after"]["weights"] == saved["weights"]
        assert {record["after"][stream]["digest"] for stream in ("exp_avg", "exp_avg_sq")} == {"0" * 32}


def test_a_conversion_that_loses_the_order_is_refused(ranks: dict[str, list[dict[str, Any]]]) -> None:
    for rank in ranks["load"]:
        said = "saved by 2 ranks, loaded by 3: the loaded optimizer state is not the one that was saved: exp_avg: "
        assert said in rank["wrong"] and "exp_avg_sq: " not in rank["wrong"]


def test_a_conversion_of_round_robin_gradients_is_refused(ranks: dict[str, list[dict[str, Any]]]) -> None:
    """DeepSpeed's own map from parameters to partitions is in another order there, and so is what it converts."""
    for rank in ranks["load"]:
        assert "loaded by 3: the loaded optimizer state is not the one that was saved: " in rank["wrong order"]


def test_the_digest_does_not_depend_on_how_deepspeed_keeps_the_state(ranks: dict[str, list[dict[str, Any]]]) -> None:
    for rank in ranks["save"]:
        layouts = rank["layouts"]
        assert {layout["error"] for layout in layouts.values()} == {""}
        assert [layouts[name]["class"] for name in ("float32 gradients", "offloaded 2", "offloaded 3")] == [
            "BF16_Optimizer",
            "DeepSpeedZeroOptimizer",
            "DeepSpeedZeroOptimizer_Stage3",
        ]
        first = layouts["float32 gradients"]["saved"]
        assert {stream: digest["elements"] for stream, digest in first.items()} == dict.fromkeys(OTHERS, 144 - 8)
        assert all(layout["saved"] == first for layout in layouts.values()), "trained alike, to the bit"
        assert len(layouts) == len(LAYOUTS)


def test_pipeline_stages_are_added_up(ranks: dict[str, list[dict[str, Any]]]) -> None:
    for rank in ranks["save"]:
        assert rank["pipeline"]["error"] == ""
        elements = {stream: digest["elements"] for stream, digest in rank["pipeline"]["saved"].items()}
        assert elements == dict.fromkeys(OTHERS, 4 * (8 * 8 + 8))


def test_weights_that_are_rounded_on_purpose_are_not_compared(ranks: dict[str, list[dict[str, Any]]]) -> None:
    assert {rank["rounded"] for rank in ranks["save"]} == {""}


def test_the_files_tell_without_a_job(ranks: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    command = [ds_job.BIN / "pathswitch", "verify", folder, "--state", "--json"]
    environment = ds_job.environment()
    del environment["DS_ACCELERATOR"]  # DeepSpeed says then which one it takes
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    found = {Path(result["folder"]).relative_to(folder).parts[0]: result for result in json.loads(done.stdout)}
    assert done.returncode == 1
    for stage in (1, 2, 3):
        assert found[f"stage{stage}"]["state"] == found[f"fork{stage}"]["state"] == "same"
        assert found[f"without{stage}"]["state"] == "not recorded"
        saved = ranks["save"][0][f"saved{stage}"]
        for fault, stream in FAULTS.items():
            result = found[f"{fault}{stage}"]
            assert (result["state"], result["whole"]) == ("differs", False)
            assert [problem["file"] for problem in result["problems"]] == [f"optimizer state, {stream}"]
            assert result["problems"][0]["expected"] == f"{saved[stream]['digest']} of 144 elements"
    assert {found[layout]["state"] for layout in LAYOUTS} == {"same"}
    assert "under ZeRO 0 do not name the elements" in found["stage0"]["state"] and found["stage0"]["whole"]
