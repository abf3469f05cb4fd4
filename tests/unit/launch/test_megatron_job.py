"""The arguments of Megatron jobs: every job of a version asks for the same samples, and ends where the plan says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pathswitch.config import load_plan_file
from pathswitch.errors import ConfigError
from pathswitch.launch.megatron import MegatronJob, megatron_job

COMMAND = str(Path(sys.executable).with_name("pathswitch"))
PLAN = """
[schedule]
max_lr = 3e-4
warmup_steps = 2000

[[versions]]
name = "v1"
steps = 50_000
megatron_data = "data/v1"

[[versions]]
name = "v2"
steps = 40_000
megatron_data = ["0.7", "data/v2 new", "0.3", "s3://bucket/old"]

[megatron]
global_batch_size = 512
"""
V3 = '[[versions]]\nname = "v3"\nsteps = 1_000\nmegatron_data = ["/d/a", "/d/b"]\n'
ONE_DATASET = PLAN.replace("megatron_data", "#") + 'data = "data/all"\nhorizon_steps = 200_000\n'
MAIN_V2 = """\
# main, steps 50000 to 66000, data of v2
export PATHSWITCH_PLAN=/run/plan.toml PATHSWITCH_PATH=main
PATHSWITCH_ARGS=(
  --global-batch-size 512
  --train-samples 46080000
  --phase-transition-iterations 50000
  --exit-interval 66000
  --data-path 0.7 '/run/data/v2 new' 0.3 s3://bucket/old
  --lr 0.0003
  --min-lr 0
  --lr-decay-style constant
  --save /run/checkpoints/main
  --load /run/checkpoints/main
  --exit-on-missing-checkpoint
)
PATHSWITCH_START_STEP=50000 PATHSWITCH_END_STEP=66000
PATHSWITCH_CHECKPOINTS=/run/checkpoints/main
PATHSWITCH_FORK=()"""
BRANCH_V2 = """\
# v2, steps 66000 to 90000, data of v2
export PATHSWITCH_PLAN=/run/plan.toml PATHSWITCH_PATH=v2
PATHSWITCH_ARGS=(
  --global-batch-size 512
  --train-samples 46080000
  --phase-transition-iterations 50000
  --data-path 0.7 '/run/data/v2 new' 0.3 s3://bucket/old
  --lr 0.0003
  --min-lr 0
  --lr-decay-style constant
  --save /run/checkpoints/v2
  --load /run/checkpoints/v2
  --exit-on-missing-checkpoint
)
PATHSWITCH_START_STEP=66000 PATHSWITCH_END_STEP=90000
PATHSWITCH_CHECKPOINTS=/run/checkpoints/v2
# Once, before the branch's first start:
PATHSWITCH_FORK=(pathswitch fork /run main@66000 --to v2 --into /run/checkpoints/v2)"""
# What the hook or Megatron may see change between two jobs on the same data.
OF_THE_JOB = ("--save", "--load", "--exit-interval", "--exit-on-missing-checkpoint")


def plan_at(folder: Path, text: str) -> Path:
    path = folder / "plan.toml"
    path.write_text(text)
    return path


def job(tmp_path: Path, text: str, path: str, version: str | None = None) -> MegatronJob:
    plan_file = load_plan_file(plan_at(tmp_path, text))
    return megatron_job(Path("/run/plan.toml"), plan_file, path, version)


def options(job: MegatronJob) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for argument in job.arguments:
        if argument.startswith("--"):
            found[argument] = values = []
        else:
            values.append(argument)
    return found


def data_options(job: MegatronJob) -> dict[str, list[str]]:
    return {name: values for name, values in options(job).items() if name not in OF_THE_JOB}


@pytest.mark.parametrize(("path", "golden"), [("main", MAIN_V2), ("v2", BRANCH_V2)])
def test_a_job_is_rendered_as_shell(tmp_path: Path, path: str, golden: str) -> None:
    assert job(tmp_path, PLAN, path).as_shell() == golden


def test_the_first_version_needs_no_phase_and_starts_from_scratch(tmp_path: Path) -> None:
    main, branch = job(tmp_path, PLAN, "main", "v1"), job(tmp_path, PLAN, "v1")
    assert options(main) == {
        "--global-batch-size": ["512"],
        "--train-samples": ["25600000"],
        "--data-path": ["/run/data/v1"],
        "--lr": ["0.0003"],
        "--min-lr": ["0"],
        "--lr-decay-style": ["constant"],
        "--save": ["/run/checkpoints/main"],
        "--load": ["/run/checkpoints/main"],
    }
    assert (main.start_step, main.end_step) == (0, 50_000)
    assert (branch.start_step, branch.end_step) == (20_000, 50_000)
    assert data_options(branch) == data_options(main)
    assert main.fork == () and branch.fork[3] == "main@20000"


@pytest.mark.parametrize(
    "text", [PLAN + V3, ONE_DATASET.replace("[megatron]", V3.replace("megatron_data", "#") + "[megatron]")]
)
def test_every_job_of_a_version_asks_for_the_same_data(tmp_path: Path, text: str) -> None:
    for version in ("v1", "v2", "v3"):
        main, branch = job(tmp_path, text, "main", version), job(tmp_path, text, version)
        assert data_options(main) == data_options(branch)
        assert main.start_step <= branch.start_step <= main.end_step
        assert branch.environment["PATHSWITCH_PATH"] == version
    assert job(tmp_path, text, "main").version == "v3"


def test_a_version_that_is_added_changes_no_data_argument(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        assert data_options(job(tmp_path, PLAN, "main", version)) == data_options(
            job(tmp_path, PLAN + V3, "main", version)
        )
        assert job(tmp_path, PLAN, version) == job(tmp_path, PLAN + V3, version)
    # Only now does the main path go on behind v2's fork.
    assert job(tmp_path, PLAN + V3, "main", "v2").end_step == 90_000
    assert options(job(tmp_path, PLAN + V3, "v3"))["--phase-transition-iterations"] == ["50000,90000"]
    assert options(job(tmp_path, PLAN + V3, "v3"))["--data-path"] == ["/d/a", "/d/b"]


def test_one_dataset_is_laid_out_once_for_all_jobs(tmp_path: Path) -> None:
    main, v1, v2 = (job(tmp_path, ONE_DATASET, path) for path in ("main", "v1", "v2"))
    assert data_options(main) == data_options(v1) == data_options(v2)
    assert options(main)["--train-iters"] == ["200000"]
    assert options(main)["--data-path"] == ["/run/data/all"]
    assert [options(each)["--exit-interval"] for each in (main, v1, v2)] == [["66000"], ["50000"], ["90000"]]
    assert main.start_step == 0 and "--exit-on-missing-checkpoint" not in options(main)


def test_a_branch_without_a_main_path_before_it_has_no_fork(tmp_path: Path) -> None:
    text = PLAN.replace("warmup_steps = 2000", "alpha = 1.0")
    branch = job(tmp_path, text, "v1")
    assert (branch.start_step, branch.fork) == (0, ())
    assert "--exit-on-missing-checkpoint" not in options(branch)
    with pytest.raises(ConfigError, match="until a version is added, the main path ends at step 50000"):
        job(tmp_path, text, "main")
    assert job(tmp_path, text, "main", "v1").end_step == 50_000


def test_folders_follow_the_plan(tmp_path: Path) -> None:
    for given, expected in (("ckpt", "/run/ckpt/v2"), ("/big/disk", "/big/disk/v2")):
        found = job(tmp_path, PLAN + f'checkpoints = "{given}"\n', "v2")
        assert found.checkpoints == expected
        assert options(found)["--save"] == options(found)["--load"] == [found.fork[-1]] == [expected]


@pytest.mark.parametrize(
    ("text", "path", "version", "message"),
    [
        (PLAN, "v9", None, "path: given 'v9'; allowed: main, v1, v2"),
        (PLAN, "main", "v9", "--version: given 'v9'; allowed: v1, v2"),
        (PLAN, "v2", "v1", "--version: given 'v1'; allowed: nothing: branch v2"),
        (PLAN.replace("global_batch_size = 512", ""), "v2", None, "[megatron] global_batch_size: given 'nothing'"),
        (PLAN.replace('megatron_data = "data/v1"', ""), "v1", None, "version 'v1' megatron_data: given 'nothing'"),
        (PLAN + 'data = "x"', "v2", None, "[megatron] data: given ('x',); allowed: either data for all versions"),
        (PLAN + "horizon_steps = 9", "v2", None, "[megatron] horizon_steps: given 9; allowed: either"),
        (PLAN.replace("megatron_data", "#"), "v2", None, "megatron_data: given 'nothing'; allowed: megatron_data for"),
        (ONE_DATASET.replace("horizon_steps", "#"), "v2", None, "[megatron] horizon_steps: given 'nothing'"),
        (ONE_DATASET.replace("200_000", "89_999"), "v2", None, "given 89999; allowed: at least 90000, the end of"),
        ("[schedule]\nmax_lr = 1.0", "main", None, "[[versions]]: given 'nothing'"),
    ],
)
def test_what_a_plan_lacks_is_named(tmp_path: Path, text: str, path: str, version: str | None, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        job(tmp_path, text, path, version)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "blend", [["0.7", "a", "0.3"], ["0.7", "a", "b", "0.3"], ["a", "b", "0.5"], ["0", "a"], ["3"], ["nan", "a"]]
)
@pytest.mark.parametrize("place", ["version", "all"])
def test_weights_and_prefixes_must_alternate(tmp_path: Path, blend: list[str], place: str) -> None:
    in_version = PLAN.replace('"data/v1"', json.dumps(blend))
    text = in_version if place == "version" else ONE_DATASET.replace('"data/all"', json.dumps(blend))
    with pytest.raises(ConfigError, match="weights > 0 and prefixes in turn"):
        job(tmp_path, text, "v1")


def test_a_plan_of_another_name_is_refused(tmp_path: Path) -> None:
    plan_file = load_plan_file(plan_at(tmp_path, PLAN))
    with pytest.raises(ConfigError, match=r"given 'mine\.toml'; allowed: a file named plan\.toml"):
        megatron_job(Path("/run/mine.toml"), plan_file, "v2")


def pathswitch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_the_command_prints_what_bash_reads_back(tmp_path: Path) -> None:
    folder = tmp_path / "a run's folder"
    folder.mkdir()
    plan = plan_at(folder, PLAN)
    shown: Any = json.loads(pathswitch("megatron-args", plan, "--path", "v2", "--json").stdout)
    assert shown["arguments"] == list(megatron_job(plan, load_plan_file(plan), "v2").arguments)
    script = f'set -eu; job=$("{COMMAND}" megatron-args plan.toml --path v2); eval "$job"; printf "%s\\n" '
    names = '"$PATHSWITCH_PLAN" "$PATHSWITCH_PATH" "${PATHSWITCH_ARGS[@]}" "${PATHSWITCH_FORK[@]}"'
    read_back = subprocess.run(
        ["bash", "-c", script + names], cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    assert read_back.stdout.splitlines() == [str(plan), "v2", *shown["arguments"], *shown["fork"]]


def test_the_command_fails_as_the_others_do(tmp_path: Path) -> None:
    done = pathswitch("megatron-args", plan_at(tmp_path, PLAN), "--path", "v9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pathswitch: error: path: given 'v9'")
