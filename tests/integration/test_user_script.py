"""Adoption by configuration alone: an unmodified script, the real launcher, one ds_config for all paths."""

from __future__ import annotations

import json
from pathlib import Path

import ds_job
import ds_ranks
import pytest

from pathswitch.config import build_plan, load_plan_file

pytestmark = pytest.mark.slow

PLAN = """
[schedule]
max_lr = 2e-3
init_lr = 1e-4
warmup_steps = 3
final_lr = 1e-5
[[versions]]
name = "v1"
steps = 10
[[versions]]
name = "v2"
steps = 20
alpha = 0.5
shape = "one_minus_sqrt"
"""
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    "scheduler": {"type": "PathSwitchLR", "params": {"plan": "plan.toml"}},
    "zero_optimization": {"stage": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    (folder / "plan.toml").write_text(PLAN)
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    return folder


def train(folder: Path, *arguments: str, path: str = "") -> ds_job.Finished:
    """Run user_train.py on two ranks; the environment is all that differs between paths."""
    settings = ["--deepspeed", "--deepspeed_config", "ds_config.json", "--save_dir", path or "main"]
    settings += ["--lr_log", f"lr_{path or 'main'}"]
    command = ds_job.deepspeed_command("user_train.py", *settings, *arguments)
    return ds_job.run(command, folder, {"PATHSWITCH_PATH": path} if path else None, timeout_seconds=200)


def logged(folder: Path, path: str) -> list[list[list[float]]]:
    files = [folder / f"lr_{path}.rank{rank}" for rank in (0, 1)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def planned(folder: Path, path: str, first: int, end: int) -> list[list[float]]:
    lr = build_plan(load_plan_file(folder / "plan.toml")).path(path).lr
    return [[step, lr(step)] for step in range(first, end)]


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Main path past the second fork (20); v2 forked there, losing a rank at 27 and resumed from 25."""
    assert "pathswitch" not in (ds_job.HERE / "user_train.py").read_text().lower()
    main = train(folder, "--steps", "22")
    assert main.returncode == 0, main.output[-3000:]
    lost = train(
        folder, "--steps", "30", "--load_dir", "main", "--load_tag", "global_step20", "--die_at", "27", path="v2"
    )
    assert lost.returncode != 0
    resumed = train(folder, "--steps", "30", "--load_dir", "v2", path="v2")
    assert resumed.returncode == 0, resumed.output[-3000:]
    return folder


def test_main_path(trained: Path) -> None:
    for rank in logged(trained, "main"):
        assert rank == planned(trained, "main", 0, 22)


def test_branch_from_its_first_update_and_again_after_a_lost_rank(trained: Path) -> None:
    resumed = planned(trained, "v2", 25, 30)
    for rank in logged(trained, "v2"):
        # A rank that waits for the lost one may or may not have got as far as 28.
        before, after = rank[: -len(resumed)], rank[-len(resumed) :]
        assert before[:7] == planned(trained, "v2", 20, 27) and len(before) <= 8
        assert after == resumed
    plan = build_plan(load_plan_file(trained / "plan.toml"))
    assert plan.path("v2").lr(20) == plan.path("main").lr(20), "the LR is continuous across the fork"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("v2", "path 'v2' starts from a checkpoint of 'main' at step 20, but the counter stands at 0"),
        ("nonsense", "environment variable PATHSWITCH_PATH: given 'nonsense'; allowed: main, v1, v2"),
    ],
)
def test_a_job_that_cannot_be_right_fails(folder: Path, path: str, message: str) -> None:
    settings = ["--deepspeed", "--deepspeed_config", "ds_config.json", "--steps", "30", "--save_dir", "bad"]
    extra = {"PATHSWITCH_PATH": path}
    job = ds_ranks.run("user_train.py", *settings, "--lr_log", f"bad_{path}", folder=folder, extra=extra)
    assert job.returncode != 0
    assert message in job.output
    updates = [line for log in folder.glob(f"bad_{path}*") for line in log.read_text().splitlines()]
    assert updates == []
