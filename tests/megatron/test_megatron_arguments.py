"""Megatron-LM's own parser takes the arguments of every job, and lays out the samples that the plan means."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pathswitch.config import load_plan_file
from pathswitch.launch.megatron import megatron_job

WORKER = Path(__file__).with_name("worker_megatron_arguments.py")
PLAN = """
[schedule]
max_lr = 1e-3
alpha = 0.4
[[versions]]
name = "v1"
steps = 10
megatron_data = "v1"
[[versions]]
name = "v2"
steps = 25
megatron_data = ["0.7", "v2", "0.3", "v1"]
[megatron]
global_batch_size = 4
"""
ONE_DATASET = PLAN.replace("megatron_data", "#") + 'data = "v1"\nhorizon_steps = 70\n'


def requests_of(plan: Path, text: str) -> dict[str, dict[str, Any]]:
    plan.write_text(text)
    jobs = [megatron_job(plan, load_plan_file(plan), *which) for which in (("main", "v1"), ("main", "v2"), ("v2",))]
    return {f"{job.path} {job.version}": {"arguments": job.arguments, "iteration": job.start_step} for job in jobs}


@pytest.mark.slow
def test_megatron_takes_the_arguments_of_every_job(tmp_path: Path) -> None:
    checkout = os.environ.get("MEGATRON_PATH")
    if checkout is None or not (Path(checkout) / "megatron" / "training" / "arguments.py").is_file():
        pytest.skip("no Megatron-LM: set MEGATRON_PATH to a checkout of NVIDIA/Megatron-LM (core 0.16 or later)")
    requests = requests_of(tmp_path / "plan.toml", PLAN)
    requests |= {f"one {name}": job for name, job in requests_of(tmp_path / "plan.toml", ONE_DATASET).items()}
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    request.write_text(json.dumps(requests))
    command = [sys.executable, "-W", "ignore", str(WORKER), checkout, str(request), str(answer)]
    environment = {**os.environ, "WORLD_SIZE": "1", "RANK": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    if re.search(r"^(ModuleNotFound|Import)Error", done.stderr, re.MULTILINE):
        pytest.skip(f"Megatron-LM of {checkout} cannot be imported here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(answer.read_text())
    laid_out = {name: (job["samples"], job["iterations"], job["exit_interval"]) for name, job in found.items()}
    assert laid_out == {
        "main v1": (40, 10, None),
        "main v2": (100, 35, 25),
        "v2 v2": (100, 35, None),
        "one main v1": (280, 70, 10),
        "one main v2": (280, 70, 25),
        "one v2 v2": (280, 70, 35),
    }
    branch = found["v2 v2"]
    assert branch["data_path"] == ["0.7", str(tmp_path / "v2"), "0.3", str(tmp_path / "v1")]
    assert (branch["lr"], branch["min_lr"]) == (1e-3, 0.0)
    assert branch["save"] == branch["load"] == str(tmp_path / "checkpoints" / "v2")
