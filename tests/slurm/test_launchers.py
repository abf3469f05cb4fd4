"""Launchers between srun and the ranks, torchrun and deepspeed, with an unchanged DeepSpeed script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster import Cluster
from scenario import Run

from pathswitch.config import build_plan, load_plan_file

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
PLAN = """
[schedule]
max_lr = 2e-3
warmup_steps = 3
[[versions]]
name = "v1"
steps = 40
alpha = 0.5
[launch]
kind = "slurm"
partition = "main"
launcher = "{launcher}"
nodes = 2
gres = "none"
time = "01:00:00"
signal_seconds = 60
command = {command}
ds_config = "ds_config.json"
[launch.env]
MASTER_ADDR = "127.0.0.1"
OMP_NUM_THREADS = "1"
DS_ACCELERATOR = "cpu"
TORCHDYNAMO_DISABLE = "1"
PACE_FOLDER = "{folder}/pace"
"""
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
}


LAUNCHERS = ("torchrun", "deepspeed")


@pytest.fixture(scope="module")
def runs(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """A run by each launcher, whose main path takes its time from step 10 on until its job is told that time is up."""
    folder = tmp_path_factory.mktemp("launchers")
    script = [str(TESTS / "hosts" / "paced.py"), str(TESTS / "integration" / "user_train.py")]
    script += ["--deepspeed", "--deepspeed_config", "{ds_config}", "--load_dir", "{checkpoints}"]
    script += ["--save_dir", "{checkpoints}", "--steps", "1000", "--save_every", "1000", "--lr_log", "{run}/{path}.lr"]
    found = {}
    for launcher in LAUNCHERS:
        own = folder / launcher
        (own / "pace").mkdir(parents=True)
        (own / "ds_config.json").write_text(json.dumps(DS_CONFIG))
        (own / "plan.toml").write_text(PLAN.format(launcher=launcher, folder=own, command=json.dumps(script)))
        run = found[launcher] = Run(cluster, own / "plan.toml", own / "run")
        run.slow("main", 10, 2.0)
        run.pathswitch("submit", run.plan, "--out", run.out, "--yes")
    waiting = list(found.values())

    def signal_who_takes_its_time() -> bool:
        for run in [run for run in waiting if len(steps(run, "main")) > 10]:
            cluster.run("scancel", "--signal=USR2", "--batch", str(run.job_id("main")))
            waiting.remove(run)
        return not waiting

    run.wait_for(signal_who_takes_its_time, "both main paths take their time")
    for run in found.values():
        run.wait_for_starts("main", 2)
        run.fast("main")
    for run in found.values():
        run.wait_for_end("v1")
    yield found
    cluster.reset()


def steps(run: Run, path: str) -> dict[int, float]:
    """Return the LR of each update that the second rank has written down; it flushes after the update."""
    log = run.out / f"{path}.lr.rank1"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    found: dict[int, float] = dict(lines)
    assert len(found) == len(lines), "no update is done twice"
    return found


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_job_whose_time_is_up_saves_and_goes_on_where_it_was(runs: dict[str, Run], launcher: str) -> None:
    run = runs[launcher]
    events = run.events("main")
    assert [event["event"] for event in events] == ["submitted", "started", "stopped", "started", "completed"]
    stopped = events[2]["step"]
    assert events[2]["reason"] == "SIGUSR2: the time is nearly up" and 10 < stopped < 20
    plan = build_plan(load_plan_file(run.plan))
    for path, first, last, saved in (("main", 0, 20, {stopped - 1, 19}), ("v1", 20, 40, {39})):
        done, lr = steps(run, path), plan.path(path).lr
        # The script does not come back from the update after which its job ends, and so cannot flush.
        assert set(range(first, last)) - done.keys() <= saved
        assert done == {step: lr(step) for step in done}


def test_both_launchers_train_the_same_bits(runs: dict[str, Run]) -> None:
    folders = [run.out / "path_switching" / "v1" / "checkpoints" / "global_step40" for run in runs.values()]
    shards = [sorted(folder.glob("*optim_states.pt")) for folder in folders]
    assert len(shards[0]) == len(shards[1]) == 2
    for pair in zip(*shards, strict=True):
        one, other = (torch.load(file, weights_only=False)["optimizer_state_dict"] for file in pair)
        key = "single_partition_of_fp32_groups"
        assert all(torch.equal(a, b) for a, b in zip(one[key], other[key], strict=True))
