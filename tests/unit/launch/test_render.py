"""A job's files: bash reads what the plan says, and the ds_config is the user's with what follows from the path."""

from __future__ import annotations

import json
import os
import stat
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from launch_jobs import ON_SLURM, specs_of, write_plan

from pathswitch.config.launch import LaunchSection
from pathswitch.errors import ConfigError
from pathswitch.launch.render import job_comment, job_ds_config, job_files, job_name, sbatch_script
from pathswitch.launch.spec import JobSpec

WITH_DS_CONFIG = 'kind = "slurm"\nsignal = "SIGUSR1"\ncommand = ["x", "{ds_config}"]\nds_config = "ds.json"'
# All that bash might take for something else, and letters of other scripts.
TEXT = st.text(st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cc", "Cs"]), max_size=20)
SIGNS = st.text("ab \\'\"`$(){}[]<>|&;#%!*?~=-", max_size=20)
NAMES = st.from_regex(r"X_[A-Za-z0-9_]{0,8}", fullmatch=True)
# Stands for the interpreter of the agent: says what it was started with.
SHOW = '#!/bin/sh\nprintf "%s\\0" "$@" > "$SEEN/words"\nenv -0 > "$SEEN/environment"\n'


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("show") / "show it"
    program.write_text(SHOW)
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    folder = tmp_path_factory.mktemp("plans")
    return specs_of(write_plan(folder / "plan.toml", ON_SLURM), folder / "run")[1]


@settings(max_examples=60)
@given(env=st.dictionaries(NAMES, TEXT | SIGNS, max_size=3), folder=(TEXT | SIGNS).filter(lambda name: "/" not in name))
def test_bash_gets_every_word_and_variable_as_it_stands(
    show: Path, spec: JobSpec, env: dict[str, str], folder: str
) -> None:
    changes: dict[str, Any] = {"run": f"/runs/-{folder}", "launch": spec.launch.model_copy(update={"env": env})}
    job, seen = spec.model_copy(update=changes), show.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(show))
        script = sbatch_script(job)
    environ = {"SEEN": str(seen), "PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    subprocess.run(["bash", "-c", script], env=environ, cwd=seen, check=True, timeout=30)
    words = (seen / "words").read_bytes().decode().split("\0")[:-1]
    assert words == ["-P", "-u", "-m", "pathswitch.launch.agent", f"/runs/-{folder}/path_switching/v1/job.json"]
    found = dict(entry.split("=", 1) for entry in (seen / "environment").read_bytes().decode().split("\0")[:-1])
    assert {name: found[name] for name in env} == env
    assert sorted(file.name for file in seen.iterdir()) == ["environment", show.name, "words"]


@pytest.mark.parametrize("fails", ["module load", "setup"])
def test_a_job_does_not_start_where_its_preparation_fails(show: Path, spec: JobSpec, fails: str) -> None:
    update = {"modules": ("none-such",)} if fails == "module load" else {"setup": ("cd /none-such", "true")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(show))
        script = sbatch_script(spec.model_copy(update={"launch": spec.launch.model_copy(update=update)}))
    (show.parent / "words").unlink(missing_ok=True)
    environ = {"SEEN": str(show.parent), "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", script], env=environ, capture_output=True, timeout=30)
    assert done.returncode != 0 and not (show.parent / "words").exists()


@settings(max_examples=40)
@given(name=TEXT | SIGNS)
def test_a_job_is_named_after_its_run_in_plain_letters(spec: JobSpec, name: str) -> None:
    found = job_name(spec.model_copy(update={"run": f"/runs/{name.replace('/', '_') or 'run'}"}))
    assert found.endswith("-v1") and set(found) <= {*string.ascii_letters, *string.digits, *"_.-"}


def test_what_tells_a_job_from_others_is_its_run_its_paradigm_and_its_path(tmp_path: Path) -> None:
    specs = specs_of(write_plan(tmp_path / "plan.toml"), tmp_path / "run")
    specs += specs_of(tmp_path / "plan.toml", tmp_path / "other" / "run")
    specs += [specs[0].model_copy(update={"paradigm": "ptfs"})]
    comments = [job_comment(spec) for spec in specs]
    assert len(set(comments)) == len(comments) == 9
    assert all(len(comment) < 200 and comment.split(":")[0] == "pathswitch" for comment in comments)


@pytest.mark.parametrize(
    ("section", "option"),
    [
        ({}, "--gpus-per-node=1"),
        ({"gpus_per_node": 8}, "--gpus-per-node=8"),
        ({"gpus_per_node": 8, "gres": "gpu:a100:8"}, "--gres=gpu:a100:8"),
        ({"gpus_per_node": 8, "gres": "none"}, None),
    ],
)
def test_gpus_are_asked_for_in_one_way(spec: JobSpec, section: dict[str, Any], option: str | None) -> None:
    launch = LaunchSection.model_validate({**spec.launch.model_dump(exclude_defaults=True), **section})
    lines = sbatch_script(spec.model_copy(update={"launch": launch})).splitlines()
    found = [line.removeprefix("#SBATCH ") for line in lines if "gpu" in line or "gres" in line]
    assert [line for line in found if not line.startswith("--ntasks")] == ([option] if option else [])


def ds_config_of(tmp_path: Path, base: dict[str, Any], path: int = 1) -> dict[str, Any]:
    spec = specs_of(write_plan(tmp_path / "plan.toml", WITH_DS_CONFIG), tmp_path / "run")[path]
    content: dict[str, Any] = json.loads(job_files(spec, base)[spec.files.ds_config])
    return content


def test_a_ds_config_becomes_each_paths_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    base = {"train_batch_size": 8, "pathswitch": {"seq_len": 16, "checkpoint": {"verify": "sizes"}}}
    found = ds_config_of(tmp_path, base)
    assert found == {
        "train_batch_size": 8,
        "scheduler": {
            "type": "PathSwitchLR",
            "params": {"plan": str(run / "plan.toml"), "path": "v1", "paradigm": "path_switching"},
        },
        "pathswitch": {
            "seq_len": 16,
            "checkpoint": {"verify": "sizes"},
            "run": str(run),
            "job": {"save_dir": str(run / "path_switching/v1/checkpoints"), "signals": ["SIGTERM", "SIGUSR1"]},
        },
    }
    assert base == {"train_batch_size": 8, "pathswitch": {"seq_len": 16, "checkpoint": {"verify": "sizes"}}}


def test_what_a_ds_config_says_of_its_job_is_kept_where_it_agrees(tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = {"save_dir": str(run / "path_switching/main/checkpoints"), "signals": ["SIGINT"], "exit_at_end": False}
    params = {"plan": "old.toml", "path": "v9", "initial_step": 3}
    base = {"scheduler": {"type": "PathSwitchLR", "params": params}, "pathswitch": {"run": str(run), "job": own}}
    found = ds_config_of(tmp_path, base, path=0)
    assert found["pathswitch"] == {"run": str(run), "job": own}
    assert found["scheduler"]["params"] == {
        "plan": str(run / "plan.toml"),
        "path": "main",
        "paradigm": "path_switching",
        "initial_step": 3,
    }


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, r"ds.json: scheduler: given .*WarmupLR.*; allowed: none, or one of type"),
        ({"scheduler": ["PathSwitchLR"]}, r"ds.json: scheduler: given .*; allowed: an object"),
        ({"scheduler": {"type": "PathSwitchLR", "params": [1]}}, r"ds.json: scheduler: params: given \[1\]"),
        (
            {"scheduler": {"type": "PathSwitchLR", "params": {"max_lr": 1}}},
            r"scheduler params: given 'max_lr'; allowed: plan",
        ),
        ({"pathswitch": ["x"]}, r"ds.json: pathswitch: given .*; allowed: an object"),
        ({"pathswitch": {"job": 1}}, r"ds.json: pathswitch: job: given 1; allowed: an object"),
        ({"pathswitch": {"run": "/elsewhere"}}, r"pathswitch.run: given '/elsewhere'; allowed: nothing, or /"),
        (
            {"pathswitch": {"job": {"save_dir": "ckpt"}}},
            r"pathswitch.job.save_dir: given 'ckpt'; allowed: nothing, or /",
        ),
    ],
)
def test_a_ds_config_that_contradicts_its_job_is_refused(tmp_path: Path, base: dict[str, Any], message: str) -> None:
    spec = specs_of(write_plan(tmp_path / "plan.toml", WITH_DS_CONFIG), tmp_path / "run")[0]
    with pytest.raises(ConfigError, match=message):
        job_ds_config(spec, base, "ds.json")


def test_a_job_has_the_files_of_its_kind(tmp_path: Path) -> None:
    def names(launch: str, ds_config: dict[str, Any] | None = None) -> set[str]:
        specs = specs_of(write_plan(tmp_path / "plan.toml", launch), tmp_path / "run")
        return {path.name for path in job_files(specs[0], ds_config)}

    assert names(ON_SLURM) == {"job.json", "job.sbatch"}
    assert names('command = ["x"]') == {"job.json"}
    assert names(WITH_DS_CONFIG, {}) == {"job.json", "job.sbatch", "ds_config.json"}
