"""From a plan's [launch] to jobs: what holds for which path, what is refused and in which words."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from launch_jobs import HERE, ON_SLURM, SCHEDULE, specs_of, write_plan

from pathswitch.config import load_plan_file
from pathswitch.config.launch import SBATCH_KEYS, time_seconds
from pathswitch.errors import ConfigError, RunError
from pathswitch.launch.spec import FIRST_PORT, PORTS, JobSpec, job_specs, load_spec, run_id
from pathswitch.run_folder import PLAN_FILE

TRAINER = """
train = "text.txt"
test = "text.txt"
[data]
seq_len = 8
[train]
global_batch_size = 12
"""


def specs(folder: Path, launch: str, **options: Any) -> dict[str, JobSpec]:
    return {spec.path: spec for spec in specs_of(write_plan(folder / "plan.toml", launch, **options), folder / "run")}


def test_a_paths_own_keys_go_before_those_of_its_kind_and_those_before_the_common_ones(tmp_path: Path) -> None:
    jobs = specs(
        tmp_path,
        f"""{ON_SLURM}
nodes = 8
time = "01:00:00"
partition = "common"
sbatch = ["--mem=0", "--exclusive"]
env = {{COMMON = "1", KIND = "1", OWN = "1"}}
main = {{nodes = 16, env = {{KIND = "main"}}}}
branches = {{nodes = 4, partition = "spare", sbatch = ["--mem=10G"], env = {{KIND = "branch", OWN = "branch"}}}}
paths.v2 = {{nodes = 2, env = {{OWN = "v2"}}, sbatch = []}}
paths.main = {{partition = "big"}}
""",
    )
    main, v1, v2 = (jobs[name].launch for name in ("main", "v1", "v2"))
    assert [(launch.nodes, launch.partition, launch.time) for launch in (main, v1, v2)] == [
        (16, "big", "01:00:00"),
        (4, "spare", "01:00:00"),
        (2, "spare", "01:00:00"),
    ]
    assert [launch.sbatch for launch in (main, v1, v2)] == [("--mem=0", "--exclusive"), ("--mem=10G",), ()]
    assert dict(main.env) == {"COMMON": "1", "KIND": "main", "OWN": "1"}
    assert dict(v2.env) == {"COMMON": "1", "KIND": "branch", "OWN": "v2"}
    # What one job has to know is in it, and nothing of the others.
    assert v2.main == v2.branches == type(v2.main)() and v2.paths == {}


def test_words_are_filled_in_and_nothing_else_is(tmp_path: Path) -> None:
    names = ["run", "plan", "path", "paradigm", "checkpoints", "start_step", "end_step"]
    names += ["nodes", "gpus_per_node", "ranks"]
    command = [*(f"--{name}={{{name}}}" for name in names), "{{run}}", "a{path}b{{c}}", "$HOME"]
    launch = f'kind = "slurm"\nnodes = 3\ngpus_per_node = 4\ncommand = {json.dumps(command)}'
    job = specs(tmp_path, launch)["v2"]
    run, folder = tmp_path / "run", tmp_path / "run/path_switching/v2"
    assert job.command_from(140) == (
        f"--run={run}",
        f"--plan={run / PLAN_FILE}",
        "--path=v2",
        "--paradigm=path_switching",
        f"--checkpoints={folder / 'checkpoints'}",
        "--start_step=140",
        "--end_step=200",
        "--nodes=3",
        "--gpus_per_node=4",
        "--ranks=12",
        "{run}",
        "av2b{c}",
        "$HOME",
    )


@pytest.mark.parametrize(
    "word", ["{steps}", "{", "}", "{path!r}", "{path:>9}", "{}", "{0}", "{path.name}", "x{megatron_args}"]
)
def test_other_braces_are_refused_with_what_may_stand_there(tmp_path: Path, word: str) -> None:
    with pytest.raises(
        ConfigError, match=r"\[launch\] command: given .*; allowed: the placeholders \{run\}, .*\{\{ and"
    ) as error:
        specs(tmp_path, f'command = ["train.py", "{word}"]')
    assert error.value.given == word


def test_a_command_is_chosen_by_the_updates_done(tmp_path: Path) -> None:
    data = "".join(f'[[versions]]\nname = "v{n}"\nsteps = 100\nmegatron_data = "data/v{n}"\n' for n in (1, 2, 3))
    launch = '[launch]\nlauncher = "torchrun"\nkind = "slurm"\ncommand = ["pretrain.py", "{megatron_args}", "--x"]\n'
    (tmp_path / "plan.toml").write_text(f"{SCHEDULE}{data}[megatron]\nglobal_batch_size = 4\n{launch}")
    main = specs_of(tmp_path / "plan.toml", tmp_path / "run")[0]
    assert [part.end_step for part in main.parts] == [100, 200, 240]
    for step, version in ((0, "v1"), (99, "v1"), (100, "v2"), (199, "v2"), (200, "v3"), (239, "v3"), (240, "v3")):
        command = main.command_from(step)
        assert command[command.index("--data-path") + 1] == str(tmp_path / "data" / version)
        assert (command[0], command[-1]) == ("pretrain.py", "--x")
        assert command[command.index("--save") + 1] == str(main.files.checkpoints)
    with pytest.raises(ConfigError, match="path_switching, in Megatron jobs"):
        job_specs(load_plan_file(tmp_path / "plan.toml"), tmp_path, tmp_path / "run", "ptfs")


def test_the_embedded_trainer_is_told_its_paradigm_and_path(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.toml", "gpus_per_node = 4", versions=1, more=TRAINER)
    for paradigm in ("path_switching", "ptfs", "cpt_rewarm"):
        job = job_specs(load_plan_file(plan), tmp_path, tmp_path / "run", paradigm)[-1]  # type: ignore[arg-type]
        assert job.embedded and job.path == "v1"
        assert job.command_from(0) == (
            *("-m", "pathswitch.trainer", "--out", str(tmp_path / "run")),
            *("--paradigm", paradigm, "--path", "v1"),
        )
        assert job.files.folder == tmp_path / "run" / paradigm / "v1"


def test_ranks_that_cannot_share_the_batch_out_are_refused_by_the_path_that_has_them(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.toml", "gpus_per_node = 4\nbranches = {gpus_per_node = 5}", 1, TRAINER)
    with pytest.raises(ConfigError, match=r"nodes x gpus_per_node of v1: given 5; allowed: a divisor of global_batch"):
        specs_of(plan, tmp_path / "run")


def test_a_run_has_one_id_however_its_folder_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = write_plan(tmp_path / "plan.toml")
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = ["run", "./run", "x/../run", str(tmp_path / "run"), str(tmp_path / "link" / "run")]
    found = {specs_of(plan, Path(name))[0].id for name in names}
    assert found == {f"{run_id(tmp_path / 'run')}:path_switching:main"}
    assert re.fullmatch("[0-9a-f]{8}", run_id(tmp_path / "run"))
    assert run_id(tmp_path / "run") != run_id(tmp_path / "ruN")


def test_each_path_has_a_port_and_keeps_it(tmp_path: Path) -> None:
    few, many = specs(tmp_path, ON_SLURM), specs(tmp_path, ON_SLURM, versions=30)
    ports = [job.port for job in many.values()]
    assert len(set(ports)) == 31 and all(FIRST_PORT <= port < FIRST_PORT + PORTS for port in ports)
    assert [job.port for job in few.values()] == ports[:4]
    other = specs_of(write_plan(tmp_path / "plan.toml"), tmp_path / "other")
    assert other[0].port != ports[0]


def test_what_every_rank_has_in_its_environment(tmp_path: Path) -> None:
    job = specs(tmp_path, f'{ON_SLURM}signal = "SIGUSR1"')["v1"]
    folder = tmp_path / "run/path_switching/v1"
    assert job.environment() == {
        "PATHSWITCH_JOB": f"{run_id(tmp_path / 'run')}:path_switching:v1",
        "PATHSWITCH_PATH": "v1",
        "PATHSWITCH_STOP_FILE": str(folder / "stop"),
        "PATHSWITCH_STOP_SIGNALS": "SIGTERM,SIGUSR1",
        "PATHSWITCH_PROGRESS_FILE": str(folder / "progress.json"),
        "PATHSWITCH_PLAN": str(tmp_path / "run" / "plan.toml"),
    }
    assert (
        specs(tmp_path, 'command = ["x"]\nsignal = "SIGTERM"')["v1"].environment()["PATHSWITCH_STOP_SIGNALS"]
        == "SIGTERM"
    )


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        (
            'launcher = "srun"\ncommand = ["x"]',
            r"\[launch\] launcher: given 'srun'; allowed: deepspeed, with kind = 'local'",
        ),
        (
            f'{ON_SLURM}launcher = "pdsh"',
            r"launcher: given 'pdsh'; allowed: srun, torchrun, deepspeed, with kind = 'slurm'",
        ),
        (f'{ON_SLURM}hostfile = "h"', r"hostfile: given 'h'; allowed: .* with kind = 'hostfile', and only with it"),
        ('kind = "hostfile"\ncommand = ["x"]', r"hostfile: given None; allowed: a file of lines"),
        (f'{HERE}partition = "gpu"', r"\[launch\] partition: given 'gpu'; allowed: not with kind = 'local'"),
        (f'{HERE}branches = {{time = "01:00:00"}}', r"\[launch\] branches time: given '01:00:00'; allowed: not with"),
        (f'{HERE}paths.v1 = {{modules = "x"}}', r"\[launch\] paths v1 modules: given"),
        (f"{HERE}nodes = 2", r"\[launch\] nodes: given 2; allowed: 1 with kind = 'local'"),
        (f"{HERE}main = {{nodes = 2}}", r"\[launch\] main nodes: given 2"),
        (f"{ON_SLURM}paths.v9 = {{nodes = 2}}", r"\[launch.paths\]: given 'v9'; allowed: main, v1, v2, v3"),
        (
            f'{ON_SLURM}ds_config = "x.json"',
            r"ds_config: given 'x.json'; allowed: a ds_config together with \{ds_config\}",
        ),
        ('command = ["x", "{ds_config}"]', r"ds_config: given None; allowed: a ds_config together with"),
        (f'{ON_SLURM}launcher_args = ["--x \'y"]', r"launcher_args: given .*; allowed: words as a shell splits them"),
        (
            'command = ["x", "{megatron_args}", "{ds_config}"]\nds_config = "x.json"',
            r"ds_config: given 'x.json'; allowed: none with \{megatron_args\}",
        ),
    ],
)
def test_what_contradicts_the_kind_or_the_plan_is_refused(tmp_path: Path, launch: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        specs(tmp_path, launch)


def test_a_container_has_an_interpreter_of_its_own_unless_the_plan_says_which(tmp_path: Path) -> None:
    container = 'container = {runtime = "pyxis", image = "x"}'
    assert specs(tmp_path, ON_SLURM)["main"].python == sys.executable
    assert specs(tmp_path, f"{ON_SLURM}{container}")["main"].python == "python"
    assert specs(tmp_path, f'{ON_SLURM}{container}\npython = "/opt/python"')["main"].python == "/opt/python"
    jobs = specs(tmp_path, f"{ON_SLURM}main = {{{container}}}")
    assert (jobs["main"].python, jobs["v1"].python) == ("python", sys.executable)


@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_a_folder_that_no_container_can_mount_is_refused(tmp_path: Path, name: str) -> None:
    container = 'branches = {container = {runtime = "apptainer", image = "x"}}'
    plan = write_plan(tmp_path / "plan.toml", f"{ON_SLURM}{container}")
    with pytest.raises(ConfigError, match=r"--out: given .*mounts of a container"):
        specs_of(plan, tmp_path / name)
    with pytest.raises(ConfigError, match=r"plan's folder: given .*mounts of a container"):
        specs_of(write_plan(tmp_path / name / "plan.toml", f"{ON_SLURM}{container}"), tmp_path / "run")
    assert specs_of(write_plan(tmp_path / name / "plan.toml"), tmp_path / name / "run")


@pytest.mark.parametrize("name", ["a\nb", "a\rb", "a\x7fb", "a\x85b", os.fsdecode(b"a\xffb")])
@pytest.mark.parametrize("launch", [ON_SLURM, HERE])
def test_a_folder_with_a_control_character_is_refused(tmp_path: Path, name: str, launch: str) -> None:
    with pytest.raises(ConfigError, match=r"--out: given .*without control characters"):
        specs_of(write_plan(tmp_path / "plan.toml", launch), tmp_path / name)
    with pytest.raises(ConfigError, match=r"plan's folder: given .*without control characters"):
        specs_of(write_plan(tmp_path / name / "plan.toml", launch), tmp_path / "run")


HOSTILE_LINES = {
    "command": 'command = ["a{}b"]',
    "ds_config": 'ds_config = "a{}b"',
    "python": 'python = "a{}b"',
    "hostfile": 'hostfile = "a{}b"',
    "launcher_args": 'launcher_args = ["a{}b"]',
    "env": 'env = {{X = "a{}b"}}',
    "modules": 'modules = ["a{}b"]',
    "setup": 'setup = ["a{}b"]',
    "sbatch": 'sbatch = ["--x=a{}b"]',
    "container image": 'container = {{runtime = "pyxis", image = "a{}b"}}',
    "container mounts": 'container = {{runtime = "pyxis", image = "x", mounts = ["a{}b"]}}',
    "branches env": 'branches = {{env = {{X = "a{}b"}}}}',
    "paths v1 setup": 'paths.v1 = {{setup = ["a{}b"]}}',
}


@pytest.mark.parametrize("key", HOSTILE_LINES)
@pytest.mark.parametrize("character", ["\\n", "\\r", "\\u0000", "\\u001B", "\\u007F"])
def test_text_of_several_lines_is_refused_wherever_it_stands(tmp_path: Path, key: str, character: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"[launch] {key}") + ".*given .*; allowed: "):
        specs(tmp_path, f'kind = "slurm"\n{HOSTILE_LINES[key].format(character)}')


@pytest.mark.parametrize("key", ["partition", "account", "qos", "gres"])
@pytest.mark.parametrize("value", ["a b", "-x", "a;b", "$(x)", "a'b", "", "a#b"])
def test_names_of_the_site_are_single_plain_words(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=rf"\[launch\] {key}: given .*; allowed: letters, digits"):
        specs(tmp_path, f"{ON_SLURM}{key} = {json.dumps(value)}")


# What a job is known by, where its output goes, how it is queued, and what would keep sbatch from submitting it.
OURS = {"job-name", "comment", "output", "error", "open-mode", "chdir", "requeue", "no-requeue", "signal", "ntasks"}
OURS |= {"dependency", "hold", "kill-on-invalid-dep", "array", "wait", "wrap", "parsable"}
OURS |= {"clusters", "test-only", "help", "usage", "version"}


@pytest.mark.parametrize("option", sorted(OURS | SBATCH_KEYS.keys()))
def test_an_option_that_pathswitch_decides_is_refused_with_the_key_that_decides_it(tmp_path: Path, option: str) -> None:
    instead = f"the key {SBATCH_KEYS[option]}" if SBATCH_KEYS.get(option) else "pathswitch itself"
    for line in (f"--{option}", f"--{option}=x"):
        with pytest.raises(ConfigError, match=rf"--{option} is decided by {instead}"):
            specs(tmp_path, f'{ON_SLURM}sbatch = ["{line}"]')


@pytest.mark.parametrize("line", ["-p gpu", "--mem 0", "mem=0", "--", "--=x", "--Mem=0", "--mem=", "--a b=c"])
def test_an_option_of_sbatch_is_one_long_option(tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=r"\[launch\] sbatch: given .*; allowed: one long option of sbatch in each"):
        specs(tmp_path, f'{ON_SLURM}sbatch = ["{line}"]')


@pytest.mark.parametrize("name", ["1X", "X Y", "X=Y", "", "PATHSWITCH_PATH", "SLURM_JOB_ID", "SBATCH_X", "X$(y)"])
def test_names_of_variables_are_names_and_not_ours(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\[launch\] env.*given .*; allowed: names of variables; not PATHSWITCH_\*"):
        specs(tmp_path, f'{ON_SLURM}env = {{"{name}" = "x"}}')


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:00:01", 1), ("24:00:00", 86_400), ("1-00:00:00", 86_400), ("2-03:04:05", 183_845)]
)
def test_times_are_seconds(text: str, seconds: int) -> None:
    assert time_seconds(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "60", "1:00", "00:00:00", "01:60:00", "01:00:60", "-1:00:00", "1d", "01:00:00\\n"]
)
def test_other_times_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"\[launch\] time: given .*; allowed: 'HH:MM:SS' or 'D-HH:MM:SS'"):
        specs(tmp_path, f'{ON_SLURM}time = "{text}"')


def test_a_limit_in_which_a_job_would_be_asked_to_end_at_once_is_refused(tmp_path: Path) -> None:
    launch = f'{ON_SLURM}time = "01:00:00"\nsignal_seconds = 600\nbranches = {{time = "00:11:00"}}'
    with pytest.raises(ConfigError, match=r"\[launch\] time of v1: given '00:11:00'; allowed: more than 660 s"):
        specs(tmp_path, launch)
    assert specs(tmp_path, launch.replace("00:11:00", "00:11:01"))


@pytest.mark.parametrize("section", ["launch", "launch.branches", "launch.paths.v1"])
def test_a_misspelt_key_is_named(tmp_path: Path, section: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'node'.*did you mean 'nodes'"):
        specs(tmp_path, f"{ON_SLURM}[{section}]\nnode = 2" if section != "launch" else f"{ON_SLURM}node = 2")


def test_the_key_that_signs_is_found_where_the_job_has_it(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.toml", 'command = ["x", "{ds_config}"]\nds_config = "ds.json"', 1)

    def key_file(section: dict[str, Any]) -> str | None:
        ds_config = {"pathswitch": section}
        return job_specs(load_plan_file(plan), tmp_path, tmp_path / "run", ds_config=ds_config)[0].signing_key_file

    assert key_file({"checkpoint": {"signing_key_file": "keys/run"}}) == str(tmp_path / "keys/run")
    assert key_file({"checkpoint": {"signing_key_file": "/keys/run"}, "job": {"exit_at_end": False}}) == "/keys/run"
    assert key_file({}) is None
    with pytest.raises(ConfigError, match=r"checkpoint.signing_key: given 'unknown key'"):
        key_file({"checkpoint": {"signing_key": "x"}})
    trainer = f'{TRAINER}\n[deepspeed.pathswitch.checkpoint]\nsigning_key_file = "key"'
    plan = write_plan(tmp_path / "plan.toml", "", 1, trainer)
    assert specs_of(plan, tmp_path / "run")[0].signing_key_file == str(tmp_path / "key")


def test_a_job_file_is_read_as_it_was_written_or_named(tmp_path: Path) -> None:
    job = specs(tmp_path, f'{ON_SLURM}env = {{X = "ü\\""}}\ncontainer = {{runtime = "pyxis", image = "x"}}')["v2"]
    file = tmp_path / "job.json"
    file.write_text(job.model_dump_json(indent=1, exclude_defaults=True))
    assert load_spec(file) == job
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "end_step": "many"}))
    with pytest.raises(RunError, match=rf"^{re.escape(str(file))}: end_step: .*`pathswitch submit` writes it anew"):
        load_spec(file)
    file.write_text("{")
    with pytest.raises(RunError, match=rf"^{re.escape(str(file))}: "):
        load_spec(file)
    file.unlink()
    with pytest.raises(RunError, match=rf"^{re.escape(str(file))}: cannot be read"):
        load_spec(file)


def test_a_plan_without_versions_has_no_jobs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[\[versions\]\]: given 'nothing'; allowed: at least one version"):
        specs(tmp_path, ON_SLURM, versions=0)


def test_a_main_path_without_a_step_of_its_own_has_no_job(tmp_path: Path) -> None:
    plan = write_plan(tmp_path / "plan.toml", versions=1)
    plan.write_text(plan.read_text().replace("alpha = 0.6", "alpha = 1.0").replace("warmup_steps = 2", ""))
    assert [(job.path, job.start_step) for job in specs_of(plan, tmp_path / "run")] == [("v1", 0)]
