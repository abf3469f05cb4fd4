"""The cluster that other tests rely on does to jobs what a real one does."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, parse_job
from sbatch_check import check_script

# A job that runs until it is started a second time; a victim of preemption is not requeued if it ends by itself.
UNTIL_RESTARTED = """
echo "restart ${SLURM_RESTART_COUNT:-0}"
srun bash -c 'hostname; [ "${SLURM_RESTART_COUNT:-0}" = 1 ] || exec sleep 600'
"""
REQUEUE_ITSELF = 'if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then scontrol requeue "$SLURM_JOB_ID"; sleep 60; fi'


@pytest.fixture(scope="module")
def interrupted(cluster: Cluster) -> Iterator[dict[str, int]]:
    """Three jobs that were interrupted in different ways, at the same time, and have finished since."""
    one = ["--partition=main", "--ntasks-per-node=1", "--exclusive"]
    jobs = {
        "requeued": cluster.submit(UNTIL_RESTARTED, *one, "--nodelist=n1"),
        "preempted": cluster.submit(UNTIL_RESTARTED + REQUEUE_ITSELF, *one, "--nodelist=n2"),
        "lost": cluster.submit(UNTIL_RESTARTED, *one, "--nodelist=n3,n4", "--nodes=2"),
    }
    for job, names in zip(jobs.values(), (["n1"], ["n2"], ["n3", "n4"]), strict=True):
        _wait_for_output(cluster, job, names)
    jobs["preemptor"] = cluster.submit("hostname", "--partition=hi", "--nodelist=n2", "--exclusive")
    cluster.node_down("n4")
    cluster.node_up("n4")
    cluster.run("scontrol", "requeue", str(jobs["requeued"]))
    for job in jobs.values():
        cluster.wait_for_state(job, "COMPLETED")
    yield jobs


@pytest.mark.slow
def test_a_step_spans_nodes_and_is_given_their_gpus(cluster: Cluster) -> None:
    script = "srun bash -c 'echo $SLURM_PROCID $(hostname) $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES $(getent hosts n2)'"
    job = cluster.submit(script, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=2")
    cluster.wait_for_state(job, "COMPLETED")
    lines = sorted(cluster.output(job).splitlines())
    names = cluster.run("scontrol", "show", "hostnames", cluster.job(job)["NodeList"]).split()
    assert len(names) == 2
    assert [line.split()[:5] for line in lines] == [
        [str(rank), name, name, "0,1", "127.0.0.1"] for rank, name in enumerate(names)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["requeued", "preempted", "lost"])
def test_an_interrupted_job_starts_again_under_its_id(cluster: Cluster, interrupted: dict[str, int], how: str) -> None:
    job = cluster.job(interrupted[how])
    output = cluster.output(interrupted[how])
    assert job["Restarts"] == "1"
    assert output.index("restart 0") < output.index("restart 1")
    reason = {"requeued": "JOB REQUEUE", "preempted": "JOB REQUEUE", "lost": "NODE FAILURE"}[how]
    assert f"DUE TO {reason}" in output


@pytest.mark.slow
def test_a_job_of_the_higher_partition_takes_its_victims_node(cluster: Cluster, interrupted: dict[str, int]) -> None:
    victim, preemptor = cluster.job(interrupted["preempted"]), cluster.job(interrupted["preemptor"])
    assert preemptor["NodeList"] == victim["NodeList"] == "n2"
    assert preemptor["EndTime"] <= victim["StartTime"]


@pytest.mark.slow
def test_a_lost_node_leaves_no_process(cluster: Cluster) -> None:
    job = cluster.submit("srun bash -c 'exec -a of-a-lost-node sleep 600'", "--nodelist=n1", "--no-requeue")
    cluster.wait_for(lambda: _processes("of-a-lost-node"), 30, "the step runs")
    cluster.node_down("n1", "power")
    assert not _processes("of-a-lost-node")
    assert "State=DOWN" in cluster.run("scontrol", "show", "node", "n1")
    assert "Reason=power" in cluster.run("scontrol", "show", "node", "n1")
    cluster.node_up("n1")
    cluster.wait_for_state(job, "NODE_FAIL")


@pytest.mark.slow
def test_jobs_and_waiting_commands_outlive_the_controller(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "later.sh"
    script.write_text("#!/bin/bash\ntrue\n")
    job = cluster.submit(f"until [ -e {tmp_path}/go ]; do sleep 0.1; done; srun hostname")
    cluster.wait_for_state(job, "RUNNING")
    cluster.stop_controller()
    line = ["sbatch", "--parsable", f"--output={tmp_path}/%j", str(script)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=cluster.environment()) as later:
        cluster.start_controller()
        (tmp_path / "go").touch()
        cluster.wait_for_state(int(later.communicate(timeout=60)[0]), "COMPLETED")
    cluster.wait_for_state(job, "COMPLETED")
    assert cluster.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_nothing_outlives_a_test_process_that_is_killed(cluster: Cluster, tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from cluster import Cluster
with Cluster(Path(sys.argv[1]), nodes=1) as cluster:
    job = cluster.submit("srun bash -c 'echo up; exec -a of-a-killed-test sleep 600'")
    cluster.wait_for(lambda: "up" in cluster.output(job), 30, "the step runs")
    print("up", flush=True)
    time.sleep(600)
"""
    line = [sys.executable, "-c", code, str(tmp_path / "second")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, cwd=Path(__file__).parent) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert _processes("of-a-killed-test")
        assert _processes(str(tmp_path))
        process.kill()
    cluster.wait_for(lambda: not _processes("of-a-killed-test") + _processes(str(tmp_path)), 10, "all are gone")


def test_jobs_are_parsed_with_spaces_in_their_values() -> None:
    line = "JobId=7 JobName=a b UserId=root(0) GroupId=root(0) MCS_label=N/A ReqB:S:C:T=0:0:*:* Command=/x y=1  Power= "
    assert parse_job(line) == {
        "JobId": "7",
        "JobName": "a b",
        "UserId": "root(0)",
        "GroupId": "root(0)",
        "MCS_label": "N/A",
        "ReqB:S:C:T": "0:0:*:*",
        "Command": "/x y=1",
        "Power": "",
    }


def test_scripts_are_checked_against_the_nodes_there_are(large_cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"

    def write(nodes: int, line: str = "srun true") -> Path:
        options = f"#SBATCH --nodes={nodes} --ntasks-per-node=8 --gpus-per-node=8 --time=1-0 --signal=B:USR2@300"
        script.write_text(f"#!/bin/bash\n{options}\n{line}\n")
        return script

    assert "n[1-1024] in partition main" in check_script(write(1024), large_cluster)
    assert "n[1-64] in partition main" in check_script(write(64), large_cluster)
    for wrong in (write(1025), write(1, "if true"), write(1, "echo $1")):
        with pytest.raises(AssertionError):
            check_script(wrong, large_cluster)


def _wait_for_output(cluster: Cluster, job: int, words: list[str]) -> None:
    cluster.wait_for(lambda: set(words) <= set(cluster.output(job).split()), 30, f"job {job} says {words}")


def _processes(word: str) -> list[str]:
    """Return the command lines of processes, those of nodes too, that a word occurs in."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found
