"""Checkpoints go on with another number of ranks: the same bits are loaded, and training goes on with the same LR."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import ds_ranks
import pytest
from small_disks import NO_DISKS, small_disks
from tiny_plan import PLAN

from pathswitch.config import plan_from_params

pytestmark = pytest.mark.slow
STAGES = ("1", "2", "3")
# Job, its ranks, and the job whose checkpoints it loads: 4 to 2, 2 to 1, 1 to 2.
JOBS = (("four", 4, ""), ("two", 2, "four"), ("one", 1, "two"), ("two again", 2, "one"))
LOADS = [(name, other) for name, _, other in JOBS if other]
# Another number of ranks adds the same gradients up in another order: a rounding error of fp32 per update.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-6


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of each job saw."""
    folder, result = tmp_path_factory.mktemp("sizes"), {}
    with small_disks(folder / "disks") as disks:
        for name, ranks, other in JOBS:
            flags = (f"--name={name}", f"--load={other}")
            job = ds_ranks.run("worker_sizes.py", *flags, str(folder), folder=folder, ranks=ranks, extra=disks)
            assert job.returncode == 0, job.output[-4000:]
            result[name] = json.loads((folder / f"{name}_record" / "rank0.json").read_text())
    return result


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("name", "other"), LOADS)
def test_the_same_bits_are_loaded(records: dict[str, Any], name: str, other: str, stage: str) -> None:
    saved, loaded = records[other]["saved"][stage], records[name][other][stage]
    assert len(saved["state"]) == 4 * 3 + 2, "four parameters with two moments each, steps, weight decays"
    assert loaded["state"] == saved["state"]
    assert loaded["loaded"].endswith(f"{other}/stage{stage}/global_step4")
    assert not [left for left in loaded["left"] if left.startswith(".")], "the converted copy is gone"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", [name for name, _, _ in JOBS])
def test_the_digest_is_that_of_the_whole_parameters(records: dict[str, Any], name: str, stage: str) -> None:
    """However the shards are cut and padded: computed anew, one number after the other."""
    saved = records[name]["saved"][stage]
    assert saved["digest"] == {
        stream: {"digest": digest_of(saved["state"], key), "elements": 144}
        for stream, key in (("exp_avg", "exp_avg"), ("exp_avg_sq", "exp_avg_sq"), ("weights", "fp32"))
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("name", "other"), LOADS)
def test_the_digest_is_the_same_with_another_number_of_ranks(
    records: dict[str, Any], name: str, other: str, stage: str
) -> None:
    assert records[name][other][stage]["digest"] == records[other]["saved"][stage]["digest"]


def digest_of(state: dict[str, Any], key: str) -> str:
    """Return the digest of all parameters' ``key``, as plugin/pathswitch/kernels/csrc/maths.h defines it."""
    lanes = []
    for lane in (0, 1):
        total = 0
        for name in (name.removesuffix(f"/{key}") for name in state if name.endswith(f"/{key}")):
            values = state[f"{name}/{key}"]
            bits = struct.unpack(f"{len(values)}I", struct.pack(f"{len(values)}f", *values))
            digest = sum(value * element_key(index, lane) for index, value in enumerate(bits))
            name_bytes = hashlib.blake2b(name.encode(), digest_size=16).digest()[8 * lane : 8 * lane + 8]
            total += (int.from_bytes(name_bytes, "little") | 1) * digest
        lanes.append(total % 2**64)
    return f"{lanes[0]:016x}{lanes[1]:016x}"


def element_key(index: int, lane: int) -> int:
    block, column = divmod(index, 1024)
    column_key = mix((2 * column + lane + 1) * 0x9E3779B97F4A7C15) >> 32
    return column_key * (mix((2 * block + lane + 1) * 0xD1342543DE82EF95) | 1)


def mix(value: int) -> int:
    value %= 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("name", "other"), LOADS)
def test_training_goes_on_alike(records: dict[str, Any], name: str, other: str, stage: str) -> None:
    saved, loaded = records[other]["saved"][stage], records[name][other][stage]
    assert [lr for lr, _ in loaded["rows"]] == [lr for lr, _ in saved["rows"]]
    assert [loss for _, loss in loaded["rows"]] == pytest.approx(
        [loss for _, loss in saved["rows"]], rel=LOSS_TOLERANCE
    )
    later, expected = loaded["later"], saved["later"]
    assert (later["steps"], later["decays"]) == ([8], [0.1, 0.0]), "one count per update, each group's own weight decay"
    for name_in_model in (key for key in expected if "/" in key):
        flat, flat_expected = later[name_in_model], expected[name_in_model]
        assert flat == pytest.approx(flat_expected, abs=WEIGHT_TOLERANCE), name_in_model


@pytest.mark.parametrize(("name", "other"), LOADS)
def test_a_branch_may_have_another_size(records: dict[str, Any], name: str, other: str) -> None:
    branch = plan_from_params(PLAN).path("v1")
    rows = records[name][other]["1"]["branch"]
    assert [lr for lr, _ in rows] == [branch.lr(step) for step in range(4, 8)]
    # Its first update is the main path's own next one.
    assert rows[0][1] == pytest.approx(records[other]["saved"]["1"]["rows"][0][1], rel=LOSS_TOLERANCE)


@pytest.mark.parametrize(("name", "other"), LOADS)
def test_layouts(records: dict[str, Any], name: str, other: str) -> None:
    layouts = records[name]["layouts"]
    assert (layouts["1 to 2"], layouts["2 to 1"]) == ("", "")
    for there, here in ((1, 3), (3, 1), (0, 1), (1, 0)):
        error = layouts[f"{there} to {here}"]
        assert error.startswith("CheckpointError: ")
        assert f"saved under ZeRO stage {there}, this job has stage {here}; allowed: stage" in error


@pytest.mark.parametrize(("name", "other"), LOADS)
def test_damage_is_found_by_other_ranks_than_those_that_wrote(records: dict[str, Any], name: str, other: str) -> None:
    assert "optim_states.pt: expected " in records[name]["damaged"]


@pytest.mark.parametrize(("name", "other"), LOADS)
def test_no_room_for_the_conversion(records: dict[str, Any], name: str, other: str) -> None:
    if "full disk" not in records[name]:
        pytest.skip(NO_DISKS)
    full = records[name]["full disk"]
    assert full["error"].startswith("CheckpointError: ")
    assert "its conversion for another number of ranks failed: " in full["error"]
    assert " bytes are free in " in full["error"]
    assert full["left"] == ["filler"]
    assert full["again"] == ""
