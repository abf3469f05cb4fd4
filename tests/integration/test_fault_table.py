"""Every fault is refused on both ranks with one message, before anything is loaded, and a resume can go back."""

from __future__ import annotations

import pytest
from fault_table import ACTIONS, Faults, measure, table, verdict
from rich.console import Console
from small_disks import NO_DISKS

pytestmark = pytest.mark.slow

# What the message must name: the file, and what was expected and found.
NAMED = {
    "truncated shard": "states.pt: expected * bytes, found * bytes",
    "one flipped bit": "states.pt: expected blake3 *, found blake3 ",
    "shard of another step": "states.pt: expected * found ",
    "shard of another run": "states.pt: expected * found ",
    "missing rank": "states.pt: expected * bytes, found no such file",
    "extra rank": "mp_rank_01_model_states.pt: expected no such file, found a shard that the manifest does not have",
    "manifest missing": "not committed: it has no pathswitch.json",
    "manifest edited": "pathswitch.json: edited: digest expected *, found ",
    "manifest of another step": "states.pt: expected * found ",
    "empty latest": "latest is empty, but the folder holds checkpoints",
    "garbled latest": "latest names * but the folder holds checkpoints",
    "latest past the commit": "latest names 'global_step9', but the folder holds checkpoints",
}
WHILE_SAVING = {
    "disk full during save": "What was saved before is as it was; ",
    "permission denied": "Read-only file system",
    "clock going backwards": "",
}
LATEST = ("empty latest", "garbled latest", "latest past the commit")
HIT = {"fork": "main/global_step4", "resume": "main/global_step6", "release": "v1/global_step8"}
STAGES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Faults:
    result = measure(tmp_path_factory.mktemp("faults"))
    Console(width=140).print(table(result))
    return result


def test_all_faults_are_in_the_table(faults: Faults) -> None:
    assert set(faults) == set(STAGES)
    assert all(set(faults[stage]) == {*NAMED, *WHILE_SAVING} for stage in STAGES)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", WHILE_SAVING)
def test_a_save_that_fails_leaves_the_newest_checkpoint(faults: Faults, fault: str, stage: str) -> None:
    cells = faults[stage][fault]["save"]
    if cells[0] is None:
        pytest.skip(NO_DISKS)
    assert verdict(cells) == ("goes on from 8" if "clock" in fault else "refused, goes on from 6")
    assert cells[0]["damaged"] == []
    assert WHILE_SAVING[fault] in cells[0]["error"]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", NAMED)
def test_refused_by_name_before_anything_is_loaded(faults: Faults, fault: str, stage: str) -> None:
    met_by = faults[stage][fault]
    assert list(met_by) == [
        action for action in ACTIONS if action != "save" and (action != "fork" or fault not in LATEST)
    ]
    for action, cells in met_by.items():
        assert verdict(cells).startswith("refused"), (action, cells)
        position = 0
        for part in NAMED[fault].split("*"):
            position = cells[0]["error"].find(part.strip(), position)
            assert position >= 0, (part, cells[0]["error"])
        assert cells[0]["damaged"] == ([] if fault in LATEST else [HIT[action]]), "nothing else is damaged"


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("fault", NAMED)
def test_a_resume_goes_back_to_the_newest_whole_checkpoint(faults: Faults, fault: str, stage: str) -> None:
    for cell in faults[stage][fault]["resume"]:
        assert cell["previous"] == ""
        assert cell["step"] == (6 if fault in LATEST else 4)
        assert cell["damaged afterwards"] == [], "its next save has replaced the damaged one"
