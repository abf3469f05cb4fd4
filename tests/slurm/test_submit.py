"""A whole plan on a real cluster, through everything that clusters do to jobs: nothing is lost, nothing differs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from scenario import COMMAND, FORKS, SAVE_EVERY, VERSIONS, Run, metrics, write_plans

# The story takes three minutes, on a loaded machine many more.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# The third job is submitted while there is no controller.
SBATCH = """#!/bin/bash
echo >> {folder}/calls
if [ "$(wc -l < {folder}/calls)" = 3 ]; then
    touch {folder}/third
    until [ -e {folder}/stopped ]; do sleep 0.05; done
fi
exec {sbatch} "$@"
"""


@dataclass
class Story:
    """What happened to a run, and the same plan trained undisturbed."""

    run: Run
    undisturbed: Path
    submitted: list[str] = field(default_factory=list)
    """What each submission has printed."""
    lost_node: str = ""
    nodes_after_loss: str = ""
    refused: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    """The status of v3, while its fork's checkpoint was damaged, and how it was shown."""


@pytest.fixture(scope="module")
def story(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Submit a plan, disturb its jobs in every way there is, and see them to their ends."""
    folder = tmp_path_factory.mktemp("submit")
    plan, plan_here = write_plans(folder)
    story = Story(Run(cluster, plan, folder / "run"), folder / "undisturbed")
    run = story.run
    line = [COMMAND, "submit", str(plan_here), "--out", str(story.undisturbed), "--yes"]
    with (
        (folder / "undisturbed.txt").open("wb") as output,
        subprocess.Popen(line, stdout=output, stderr=output) as here,
    ):
        try:
            run.slow("main", FORKS["v2"] + 5, 2.0)
            for path, seconds in (("v1", 4.0), ("v2", 1.0), ("v4", 1.0)):  # v1 has to last until v2 is preempted
                run.slow(path, FORKS[path] + 25, seconds)
            _submit_while_the_controller_restarts(story, folder)
            _preempt(run, "v2")
            _lose_a_node(story, "v1")
            run.wait_for_starts("main", 2)  # its time was up
            cluster.run("scontrol", "update", f"JobId={run.job_id('main')}", "TimeLimit=60")  # not once more
            _damage_the_fork(story, "v3")
            _signal_the_batch_script(run)
            _repair_the_fork(story, "v3")
            run.wait_for_step("v4", FORKS["v4"] + 25)
            cluster.run("scontrol", "requeue", str(run.job_id("v4")))
            run.fast("v4")
            for path in ("main", *VERSIONS):
                run.wait_for_end(path)
            run.wait_for(lambda: not cluster.run("squeue", "-h"), "no job is left")
            assert here.wait(300) == 0, (folder / "undisturbed.txt").read_text()
            yield story
        finally:
            here.terminate()
            cluster.reset()


def _submit_while_the_controller_restarts(story: Story, folder: Path) -> None:
    run, shims = story.run, folder / "bin"
    shims.mkdir()
    shim = shims / "sbatch"
    shim.write_text(SBATCH.format(folder=shims, sbatch=shutil.which("sbatch")))
    shim.chmod(0o755)
    environment = run.cluster.environment()
    environment["PATH"] = f"{shims}:{environment['PATH']}"
    # A step that is started while the controller comes up waits for two minutes.
    run.cluster.run("scontrol", "update", "NodeName=n1", "State=DRAIN", "Reason=restart")
    line = [COMMAND, "submit", str(run.plan), "--out", str(run.out), "--yes"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as submission:
        run.wait_for(lambda: (shims / "third").exists() or submission.poll() is not None, "the third job is submitted")
        assert submission.returncode is None
        run.cluster.stop_controller()
        (shims / "stopped").touch()
        run.wait_for(lambda: run.processes(f"{shutil.which('sbatch')}\0--parsable"), "sbatch tries")
        run.cluster.start_controller()
        story.submitted.append(submission.communicate(timeout=180)[0])
        assert submission.returncode == 0
    run.cluster.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    story.submitted.append(run.pathswitch("submit", run.plan, "--out", run.out, "--yes"))


def _preempt(run: Run, path: str) -> None:
    run.wait_for_step(path, FORKS[path] + 25)
    node = run.job(path)["NodeList"]
    other = run.cluster.submit("true", "--partition=hi", f"--nodelist={node}", "--exclusive")
    run.cluster.wait_for_state(other, "COMPLETED", 120)
    run.fast(path)


def _lose_a_node(story: Story, path: str) -> None:
    run = story.run
    run.wait_for_step(path, FORKS[path] + 25)
    story.lost_node = run.cluster.run("scontrol", "show", "hostnames", run.job(path)["NodeList"]).split()[-1]
    run.cluster.node_down(story.lost_node)
    run.wait_for_starts(path, 2)
    story.nodes_after_loss = run.cluster.run("scontrol", "show", "hostnames", run.job(path)["NodeList"])
    run.fast(path)
    run.cluster.node_up(story.lost_node)


def _damage_the_fork(story: Story, path: str) -> None:
    """Damage a fork's checkpoint before the main path's agent, which stands still meanwhile, can look at it."""
    run = story.run
    # What it starts looks like it for an instant, and comes after it.
    agent = min(run.processes("pathswitch.launch.agent", str(run.folder("main") / "job.json")))
    os.kill(agent, signal.SIGSTOP)
    try:
        run.slow("main", FORKS[path] + SAVE_EVERY)
        checkpoint = run.folder("main") / f"checkpoints/global_step{FORKS[path]}"
        run.wait_for(checkpoint.is_dir, f"{checkpoint} is committed")
        _flip(checkpoint)
    finally:
        os.kill(agent, signal.SIGCONT)
    run.wait_for(lambda: any(event["event"] == "refused" for event in run.events(path)), f"{path} is refused")
    story.refused.append((run.status()[path], run.pathswitch("status", run.out)))


def _flip(checkpoint: Path) -> None:
    shard = max(checkpoint.glob("*.pt"), key=lambda file: file.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def _signal_the_batch_script(run: Run) -> None:
    checkpoint = run.folder("main") / f"checkpoints/global_step{FORKS['v3'] + SAVE_EVERY}"
    run.wait_for(checkpoint.is_dir, f"{checkpoint} is committed")
    run.cluster.run("scancel", "--signal=USR2", "--batch", str(run.job_id("main")))
    run.wait_for_starts("main", 3)
    run.fast("main")


def _repair_the_fork(story: Story, path: str) -> None:
    run = story.run
    run.wait_for_end("main")
    story.refused.append((run.status()[path], run.pathswitch("status", run.out)))
    _flip(run.folder("main") / f"checkpoints/global_step{FORKS[path]}")
    story.submitted.append(run.pathswitch("submit", run.plan, "--out", run.out, "--yes"))


def _starts(run: Run, path: str) -> list[int]:
    """Return the steps that a path's job has started at."""
    return [event["step"] for event in run.events(path) if event["event"] == "started"]


def _stops(run: Run, path: str) -> list[int]:
    """Return the steps that a path's job has saved and ended at."""
    return [event["step"] for event in run.events(path) if event["event"] == "stopped"]


def test_every_path_is_one_job_however_often_it_is_submitted(story: Story) -> None:
    assert [line.split()[:2] for line in story.submitted[0].splitlines() if ": job " in line] == [
        [f"{path}:", "job"] for path in ("main", *VERSIONS)
    ]
    assert story.submitted[1].count("is there already") == 5
    assert len({story.run.job_id(path) for path in ("main", *VERSIONS)}) == 5


def test_all_paths_are_trained(story: Story) -> None:
    status = story.run.status()
    assert {path: row["state"] for path, row in status.items()} == dict.fromkeys(("main", *VERSIONS), "done")
    assert not story.run.processes(str(story.run.out))


@pytest.mark.parametrize("path", ["main", *VERSIONS])
def test_a_disturbed_path_is_the_undisturbed_one_to_the_bit(story: Story, path: str) -> None:
    mine, other = story.run.folder(path), story.undisturbed / "path_switching" / path
    assert metrics(mine) == metrics(other)
    if path != "main":
        files = sorted(file.relative_to(mine) for file in (mine / "release").rglob("*") if file.is_file())
        assert any(file.suffix == ".safetensors" for file in files)
        assert files == sorted(file.relative_to(other) for file in (other / "release").rglob("*") if file.is_file())
        for file in files:
            assert (mine / file).read_bytes() == (other / file).read_bytes(), file


def test_a_job_whose_time_is_up_saves_and_goes_on_where_it_stopped(story: Story) -> None:
    starts, stops = _starts(story.run, "main"), _stops(story.run, "main")
    assert len(starts) == len(stops) + 1 >= 3
    assert starts == [0, *stops]
    reasons = [event["reason"] for event in story.run.events("main") if event["event"] == "stopped"]
    assert set(reasons) == {"SIGUSR2: the time is nearly up"}


def test_a_preempted_job_saves_and_goes_on_where_it_stopped(story: Story) -> None:
    starts, stops = _starts(story.run, "v2"), _stops(story.run, "v2")
    assert starts == [FORKS["v2"], *stops]
    assert stops[0] >= FORKS["v2"] + 25
    assert story.run.job("v2")["Restarts"] == "1"


def test_a_job_that_loses_a_node_goes_on_elsewhere_from_its_last_checkpoint(story: Story) -> None:
    first, second = _starts(story.run, "v1")
    assert first == FORKS["v1"]
    assert second >= FORKS["v1"] + SAVE_EVERY
    assert second % SAVE_EVERY == 0  # nobody asked it to save
    assert story.lost_node not in story.nodes_after_loss.split()
    assert len(story.nodes_after_loss.split()) == 2


def test_a_job_that_is_requeued_by_hand_goes_on(story: Story) -> None:
    first, second = _starts(story.run, "v4")
    assert first == FORKS["v4"]
    assert second >= FORKS["v4"] + SAVE_EVERY


def test_a_branch_waits_for_a_sound_checkpoint_and_says_why(story: Story) -> None:
    assert len(story.refused) == 2
    for row, shown in story.refused:
        assert row["state"] == "refused"
        assert row["step"] == FORKS["v3"]
        assert f"global_step{FORKS['v3']}: damaged: " in row["reason"]
        assert "".join(row["reason"].split()) in "".join(shown.split())
    assert _starts(story.run, "v3") == [FORKS["v3"]]
    kinds = [event["event"] for event in story.run.events("v3")]
    assert kinds.index("refused") < kinds.index("opened") < kinds.index("started")
