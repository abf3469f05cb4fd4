"""The recipes of launch/megatron: real scripts, run with stand-ins for torchrun and deepspeed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pathswitch.config import load_plan_file
from pathswitch.launch.megatron import megatron_job

RECIPES = Path(__file__).parents[3] / "launch" / "megatron"
SCRIPTS = sorted(path.name for path in RECIPES.glob("*.sh"))
LAUNCHED = "launched.txt"
# Stand-ins write down what they are called with, one argument per line.
CALLED = 'printf "%s\\n" "${0##*/}" "$@" "PLAN=$PATHSWITCH_PLAN" "PATH=$PATHSWITCH_PATH" >> "$LAUNCHED"'
STAND_INS = {
    "torchrun": CALLED,
    "deepspeed": CALLED,
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
        }

    def run(self, script: str, *arguments: str) -> tuple[int, str]:
        """Return the exit code and what the script said on stderr."""
        self.launched.unlink(missing_ok=True)
        command = ["bash", str(self.recipes / script), *arguments]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stderr

    def calls(self) -> list[str]:
        return self.launched.read_text().splitlines() if self.launched.exists() else []

    def trained(self, path: str, step: int) -> Path:
        tracker = self.recipes / "checkpoints" / path / "latest_checkpointed_iteration.txt"
        tracker.parent.mkdir(parents=True, exist_ok=True)
        tracker.write_text(str(step))
        return tracker

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
