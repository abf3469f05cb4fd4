"""What plans become, byte for byte: tests/golden/launch/<case>/plan.toml and expected/<path>/<file>.

PATHSWITCH_REWRITE_GOLDEN=1 python -m pytest tests/slurm/test_golden.py   writes them anew; look at the difference.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from sbatch_check import check_script

from pathswitch.cli.jobs import submit_plan
from pathswitch.config import load_plan_file
from pathswitch.launch import hostfile, slurm, spec
from pathswitch.launch.launcher import launcher_of
from pathswitch.launch.spec import JobSpec, job_specs
from pathswitch.launch.submit import read_ds_config, rendered, write_files

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())
ON_SLURM = [case for case in CASES if 'kind = "slurm"' in (GOLDEN / case / "plan.toml").read_text()]
REWRITE = bool(os.environ.get("PATHSWITCH_REWRITE_GOLDEN"))
PYTHON, PROJECT, RUN_ID = "/opt/pathswitch/bin/python", "/project", "0a1b2c3d"
# Each node of a job is on a line of its own in SLURM's answer.
NODES = [f"n{number}" for number in range(1, 65)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for PROJECT, on a machine that stands for all."""
    monkeypatch.setattr(sys, "executable", PYTHON)
    monkeypatch.setattr(spec, "run_id", lambda run: RUN_ID)
    monkeypatch.setattr(slurm, "host_names", lambda node_list: NODES[: int(node_list)])
    monkeypatch.setattr(hostfile.HostfileLauncher, "_rendezvous", lambda launcher: ("10.0.0.1", 23456))
    monkeypatch.setattr(hostfile.HostfileLauncher, "end", lambda launcher: [])
    monkeypatch.setattr(hostfile.shutil, "which", lambda program: program)
    monkeypatch.setattr("pathswitch.launch.launcher.LocalLauncher.end", lambda launcher: [])
    for name in ("MASTER_ADDR", "DS_ENV_FILE", "DS_ACCELERATOR", "OMP_NUM_THREADS", "PDSH_SSH_ARGS_APPEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "project"


def jobs_of(case: str, project: Path) -> list[JobSpec]:
    """Write the files of a case's jobs in the run folder of a project, and return the jobs."""
    plans = shutil.copytree(GOLDEN / case, project / "plans", ignore=shutil.ignore_patterns("expected"))
    if (plans / "ds_config.json").exists() and "signing_key_file" in (plans / "ds_config.json").read_text():
        (plans / "keys").mkdir()
        (plans / "keys" / "run").write_text("0123456789abcdef")
    plan_file = load_plan_file(plans / "plan.toml")
    ds_config = read_ds_config(plan_file, plans)
    specs = job_specs(plan_file, plans, project / "runs" / "mine", ds_config=ds_config)
    write_files(rendered(specs, ds_config))
    return specs


def launch_lines(job: JobSpec, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what the job's agent runs at the beginning of each of its parts, and with which environment."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", str(job.nodes))
    starts = [job.start_step, *(part.end_step for part in job.parts[:-1])]
    lines: list[dict[str, Any]] = []
    for step in starts:
        launcher = launcher_of(job, "4711" if job.launch.kind == "slurm" else None)
        line = {"step": step, "command": launcher.command(job.command_from(step))}
        found = {**job.environment(), **launcher.environment()}
        of_machine = {"OMP_NUM_THREADS", "DS_ACCELERATOR"} | {k for k, v in os.environ.items() if found.get(k) == v}
        lines.append(line | {"environment": {k: v for k, v in found.items() if k not in of_machine}})
    return json.dumps(lines, indent=1) + "\n"


@pytest.mark.parametrize("case", CASES)
def test_a_plan_becomes_what_it_became(case: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    for job in jobs_of(case, project):
        (job.files.folder / "launch.json").write_text(launch_lines(job, monkeypatch))
        for file in sorted(job.files.folder.iterdir()):
            text = file.read_text()
            found[f"{job.path}/{file.name}"] = text.replace(str(project), PROJECT)
    expected = GOLDEN / case / "expected"
    if REWRITE:
        shutil.rmtree(expected, ignore_errors=True)
        for name, text in found.items():
            (expected / name).parent.mkdir(parents=True, exist_ok=True)
            (expected / name).write_text(text)
    assert not any(str(Path(__file__).parents[2]) in text for text in found.values())
    names = {str(file.relative_to(expected)) for file in expected.rglob("*") if file.is_file()}
    assert found.keys() == names
    for name, text in found.items():
        assert text == (expected / name).read_bytes().decode(), f"{case}/expected/{name}"


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_SLURM)
def test_bash_shellcheck_and_sbatch_accept_its_scripts(case: str, project: Path, large_cluster: Cluster) -> None:
    jobs = jobs_of(case, project)
    for job in jobs if jobs[1].launch != jobs[2].launch else jobs[:2]:
        said = check_script(job.files.batch_script, large_cluster)
        tasks = job.gpus_per_node if job.launch.launcher in (None, "srun") else 1
        processors = job.nodes * tasks * (job.launch.cpus_per_task or 1)
        if "--exclusive" in job.launch.sbatch:
            processors = job.nodes * 128
        partition = job.launch.partition or "main"
        assert f"using {processors} processors on nodes" in said and f"in partition {partition}" in said


def test_the_command_shows_the_same_files(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = "deepspeed_64_nodes"
    jobs_of(case, project)
    plan, run = project / "plans" / "plan.toml", project / "runs" / "mine"
    monkeypatch.setenv("PATH", str(project))  # without SLURM's commands
    submit_plan(plan, load_plan_file(plan), run, "path_switching", dry_run=True, yes=True, as_json=True)
    files = json.loads(capsys.readouterr().out)["files"]
    assert len(files) == 9
    for name, text in files.items():
        relative = Path(name).relative_to(run / "path_switching")
        assert text.replace(str(project), PROJECT) == (GOLDEN / case / "expected" / relative).read_text()
