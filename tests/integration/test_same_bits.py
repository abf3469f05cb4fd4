"""20 updates, kill -9, resume, 20 updates: the same bits as 40 in one go; and a fork goes on like its main path."""

from __future__ import annotations

import json
from typing import Any

import ds_ranks
import pytest

pytestmark = pytest.mark.slow
CASES = [f"{stage} {dtype}" for stage in (0, 1, 2, 3) for dtype in ("fp32", "bf16")]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saw: ``whole`` and ``resumed``."""
    ranks, folder = request.param, tmp_path_factory.mktemp(f"bits{request.param}")
    for mode in ("whole", "killed", "resumed"):
        job = ds_ranks.run("worker_bits.py", f"--mode={mode}", str(folder), folder=folder, ranks=ranks)
        assert (job.returncode == 0) == (mode != "killed"), job.output[-4000:]

    def read(mode: str, rank: int) -> Any:
        return json.loads((folder / mode / f"rank{rank}.json").read_text())

    return [{mode: read(mode, rank) for mode in ("whole", "resumed")} for rank in range(ranks)]


@pytest.mark.parametrize("case", CASES)
def test_killed_and_resumed_is_uninterrupted(records: list[dict[str, Any]], case: str) -> None:
    for record in records:
        whole, resumed = record["whole"][case], record["resumed"][case]
        assert resumed["rows"] == whole["rows"][20:], "LR, loss and inputs of every update"
        assert resumed["state"] == whole["state"]
    assert len({record["whole"][case]["rows"][0][2] for record in records}) == len(records), "ranks draw their own data"


@pytest.mark.parametrize("case", CASES)
def test_a_branch_goes_on_like_the_main_path_while_its_lr_is_the_same(records: list[dict[str, Any]], case: str) -> None:
    for record in records:
        whole, resumed = record["whole"][case], record["resumed"][case]
        assert resumed["branch"] == whole["rows"][20:23]
        assert resumed["state after the fork"] == whole["state after the fork"]
