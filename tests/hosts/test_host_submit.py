"""A plan submitted to two hosts: main path and branch at once, a host lost and back, and the same bits as without."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hostfile_job import COMMON, HERE, ROOT, wait
from two_hosts import TwoHosts

pytestmark = pytest.mark.slow

SCRIPT = HERE.parent / "integration" / "user_train.py"
# The branch leaves at 50; the main path goes on until it is stopped.
PLAN = """
[schedule]
max_lr = 2e-3
final_lr = 1e-5
shape = "linear"
[[versions]]
name = "v1"
steps = 100
alpha = 0.5
[[versions]]
name = "v2"
steps = 10_000
alpha = 0.1
[launch]
kind = "hostfile"
hostfile = "hostfile"
launcher = "{launcher}"
launcher_args = {launcher_args}
host_timeout_seconds = {timeout}
nodes = 2
parallel = 2
restart_budget = 30
ds_config = "ds_config.json"
command = {command}
env = {env}
"""
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}
TIMEOUT = 8
BRANCH_END, SAME_STEP = 100, 60
NAMES = ("main", "v1")


@dataclass
class Submission:
    """A run of the plan that trains."""

    hosts: TwoHosts
    folder: Path
    process: subprocess.Popen[Any]

    def files(self, path: str) -> Path:
        return self.folder / "run" / "path_switching" / path

    def step(self, path: str) -> int:
        """Return how many updates are behind a path's first rank."""
        log = self.folder / f"lr_{path}.rank0"
        lines = log.read_text().splitlines() if log.is_file() else []
        return int(json.loads(lines[-1])[0]) + 1 if lines and lines[-1].endswith("]") else 0

    def says(self, path: str, *texts: str) -> bool:
        """Return whether a path's log has a line with all texts."""
        log = self.files(path) / "log.txt"
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        return any(all(text in line for text in texts) for line in lines)

    def wait_for(self, condition: Any, what: str, seconds: float = 240) -> None:
        def is_met() -> bool:
            assert self.process.poll() is None, f"submit has ended, before {what}:\n{self.logs()}"
            return bool(condition())

        try:
            wait(is_met, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None

    def logs(self) -> str:
        logs = [self.folder / "submit.txt", *(self.files(path) / "log.txt" for path in NAMES)]
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-3000:]}" for log in logs if log.is_file())

    def go(self) -> None:
        """Let both paths train at full speed."""
        for path in NAMES:
            (self.folder / "pace" / path).unlink(missing_ok=True)

    def interrupt(self) -> int:
        """Ask everything to save and end as Ctrl-C does, and return submit's exit code."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGINT)
        return int(self.process.wait(60))


def submit(hosts: TwoHosts, folder: Path, launcher: str) -> Submission:
    for name in ("home", "pace"):
        (folder / name).mkdir()
    words = [HERE / "paced.py", SCRIPT, "--deepspeed", "--deepspeed_config", "{ds_config}"]
    words += ["--load_dir", "{checkpoints}", "--save_dir", "{checkpoints}", "--lr_log", "lr_{path}"]
    words += ["--steps", "{end_step}", "--save_every", "20"]
    env = COMMON | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"PACE_FOLDER": str(folder / "pace")}
    env |= {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
    arguments = [f"--mca orte_tmpdir_base {folder}"] if launcher == "openmpi" else []
    plan = PLAN.format(
        launcher=launcher,
        timeout=TIMEOUT,
        launcher_args=json.dumps(arguments),
        command=json.dumps([str(word) for word in words]),
        env="{ " + ", ".join(f"{name} = {json.dumps(value)}" for name, value in env.items()) + " }",
    )
    (folder / "plan.toml").write_text(plan)
    (folder / "hostfile").write_text("hA slots=1\nhB slots=1\n")
    (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))
    (folder / "pace" / "main").write_text("51 0.2")
    (folder / "pace" / "v1").write_text("65 0.3")
    command = [str(Path(sys.executable).with_name("pathswitch")), "submit", "plan.toml", "--out", "run", "--yes"]
    with (folder / "submit.txt").open("w") as log:
        environment = {**ROOT, "HOME": str(folder / "home")}
        process = hosts.popen("hA", command, cwd=folder, env=environment, stdout=log, stderr=log)
    return Submission(hosts, folder, process)


def finish(run: Submission) -> None:
    """Train the branch to its end and the main path beyond ``SAME_STEP``, and stop."""
    run.go()
    run.wait_for((run.files("v1") / "done.json").is_file, "the branch's end")
    run.wait_for(lambda: run.step("main") > SAME_STEP + 20, "the main path to go on")
    assert run.interrupt() == 130, run.logs()
    assert "the jobs have saved and ended; submit again to go on" in (run.folder / "submit.txt").read_text()
    assert run.says("main", "pathswitch: main: stopped at step")


def both_train(run: Submission) -> bool:
    return run.step("main") > 52 and run.step("v1") > 66


@pytest.fixture(scope="module")
def undisturbed(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Submission:
    """The plan trained by Open MPI."""
    run = submit(hosts, tmp_path_factory.mktemp("openmpi"), "openmpi")
    run.wait_for(lambda: both_train(run), "both paths to train at once")
    finish(run)
    return run


@pytest.fixture(scope="module")
def disturbed(hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory) -> Submission:
    """The plan trained by pdsh, while a host is lost for a while."""
    run = submit(hosts, tmp_path_factory.mktemp("pdsh"), "pdsh")
    run.wait_for(lambda: both_train(run), "both paths to train at once")
    hosts.link("hB", "down")
    try:
        for path in NAMES:
            lost = (f"pathswitch: {path}: failed at step", "host hB has not answered for")
            run.wait_for(lambda lost=lost, path=path: run.says(path, *lost), f"{path} to miss the host")
    finally:
        hosts.link("hB", "up")
    finish(run)
    return run


def test_a_lost_host_is_named_in_time_and_the_other_hosts_ranks_are_ended(disturbed: Submission) -> None:
    for path in NAMES:
        log = (disturbed.files(path) / "log.txt").read_text(errors="replace")
        (silence,) = re.findall(r"failed at step \d+: host hB has not answered for (\d+) s", log)
        assert TIMEOUT <= int(silence) < 2 * TIMEOUT, "a busy machine looks a little late"
        assert disturbed.says(path, "hA: ", "outlived the launcher, ended: pid", "paced.py")
        assert disturbed.says(path, "hB: not searched for processes of the job: host hB ")


def test_paths_share_hosts_on_ports_of_their_own(undisturbed: Submission) -> None:
    ports = set()
    for path in NAMES:
        (line,) = {line for line in (undisturbed.files(path) / "log.txt").read_text().splitlines() if "cmd =" in line}
        ports.add(line.partition("MASTER_PORT=")[2].partition(";")[0])
    assert len(ports) == 2


@pytest.mark.parametrize(("path", "step"), [("main", SAME_STEP), ("v1", BRANCH_END)])
def test_the_same_bits_as_undisturbed(undisturbed: Submission, disturbed: Submission, path: str, step: int) -> None:
    weights = []
    for run in (undisturbed, disturbed):
        file = run.files(path) / "checkpoints" / f"global_step{step}" / "mp_rank_00_model_states.pt"
        weights.append(torch.load(file, weights_only=False)["module"])
    assert len(weights[0]) == 4
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
