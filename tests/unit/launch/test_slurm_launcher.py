"""How ranks start under SLURM: what srun's tasks are, and that every word of a plan comes to them as it stands."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_slurm import FakeSlurm
from launch_jobs import open_run, write_plan

from pathswitch.errors import RunError
from pathswitch.launch.launcher import launcher_of
from pathswitch.launch.slurm_launcher import SlurmLauncher
from pathswitch.launch.spec import JobSpec

WORDS = ["two words", "$(touch X)", "it's", '"', "back\\slash", "`touch X`", "--leading", "*"]
COMMAND = f'kind = "slurm"\ncommand = {json.dumps(["train it.py", *WORDS])}\nnodes = 2\ngpus_per_node = 3\n'
# srun: notes its own options, and runs one task with what follows them, as the second one of the second node.
SRUN = """#!{python}
import json, os, sys
options = [word for word in sys.argv[1:] if word.startswith("-")]
first = next(index for index, word in enumerate(sys.argv[1:], 1) if not word.startswith("-"))
open(os.environ["NOTES"] + ".srun", "w").write(json.dumps(sys.argv[1:first]))
numbers = {{"SLURM_PROCID": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS": "6", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}}
os.execvpe(sys.argv[first], sys.argv[first:], os.environ | numbers)
"""
# What a program was started with, and with which signals it ignores.
NOTE = """#!{python}
import json, os, signal, sys
ignored = [s.name for s in signal.Signals if signal.getsignal(s) == signal.SIG_IGN and s.name.startswith("SIGUSR")]
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
note = {{"words": sys.argv[1:], "ignored": ignored, "environment": {{n: os.environ.get(n) for n in names}}}}
open(os.environ["NOTES"] + "." + os.path.basename(sys.argv[0]), "w").write(json.dumps(note))
"""


@pytest.fixture
def notes(slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("srun", SRUN), ("interpreter", NOTE), ("apptainer", NOTE)):
        program = slurm.bin / name
        program.write_text(text.format(python=sys.executable))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    return tmp_path / "notes"


def job_of(tmp_path: Path, launch: str) -> JobSpec:
    return open_run(write_plan(tmp_path / "plan.toml", f"{COMMAND}{launch}"), tmp_path / "run")["v1"]


def start(job: JobSpec, notes: Path, program: str = "interpreter") -> tuple[list[str], dict[str, Any]]:
    """Run a job's launch line, and return the options of srun and what the program in its task noted."""
    launcher = SlurmLauncher(job, "4711")
    line = launcher.command(job.command_from(40))
    environ = {**os.environ, **launcher.environment()}
    subprocess.run(line, env=environ, cwd=notes.parent, check=True, timeout=60)
    assert not (notes.parent / "X").exists()
    note: dict[str, Any] = json.loads(Path(f"{notes}.{program}").read_text())
    return json.loads(Path(f"{notes}.srun").read_text()), note


def test_srun_starts_every_rank_itself(tmp_path: Path, notes: Path) -> None:
    job = job_of(tmp_path, 'python = "interpreter"\ncpus_per_task = 7\nlauncher_args = ["--mpi=none --cpu-bind=none"]')
    options, note = start(job, notes)
    assert options == [
        *("--export=ALL", "--kill-on-bad-exit=1", "--nodes=2", "--ntasks-per-node=3", "--mpi=none", "--cpu-bind=none"),
        "--cpus-per-task=7",
    ]
    assert note["words"] == ["-u", "train it.py", *WORDS]
    assert note["environment"] == {
        "RANK": "4",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "6",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": str(job.port),
    }
    assert note["ignored"] == ["SIGUSR2"]  # until the rank has its handlers


def test_the_signal_that_a_rank_ignores_at_first_is_the_jobs(tmp_path: Path, notes: Path) -> None:
    job = job_of(tmp_path, 'python = "interpreter"\nsignal = "SIGUSR1"')
    assert start(job, notes)[1]["ignored"] == ["SIGUSR1"]


def test_the_environment_may_say_where_the_ranks_meet(
    tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    job = job_of(tmp_path, 'python = "interpreter"')
    assert start(job, notes)[1]["environment"]["MASTER_ADDR"] == "10.0.0.1"


def test_torchrun_is_one_task_of_each_node(tmp_path: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    job = job_of(tmp_path, 'python = "interpreter"\nlauncher = "torchrun"\nlauncher_args = ["--max-restarts 0"]')
    options, note = start(job, notes)
    assert "--ntasks-per-node=1" in options and "--max-restarts" not in options
    assert note["words"] == [
        *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "3", "--rdzv-backend", "c10d"),
        *("--rdzv-id", "4711.3", "--rdzv-endpoint", f"n1:{job.port}", "--max-restarts", "0", "train it.py", *WORDS),
    ]
    assert note["environment"]["RANK"] is None


def test_deepspeed_knows_its_node_and_all_hosts(tmp_path: Path, notes: Path) -> None:
    job = job_of(tmp_path, 'python = "interpreter"\nlauncher = "deepspeed"\nlauncher_args = ["--bind_cores_to_rank"]')
    options, note = start(job, notes)
    hostfile = job.files.folder / "hostfile"
    assert "--ntasks-per-node=1" in options
    assert note["words"] == [
        *("-m", "deepspeed.launcher.runner", "--node_rank", "1", "--hostfile", str(hostfile), "--no_ssh"),
        *("--master_addr", "n1", "--master_port", str(job.port), "--bind_cores_to_rank", "train it.py", *WORDS),
    ]
    assert hostfile.read_text() == "n1 slots=3\nn2 slots=3\n"


def test_a_module_is_one_for_deepspeed_too(tmp_path: Path, notes: Path) -> None:
    launch = 'launcher = "deepspeed"\npython = "interpreter"'
    job = job_of(tmp_path, launch)
    line = SlurmLauncher(job, "4711").command(["-m", "mine.train", "--x"])
    assert line[-3:] == ["--module", "mine.train", "--x"]


def test_apptainer_runs_the_tasks_with_every_mount_as_it_stands(tmp_path: Path, notes: Path) -> None:
    mounts = ["/data:/data", "/my data/$(touch X)/`touch X`/it's:/x:ro"]
    container = f'{{runtime = "apptainer", image = "my image $(touch X).sif", mounts = {json.dumps(mounts)}}}'
    job = job_of(tmp_path, f"container = {container}")
    _, note = start(job, notes, "apptainer")
    run, folder = tmp_path / "run", tmp_path
    bound = [f"{run}:{run}", f"{folder}:{folder}", *mounts]
    words = note["words"]
    assert words[:4] == ["exec", "--nv", "--pwd", str(folder)]
    assert words[4 : 4 + 2 * len(bound)] == [word for mount in bound for word in ("--bind", mount)]
    assert words[4 + 2 * len(bound)] == "my image $(touch X).sif"
    assert words[-len(WORDS) - 4 :] == ["pathswitch", "python", "-u", "train it.py", *WORDS]


def test_pyxis_gets_the_image_and_the_mounts_as_options_of_srun(tmp_path: Path, notes: Path) -> None:
    container = '{runtime = "pyxis", image = "nvcr.io#nvidia/pytorch:24.10-py3", mounts = ["/my data:/data"]}'
    job = job_of(tmp_path, f'python = "interpreter"\ncontainer = {container}')
    options, note = start(job, notes)
    run, folder = tmp_path / "run", tmp_path
    assert options[-3:] == [
        "--container-image=nvcr.io#nvidia/pytorch:24.10-py3",
        f"--container-mounts={run}:{run},{folder}:{folder},/my data:/data",
        f"--container-workdir={folder}",
    ]
    assert note["words"] == ["-u", "train it.py", *WORDS]


def test_a_job_of_slurms_is_started_by_its_batch_script(tmp_path: Path) -> None:
    job = job_of(tmp_path, "")
    with pytest.raises(RunError, match=rf"v1: its job is SLURM's: start it with sbatch {job.files.batch_script}"):
        launcher_of(job, None)
    assert isinstance(launcher_of(job, "4711"), SlurmLauncher)
