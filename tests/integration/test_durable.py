"""Writers, forks with a policy, signatures, full and read-only disks, on real DeepSpeed with two ranks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ds_ranks
import pytest
from preloaded import Finished
from small_disks import NO_DISKS, small_disks
from tiny_plan import PLAN

from pathswitch.config import plan_from_params

pytestmark = pytest.mark.slow
CASES = [f"{stage} {dtype}" for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with small_disks(tmp_path_factory.mktemp("disks")) as places:
        yield places


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, disks: dict[str, str]) -> Finished:
    folder = tmp_path_factory.mktemp("durable")
    (folder / "out").mkdir()
    finished = ds_ranks.run("worker_durable.py", str(folder / "out"), folder=folder, extra=disks)
    assert finished.returncode == 0, finished.output[-4000:]
    return Finished(0, f"{folder / 'out'}\n{finished.output}")


@pytest.fixture(scope="module")
def records(job: Finished) -> list[dict[str, Any]]:
    """What each rank saw."""
    folder = Path(job.output.partition("\n")[0])
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("writer", ["0 False", "0 True", "1 False", "3 False", "3 True"])
def test_deepspeeds_own_writers(records: list[dict[str, Any]], writer: str) -> None:
    decoupled = writer.endswith("True")
    for record in (record["writers"][writer] for record in records):
        assert record["behind the first save"] == ([] if decoupled else ["global_step2"]), "committed when really done"
        assert list(record["files"]) == ["global_step2", "global_step4"]
        assert (record["latest"], record["load"], record["same"]) == ("global_step4", "", True)
        assert record["random state"], "of the save, not of the commit"
    shards = [name for name in records[0]["writers"][writer]["files"]["global_step4"] if "optim_states" in name]
    assert len(shards) == (0 if writer.startswith("0") else 2)


def test_a_writer_of_the_users_own(records: list[dict[str, Any]]) -> None:
    assert [record["writers"]["subclass"]["saved"] for record in records] == [2, 1]
    for record in (record["writers"]["subclass"] for record in records):
        assert (record["latest"], record["note"], record["step"]) == (False, 7, 2)
        assert list(record["files"]) == ["step2"]


def test_pipeline(records: list[dict[str, Any]]) -> None:
    for record in (record["pipeline"] for record in records):
        assert [name for name in record["files"] if name.startswith("layer_")] == [
            f"layer_0{layer}-model_states.pt" for layer in range(4)
        ]
        assert record["stages"] == 2
        assert record["branch"][0] == record["main"][0], "the branch's first update is the main path's own next one"
        assert "CheckpointError: " in record["damaged"]
        assert "layer_0" in record["damaged"]


@pytest.mark.parametrize("case", CASES)
def test_a_forks_policy_is_what_adam_works_with(records: list[dict[str, Any]], case: str) -> None:
    lrs = [plan_from_params(PLAN).path("v1").lr(step) for step in (4, 6)]
    for record in (record[f"policy {case}"] for record in records):
        changed, kept = record["changed"], record["kept"]
        for used, lr in ((changed["used"], lrs[0]), (changed["used again"], lrs[1])):
            assert (used["beta2"], used["weight_decay"], used["lrs"]) == (0.99, 0.3, [lr])
            assert used["norm"] == pytest.approx(0.001, rel=0.01)
        for used, lr in ((kept["used"], lrs[0]), (kept["used again"], lrs[1])):
            assert (used["beta2"], used["weight_decay"], used["lrs"]) == (0.999, 0.1, [lr])
            assert used["norm"] > 0.01, "not clipped"
        assert changed["moments"] == [0.0, 0.0]
        assert changed["moments again"][0] == 2.0, "reset at the fork, not at a resume"
        assert changed["moments again"][1] > 0
        assert kept["moments"] == record["kept moments"]
        assert kept["moments again"][0] == kept["moments"][0] + 2
        assert changed["policy"] == {
            "reset_moments": True,
            "beta2": 0.99,
            "weight_decay": 0.3,
            "gradient_clipping": 0.001,
        }
        assert record["parent whole"]


@pytest.mark.parametrize("case", CASES)
def test_what_a_ds_config_alone_changes_comes_from_the_checkpoint(records: list[dict[str, Any]], case: str) -> None:
    for record in records:
        used = record[f"policy {case}"]["by config"]
        assert used["weight_decay"] == 0.1
        clipped_by_config = case[0] in "03"
        assert (used["norm"] == pytest.approx(0.002, rel=0.01)) == clipped_by_config


def test_what_comes_from_the_checkpoint_is_said(job: Finished) -> None:
    assert "weight_decay of param group 0: ds_config 0.7, checkpoint 0.1: the checkpoint's holds" in job.output
    assert "gradient_clipping: ds_config 0.002, checkpoint 1.0: the checkpoint's holds" in job.output


def test_signatures(records: list[dict[str, Any]]) -> None:
    for record in (record["signatures"] for record in records):
        assert (record["right key"], record["no key"]) == ("", "")
        assert "pathswitch.json: is signed with another key" in record["wrong key"]
        assert "pathswitch.json: is not signed" in record["unsigned"]
        assert "signing_key_file: given" in record["short key"]
        assert "at least 16 bytes" in record["short key"]
        assert "No such file" in record["missing key"]
        assert "ds_config pathswitch.checkpoint.verify: given 'sizes'" in record["sizes with key"]


def test_code_in_a_pickle_does_not_run_where_a_key_is_configured(records: list[dict[str, Any]]) -> None:
    for record in (record["signatures"] for record in records):
        assert record["smuggled"].startswith("CheckpointError: ")
        assert not record["ran with the key"]
        assert record["ran without"], "the control: without a key this shard's code runs"


def test_what_verify_compares(records: list[dict[str, Any]]) -> None:
    for record in (record["modes"] for record in records):
        assert "mp_rank_00_model_states.pt: expected blake3 " in record["full"]
        assert record["sizes"] == ""


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("bad verify", "ds_config pathswitch.checkpoint.verify: given 'quick'; allowed: 'full', 'sizes' or 'off'"),
        ("bad key", "ds_config pathswitch.checkpoint.verfy: given 'unknown key'; allowed: verify, "),
        ("bad on_damage", "ds_config pathswitch.checkpoint.on_damage: given 'ignore'; allowed: 'refuse' or 'previous'"),
        ("bad section", "ds_config pathswitch.runs: given 'unknown key'; allowed: run, seq_len, checkpoint"),
        ("node local", "ds_config checkpoint.use_node_local_storage: given True; allowed: false"),
    ],
)
def test_a_bad_section_is_refused_before_training(records: list[dict[str, Any]], case: str, message: str) -> None:
    for record in records:
        assert record["modes"][case].startswith(f"ConfigError: {message}")


def test_a_tag_saved_again(records: list[dict[str, Any]]) -> None:
    for record in (record["same tag"] for record in records):
        assert record["replaced"]
        assert record["parent"], "the lineage holds the one that was replaced"
        assert record["note"] == "kept"
        assert record["linked"], "a hard link to the older checkpoint keeps its bytes"
        assert record["left"] == ["last", "latest", "zero_to_fp32.py", "zero_to_torch.py"]


def test_a_full_disk(records: list[dict[str, Any]], disks: dict[str, str]) -> None:
    if "FULL_DISK" not in disks:
        pytest.skip(NO_DISKS)
    errors = {record["FULL_DISK"]["error"] for record in records}
    assert len(errors) == 1, "the same on every rank"
    assert "run/global_step4 was not saved: rank 0: " in errors.pop()
    for record in (record["FULL_DISK"] for record in records):
        assert " bytes are free there" in record["error"]
        assert record["left"] == ["global_step2", "latest", "zero_to_fp32.py", "zero_to_torch.py"]
        assert (record["latest"], record["whole"]) == ("global_step2", ["global_step2"])
        assert (record["room again"], record["whole again"]) == ("", ["global_step2", "global_step4"])


def test_no_permission(records: list[dict[str, Any]], disks: dict[str, str]) -> None:
    if "READ_ONLY_DISK" not in disks:
        pytest.skip(NO_DISKS)
    for record in records:
        assert record["READ_ONLY_DISK"]["error"].endswith("run: Read-only file system")
