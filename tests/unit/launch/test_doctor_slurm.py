"""What the doctor says of SLURM, whose commands are scripts here; tests/slurm has a real cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from doctor_subject import SCHEDULE, by_name, program, subject

from pathswitch.config import PlanFile
from pathswitch.config.launch import LaunchSection
from pathswitch.launch.doctor import Finding, Subject, slurm
from pathswitch.launch.spec import job_specs

# As SLURM 22.05 prints them.
CONFIG = """Configuration data as of 2026-11-25T22:40:00
JobRequeue              = {requeue}
KillWait                = 30 sec
MinJobAge               = {age} sec
PreemptMode             = REQUEUE
SlurmctldParameters     = {parameters}
AccountingStorageType   = accounting_storage/{storage}
"""
PARTITION = (
    "PartitionName={name} AllowGroups=ALL AllowAccounts={accounts} AllowQos=ALL Default={default} GraceTime=5 "
    "MaxNodes=UNLIMITED MaxTime={time} MinNodes=0 Nodes=n[1-4] State={state} TotalNodes=4 PreemptMode=REQUEUE"
)
MAIN = {"name": "main", "accounts": "ALL", "default": "YES", "time": "1-00:00:00", "state": "UP"}
LONG = {"name": "long", "accounts": "llm,vision", "default": "NO", "time": "UNLIMITED", "state": "UP"}
DOWN = {"name": "old", "accounts": "ALL", "default": "NO", "time": "00:30:00", "state": "DOWN"}


def cluster(folder: Path, **config: str) -> Path:
    """Programs that answer as a cluster does."""
    values = {"requeue": "1", "age": "300", "parameters": "(null)", "storage": "none"} | config
    partitions = "\n".join(PARTITION.format(**record) for record in (MAIN, LONG, DOWN))
    answers = {
        "ping": config.get("ping", "echo 'Slurmctld(primary) at head is UP'"),
        "--version": "echo 'slurm 22.05.8'",
        "config": f"cat <<'END'\n{CONFIG.format(**values)}END",
        "partition": f"cat <<'END'\n{partitions}\nEND",
    }
    cases = f"case $1 in ping) {answers['ping']};; --version) {answers['--version']};; show) case $2 in\n"
    cases += f"config) {answers['config']}\n;; partition) {answers['partition']}\n;; esac;; esac"
    program(folder, "scontrol", cases)
    program(folder, "sinfo", config.get("sinfo", "printf '(null)\\ngpu:a100:8(S:0-1)\\ngpu:2\\n'"))
    program(folder, "sacctmgr", config.get("sacctmgr", "exit 1"))
    for name in ("sbatch", "squeue", "srun", "scancel", "sacct"):
        program(folder, name, "exit 0")
    return folder


def examined(folder: Path, launch: dict[str, Any] | None, **config: str) -> list[Finding]:
    base = subject(path=cluster(folder / "bin", **config))
    if launch is None:
        return list(slurm.check(base))
    plan = PlanFile.model_validate_json(
        json.dumps({**SCHEDULE, "launch": {"kind": "slurm", "command": ["x"], **launch}})
    )
    specs = tuple(job_specs(plan, folder, folder / "run"))
    return list(slurm.check(Subject(base.programs, plan, specs, folder / "run")))


def test_a_plan_that_fits(tmp_path: Path) -> None:
    findings = by_name(examined(tmp_path, {"gpus_per_node": 8, "nodes": 4, "time": "1-00:00:00"}))
    assert findings["SLURM controller"].found == "SLURM 22.05.8: Slurmctld(primary) at head is UP"
    assert findings["partition main"].status == "ok" and "8 GPUs a node" in findings["partition main"].found
    assert findings["requeue"].status == findings["preemption"].status == findings["finished jobs"].status == "ok"
    assert findings["accounting"].status == "note" and "needs none" in findings["accounting"].found
    assert not [name for name in findings if name in ("partition long", "partition old", "account and QOS")]


@pytest.mark.parametrize(
    ("launch", "name", "todo"),
    [
        ({"partition": "mian"}, "partition", "partition = one of main, long, old (did you mean 'main'?), in [launch]"),
        ({"partition": "old"}, "partition old", "another partition, or: scontrol update PartitionName=old State=UP"),
        ({"time": "1-00:00:01"}, "partition main", 'time = "1-00:00:00": a job goes on in its next one, in [launch]'),
        ({"nodes": 5}, "partition main", "nodes = 4, or fewer, in [launch]"),
        ({"gpus_per_node": 9}, "partition main", "gpus_per_node = 8, or fewer, in [launch]"),
        ({"partition": "main,long", "account": "web"}, "partition long", "another account (it is for llm, vision)"),
        ({"branches": {"nodes": 5}}, "partition main", "nodes = 4, or fewer, in [launch]"),
        ({"paths": {"v1": {"partition": "none"}}}, "partition", "partition = one of main, long, old, in [launch]"),
    ],
)
def test_what_a_partition_does_not_give(tmp_path: Path, launch: dict[str, Any], name: str, todo: str) -> None:
    finding = by_name(examined(tmp_path, launch))[name]
    assert finding.status == "problem" and finding.todo.startswith(todo), finding


@pytest.mark.parametrize(
    "launch",
    [
        {"partition": "long", "time": "365-00:00:00", "account": "llm"},
        {"gpus_per_node": 99, "gres": "none"},
        {"partition": "main,long", "nodes": 4, "account": "vision"},
    ],
)
def test_what_a_partition_gives(tmp_path: Path, launch: dict[str, Any]) -> None:
    findings = examined(tmp_path, launch)
    assert [finding for finding in findings if finding.status == "problem"] == []


def test_a_cluster_without_gpus(tmp_path: Path) -> None:
    finding = by_name(examined(tmp_path, {}, sinfo="echo '(null)'"))["partition main"]
    assert finding.status == "problem" and finding.todo == 'gres = "none", for ranks on CPUs, in [launch]'


def test_accounts_and_qos_are_those_of_the_user(tmp_path: Path) -> None:
    assoc = "printf 'llm|normal,high\\nvision|normal\\n'"
    findings = by_name(examined(tmp_path, {"account": "web", "qos": "high"}, sacctmgr=assoc, storage="slurmdbd"))
    assert findings["account"].status == "problem" and findings["account"].todo == "account = one of: llm, vision"
    assert findings["qos"].status == "ok" and findings["accounting"].status == "ok"
    findings = by_name(examined(tmp_path, {"account": "llm"}))
    assert findings["account and QOS"].status == "note", "no accounting database answers"


def test_what_the_cluster_does_with_jobs(tmp_path: Path) -> None:
    findings = by_name(examined(tmp_path, {}, requeue="0", age="5", parameters="preempt_send_user_signal"))
    assert findings["requeue"].status == findings["finished jobs"].status == "note"
    assert "the job's own signal" in findings["preemption"].found


@pytest.mark.parametrize("ping", ["echo 'Slurmctld(primary) at head is DOWN'; exit 1", "echo 'no config' >&2; exit 1"])
def test_a_controller_that_does_not_answer(tmp_path: Path, ping: str) -> None:
    [finding] = examined(tmp_path, {}, ping=ping)
    assert finding.status == "problem" and finding.todo.startswith("scontrol ping")
    [finding] = examined(tmp_path, None, ping=ping)
    assert finding.status == "skipped", "no plan asks for it"


def test_commands_that_are_missing(tmp_path: Path) -> None:
    empty = str(tmp_path / "empty")
    [finding] = slurm.check(subject(launch=LaunchSection(kind="slurm"), PATH=empty))
    assert finding.status == "problem" and "sbatch" in finding.found
    assert [finding.status for finding in slurm.check(subject(PATH=empty))] == ["skipped"]
    assert [finding.status for finding in slurm.check(subject(launch=LaunchSection(), PATH=empty))] == ["skipped"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30:00", 1800), ("01:00:00", 3600), ("2-03:04:05", 183845), ("UNLIMITED", None), ("NONE", None)],
)
def test_time_limits_as_slurm_prints_them(text: str, seconds: int | None) -> None:
    assert slurm.limit_seconds(text) == seconds
    if seconds is not None:
        assert slurm.time_seconds(slurm.as_plans_write(seconds)) == seconds
