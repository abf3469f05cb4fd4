"""What SLURM does to jobs without a word to their agents: nodes that are taken away, and nodes that it has lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster
from scenario import SAVE_EVERY, Run, write_plans

pytestmark = pytest.mark.slow


@pytest.fixture
def run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run whose main path takes its time from step 25 on, and may train on any node."""
    folder = tmp_path_factory.mktemp("hung")
    plan, _ = write_plans(folder)
    plan.write_text(plan.read_text().replace('sbatch = ["--nodelist=n1"]', 'sbatch = ["--exclusive"]'))
    run = Run(cluster, plan, folder / "run")
    run.slow("main", SAVE_EVERY + 5)
    run.pathswitch("submit", plan, "--out", run.out, "--yes")
    yield run
    cluster.reset()


def test_a_job_that_is_cancelled_by_scancel_stays_so(run: Run) -> None:
    run.wait_for(lambda: run.processes("pathswitch.trainer", str(run.out)), "the ranks are there")
    run.cluster.run("scancel", str(run.job_id("main")))
    run.wait_for(lambda: run.job("main")["JobState"] == "CANCELLED" and not run.processes(str(run.out)), "it has ended")
    assert run.job("main")["Restarts"] == "0"
    row = run.status()["main"]
    assert (row["state"], row["restarts"]) == ("stopped", 0)
    assert row["reason"].startswith("SIGTERM received")


def test_nodes_that_are_taken_away_or_lost_do_not_stop_a_path(run: Run) -> None:
    cluster = run.cluster
    run.wait_for(lambda: run.processes("pathswitch.trainer", str(run.out)), "the ranks are there")
    preemptor = cluster.submit("true", "--partition=hi", f"--nodelist={run.job('main')['NodeList']}", "--exclusive")
    cluster.wait_for_state(preemptor, "COMPLETED", 120)
    run.wait_for_starts("main", 2)
    stopped = [event for event in run.events("main") if event["event"] in ("stopped", "failed")]
    assert [(event["event"], event["reason"]) for event in stopped] == [
        ("stopped", "SLURM takes its nodes for another job")
    ]

    run.wait_for_step("main", SAVE_EVERY + 5)
    lost = run.job("main")["NodeList"]
    ranks = run.processes("pathswitch.trainer", str(run.out))
    cluster.node_hangs(lost)
    try:
        run.wait_for_starts("main", 3)
        assert run.job("main")["NodeList"] != lost  # and the job is still one
        assert not set(ranks) & set(run.processes("pathswitch.trainer", str(run.out)))
        starts = [event["step"] for event in run.events("main") if event["event"] == "started"]
        assert starts[:2] == [0, 0]
        assert starts[2] >= SAVE_EVERY
        run.wait_for_step("main", SAVE_EVERY + 10)
    finally:
        cluster.node_down(lost)
        cluster.node_up(lost)

    run.pathswitch("cancel", run.out)
    run.wait_for(lambda: not cluster.run("squeue", "-h"), "no job is left")
    assert {path: row["state"] for path, row in run.status().items()} == dict.fromkeys(
        ("main", "v1", "v2", "v3", "v4"), "cancelled"
    )
    assert run.status()["main"]["durable_step"] > SAVE_EVERY + 5
