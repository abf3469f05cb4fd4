"""The recipes of launch/megatron: real scripts, run with stand-ins for torchrun, srun and SLURM's commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pathswitch.config import load_plan_file
from pathswitch.launch.megatron import megatron_job
from pathswitch.versions import MAIN

RECIPES = Path(__file__).parents[3] / "launch" / "megatron"
SCRIPTS = sorted(path.name for ending in ("*.sh", "*.sbatch") for path in RECIPES.glob(ending))
LAUNCHED = "launched.txt"
# Stand-ins write down what they are called with, one argument per line; torchrun then runs the file $TRAIN.
CALLED = 'printf "%s\\n" "${0##*/}" "$@" "PLAN=$PATHSWITCH_PLAN" "PATH=$PATHSWITCH_PATH" >> "$LAUNCHED"'
STAND_INS = {
    "torchrun": f'{CALLED}; [ -z "$TRAIN" ] || bash "$TRAIN"',
    "deepspeed": CALLED,
    "srun": 'shift; exec "$@"',
    "scontrol": 'case $1 in show) printf "n1\\nn2\\n";; *) echo "scontrol $*" >> "$LAUNCHED";; esac',
    "scancel": 'echo "scancel $*" >> "$LAUNCHED"; touch "$LAUNCHED.signal"',
    "pathswitch": 'case $1 in megatron-args) exec "$PATHSWITCH" "$@";; *) echo "pathswitch $*" >> "$LAUNCHED";; esac',
}


class Site:
    """A copy of the recipes, and a PATH with stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.recipes, commands = folder / "my recipes", folder / "bin"
        shutil.copytree(RECIPES, self.recipes)
        commands.mkdir()
        for name, body in STAND_INS.items():
            (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
            (commands / name).chmod(0o755)
        self.launched = folder / LAUNCHED
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PATHSWITCH")},
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PATHSWITCH": str(Path(sys.executable).with_name("pathswitch")),
            "MEGATRON_PATH": "/opt/megatron lm",
            "LAUNCHED": str(self.launched),
            "TRAIN": "",
            **{"SLURM_JOB_ID": "41234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"},
            "SLURM_SUBMIT_DIR": str(self.recipes),
        }

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        self.launched.unlink(missing_ok=True)
        command = ["bash", str(self.recipes / script), *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, script: str, *arguments: str) -> tuple[int, str]:
        """Return the exit code and what the script said on stderr."""
        with self.start(script, *arguments) as process:
            _, error = process.communicate(timeout=60)
        return process.returncode, error

    def calls(self) -> list[str]:
        return self.launched.read_text().splitlines() if self.launched.exists() else []

    def trained(self, path: str, step: int) -> Path:
        tracker = self.recipes / "checkpoints" / path / "latest_checkpointed_iteration.txt"
        tracker.parent.mkdir(parents=True, exist_ok=True)
        tracker.write_text(str(step))
        return tracker

    def train_to(self, path: str, step: int, after: str = "true") -> None:
        """Let torchrun train to a step, once the commands ``after`` are through."""
        tracker = self.trained(path, 0)
        train = tracker.with_name("train")
        train.write_text(f"{after}\nprintf {step} > '{tracker}'\n")
        self.environment["TRAIN"] = str(train)

    def arguments(self, path: str, version: str | None = None, folder: str = ".") -> list[str]:
        plan = (self.recipes / folder / "plan.toml").resolve()
        return list(megatron_job(plan, load_plan_file(plan), path, version).arguments)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def has_run(calls: list[str], arguments: list[str]) -> bool:
    return any(calls[start : start + len(arguments)] == arguments for start in range(len(calls)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_every_script(script: str) -> None:
    subprocess.run(["bash", "-n", str(RECIPES / script)], check=True, timeout=60)


def test_the_plans_train(site: Site) -> None:
    for folder in (".", "one_dataset"):
        for path in ("main", "v1", "v2"):
            assert "--data-path" in site.arguments(path, folder=folder)
    config = json.loads((RECIPES / "one_dataset" / "ds_config.json").read_text())
    plan = load_plan_file(RECIPES / "one_dataset" / "plan.toml")
    assert config["train_batch_size"] == plan.megatron.global_batch_size and "scheduler" not in config


@pytest.mark.parametrize(
    ("script", "words", "path"), [("main.sh", ["v1"], "main"), ("branch.sh", ["v2"], "v2"), ("main.sh", ["v2"], "main")]
)
def test_a_script_runs_pretrain_gpt_with_the_jobs_arguments(
    site: Site, script: str, words: list[str], path: str
) -> None:
    assert site.run(script, *words) == (0, "")
    calls = site.calls()
    if path != "main":
        folder = site.recipes / "checkpoints" / path
        assert calls.pop(0) == f"pathswitch fork {site.recipes} main@66000 --to v2 --into {folder}"
    assert calls[:5] == ["torchrun", "--standalone", "--nproc-per-node", "8", "/opt/megatron lm/pretrain_gpt.py"]
    expected = site.arguments(path, words[0] if path == "main" else None)
    assert calls[-len(expected) - 2 :] == [*expected, f"PLAN={site.recipes / 'plan.toml'}", f"PATH={path}"]
    assert has_run(calls, ["--tokenizer-model", f"{site.recipes}/tokenizer"])


def test_a_branch_is_forked_once_and_a_job_that_is_done_is_left_alone(site: Site) -> None:
    site.trained("v2", 70_000)
    assert site.run("branch.sh", "v2") == (0, "")
    assert site.calls()[0] == "torchrun"
    site.trained("v2", 90_000)
    assert site.run("branch.sh", "v2") == (0, "")
    assert site.calls() == []


def test_a_job_that_the_plan_does_not_have_starts_nothing(site: Site) -> None:
    code, error = site.run("main.sh", "v9")
    assert code == 2 and "--version: given 'v9'" in error
    assert site.calls() == []


@pytest.mark.parametrize(("script", "path"), [("main.sbatch", "main"), ("branch.sbatch", "v1")])
def test_a_slurm_job_meets_on_its_first_node_and_ends_when_it_is_done(site: Site, script: str, path: str) -> None:
    site.train_to(path, 50_000)
    assert site.run(script, "v1") == (0, "")
    calls = site.calls()
    if path != "main":
        assert calls.pop(0).startswith("pathswitch fork")
    start = "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id 41234 --rdzv-endpoint n1:21234"
    assert calls[:12] == [*start.split(), "/opt/megatron lm/pretrain_gpt.py"]
    expected = [*site.arguments(path, "v1" if path == "main" else None), "--exit-signal-handler"]
    plan = f"PLAN={site.recipes / 'plan.toml'}"
    assert calls[-len(expected) - 4 :] == [*expected, "--exit-signal", "SIGUSR2", plan, f"PATH={path}"]


def test_a_slurm_job_whose_time_is_up_saves_and_is_requeued(site: Site) -> None:
    site.train_to("main", 30_000, after=f'while [ ! -e "{site.launched}.signal" ]; do sleep 0.05; done')
    with site.start("main.sbatch", "v1") as job:
        wait_for(lambda: f"PATH={MAIN}" in site.calls())
        job.send_signal(signal.SIGUSR2)
        _, error = job.communicate(timeout=60)
    assert (job.returncode, error) == (0, "")
    assert site.calls()[-2:] == ["scancel --signal=USR2 41234", "scontrol requeue 41234"]


@pytest.mark.parametrize("code", [0, 7])
def test_a_slurm_job_that_ends_too_early_has_failed(site: Site, code: int) -> None:
    site.train_to("main", 30_000, after=f"exit {code}")
    site.trained("main", 20_000)
    found, error = site.run("main.sbatch", "v1")
    assert (found, error) == (1, f"Megatron ended at step 20000 of 50000 with code {code}\n")
    assert not any("requeue" in call for call in site.calls())


@pytest.mark.parametrize("words", [["main", "v1"], ["v1"]])
def test_megatron_deepspeed_gets_one_dataset_for_all_jobs(site: Site, words: list[str]) -> None:
    assert site.run("megatron_deepspeed.sh", *words) == (0, "")
    calls, path = site.calls(), words[0]
    expected = site.arguments(*words, folder="one_dataset")
    plan = f"PLAN={site.recipes / 'one_dataset' / 'plan.toml'}"
    assert calls[-len(expected) - 2 :] == [*expected, plan, f"PATH={path}"]
    assert has_run(calls, ["deepspeed", "--num_gpus", "8", "/opt/megatron lm/pretrain_gpt.py"])
    assert has_run(expected, ["--train-iters", "200000", "--exit-interval", "50000"])
    assert has_run(calls, ["--deepspeed_config", str(site.recipes / "one_dataset" / "ds_config.json")])


def test_the_readme_names_every_recipe() -> None:
    readme = (RECIPES / "README.md").read_text()
    for name in SCRIPTS:
        assert f"({name})" in readme
    for link in re.findall(r"\]\(([^)#]+)\)", readme):
        assert link.startswith("http") or (RECIPES / link).exists(), link


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("nothing has happened in 30 s")
