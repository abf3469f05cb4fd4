"""Accelerate and Hugging Face's Trainer, with and without DeepSpeed, two processes each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ds_job
import pytest

from pathswitch.config import plan_from_params

pytestmark = pytest.mark.slow

V1 = {"name": "v1", "steps": 8, "alpha": 0.5}
PLAN = plan_from_params({"max_lr": 1e-3, "init_lr": 1e-5, "warmup_steps": 2, "versions": [V1]})


def planned(path: str, first: int, end: int) -> list[float]:
    return [PLAN.path(path).lr(step) for step in range(first, end)]


def records(folder: Path, command: list[str]) -> list[dict[str, Any]]:
    job = ds_job.run(command, folder, {"OUT": str(folder)}, timeout_seconds=300)
    assert job.returncode == 0, job.output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def without_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    launcher = [str(ds_job.BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(ds_job.free_port())]
    return records(tmp_path_factory.mktemp("accelerate"), [*launcher, str(ds_job.HERE / "worker_accelerate.py")])


@pytest.fixture(scope="module")
def with_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return records(tmp_path_factory.mktemp("trainer"), ds_job.deepspeed_command("worker_trainer.py"))


@pytest.mark.parametrize("accumulation", (1, 2))
def test_accelerate_counts_updates_not_processes(without_deepspeed: list[dict[str, Any]], accumulation: int) -> None:
    for rank in without_deepspeed:
        record = rank[f"accelerate_{accumulation}"]
        assert record["main"] == {"used": planned("main", 0, 4), "counter": 4}
        assert record["v1"] == {"used": planned("v1", 4, 8), "counter": 8}


def test_trainer_with_the_users_optimizer_and_scheduler(without_deepspeed: list[dict[str, Any]]) -> None:
    for rank in without_deepspeed:
        assert rank["trainer"]["main"]["used"] == planned("main", 0, 5)
        assert rank["trainer"]["v1"]["used"] == planned("v1", 4, 8)


@pytest.mark.parametrize("stage", (2, 3))
def test_trainer_with_a_ds_config(with_deepspeed: list[dict[str, Any]], stage: int) -> None:
    for rank in with_deepspeed:
        # Trainer splits the weights into a group with weight decay and one without: two calls an update.
        for path, first, end in (("main", 0, 5), ("v1", 4, 8)):
            used = rank[f"{path}_{stage}"]["used"]
            groups = len(used) // (end - first)
            assert groups >= 1
            assert used == [lr for lr in planned(path, first, end) for _ in range(groups)]
