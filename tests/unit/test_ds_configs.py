"""Every recipe of ds_configs/ makes a real engine whose updates use the plan's LR."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pathswitch.config import build_plan, load_plan_file, plan_from_params

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "integration"))

import ds_job  # noqa: E402

RECIPES = ["zero1_bf16_one_pass", "zero1_fp16", "zero1_fp32", "zero1_fp32_inline", "zero2_bf16", "zero3_bf16"]
PLAN = build_plan(load_plan_file(ROOT / "ds_configs" / "plan.toml"))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("recipes")
    for file in (ROOT / "ds_configs").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    port = str(ds_job.free_port())
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    job = ds_job.run([sys.executable, str(ds_job.HERE / "worker_recipes.py"), str(folder)], folder, rank)
    assert job.returncode == 0, job.output[-4000:]
    result = json.loads((folder / "rank0.json").read_text())
    assert isinstance(result, dict)
    return result


def test_every_recipe_is_tested_and_in_the_table() -> None:
    assert sorted(file.stem for file in (ROOT / "ds_configs").glob("*.json")) == RECIPES
    table = (ROOT / "ds_configs" / "README.md").read_text()
    assert all(f"| `{name}.json` |" in table for name in RECIPES)


def test_inline_recipe_is_the_plan_file() -> None:
    settings = json.loads((ROOT / "ds_configs" / "zero1_fp32_inline.json").read_text())
    parameters = settings["scheduler"]["params"]
    del parameters["path"]
    assert plan_from_params(parameters) == PLAN


@pytest.mark.parametrize("name", RECIPES)
def test_optimizers_lr_is_max_lr(name: str) -> None:
    settings = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    assert settings["optimizer"]["params"]["lr"] == PLAN.main.max_lr


@pytest.mark.slow
def test_the_step_in_one_pass_is_taken(record: dict[str, Any]) -> None:
    assert [name for name in RECIPES if record[name]["one_pass"]] == ["zero1_bf16_one_pass"]


@pytest.mark.parametrize("name", RECIPES)
def test_engine_uses_the_plans_lr(record: dict[str, Any], name: str) -> None:
    used = record[name]
    fork_step = PLAN.path("v2").start_step
    assert used["fork_step"] == fork_step
    assert used["main"] == [PLAN.path("main").lr(step) for step in (0, 1)]
    assert used["v2"] == [PLAN.path("v2").lr(step) for step in (fork_step, fork_step + 1)]
