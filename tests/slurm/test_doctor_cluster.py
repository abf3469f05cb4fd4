"""`pathswitch doctor` against a real controller."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import Cluster

pytestmark = pytest.mark.slow

PLAN = """
[schedule]
max_lr = 1e-3
[[versions]]
name = "v1"
steps = 10
[launch]
kind = "slurm"
command = ["train.py"]
"""
DOCTOR = [str(Path(sys.executable).with_name("pathswitch")), "doctor", "--json"]


def doctor(environ: dict[str, str], folder: Path, launch: str) -> dict[str, dict[str, str]]:
    (folder / "plan.toml").write_text(PLAN + launch)
    done = subprocess.run([*DOCTOR, "plan.toml"], cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    findings = {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert done.returncode == any(finding["status"] == "problem" for finding in findings.values())
    return findings


def test_a_plan_that_fits(cluster: Cluster, tmp_path: Path) -> None:
    findings = doctor(cluster.environment(), tmp_path, 'nodes = 4\ngpus_per_node = 2\ntime = "10-00:00:00"')
    assert findings["SLURM controller"]["found"].endswith(" is UP")
    assert findings["requeue"]["found"] == "JobRequeue=1"
    assert findings["preemption"]["found"] == "PreemptMode=REQUEUE, KillWait=5 sec; ranks get SIGTERM alone"
    main = findings["partition main"]
    assert main["status"] == "ok"
    assert main["found"] == "UP, 4 nodes, MaxTime=UNLIMITED, PreemptMode=REQUEUE, GraceTime=60, 2 GPUs a node"
    assert findings["accounting"]["status"] == "note"


@pytest.mark.parametrize(
    ("launch", "name", "todo"),
    [
        ("nodes = 5", "partition main", "nodes = 4, or fewer"),
        ("gpus_per_node = 3", "partition main", "gpus_per_node = 2, or fewer"),
        ('partition = "high"', "partition", "partition = one of main, hi"),
    ],
)
def test_a_plan_that_does_not_fit(cluster: Cluster, tmp_path: Path, launch: str, name: str, todo: str) -> None:
    finding = doctor(cluster.environment(), tmp_path, launch)[name]
    assert finding["status"] == "problem" and finding["todo"].startswith(todo)


def test_limits_of_a_partition(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run("scontrol", "update", "PartitionName=hi", "MaxTime=90", "MaxNodes=2")
    try:
        too_long = doctor(cluster.environment(), tmp_path, 'partition = "hi"\ntime = "01:30:01"')["partition hi"]
        too_wide = doctor(cluster.environment(), tmp_path, 'partition = "hi"\nnodes = 3')["partition hi"]
        fitting = doctor(cluster.environment(), tmp_path, 'partition = "hi"\ntime = "01:30:00"')["partition hi"]
        cluster.run("scontrol", "update", "PartitionName=hi", "State=DOWN")
        down = doctor(cluster.environment(), tmp_path, 'partition = "hi"')["partition hi"]
    finally:
        cluster.run("scontrol", "update", "PartitionName=hi", "MaxTime=UNLIMITED", "MaxNodes=UNLIMITED", "State=UP")
    assert too_long["todo"] == 'time = "01:30:00": a job goes on in its next one, in [launch]'
    assert too_wide["todo"] == "nodes = 2, or fewer, in [launch]"
    assert fitting["status"] == "ok" and "MaxTime=01:30:00" in fitting["found"]
    assert down["status"] == "problem" and down["found"].startswith("DOWN")


def test_a_controller_that_is_not_there(cluster: Cluster, tmp_path: Path) -> None:
    nobody = (cluster.folder / "slurm.conf").read_text().replace("SlurmctldPort=", "SlurmctldPort=1 #")
    (tmp_path / "slurm.conf").write_text(nobody)
    environ = cluster.environment() | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
    finding = doctor(environ, tmp_path, "")["SLURM controller"]
    assert finding["status"] == "problem" and "DOWN" in finding["found"]
