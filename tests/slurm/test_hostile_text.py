"""Text of a plan and names of folders arrive on the nodes as they stand, and nothing in them is ever executed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cluster import Cluster
from hypothesis import given, settings
from hypothesis import strategies as st

from pathswitch.cli.jobs import submit_plan
from pathswitch.config import load_plan_file
from pathswitch.launch.cancel import cancel_jobs
from pathswitch.launch.render import _output_pattern, _sbatch_line
from pathswitch.launch.status import submitted_specs

TRACE = "executed-by-somebody"
# Names of a run's and of its plan's folder.
FOLDERS = [
    ("my run", "my plans"),
    (f"$(touch {TRACE})", f"`touch {TRACE}`"),
    ('it\'s "quoted"', "back\\slash %j %%"),
    (f"-dash;touch {TRACE};#", f"ünï☃ & touch {TRACE} &"),
    ("\\\\%x\\", f"'\"$(touch {TRACE})\"'"),
]
WORDS = [
    "two words",
    "",
    f"$(touch {TRACE})",
    f"`touch {TRACE}`",
    "it's",
    'a "quoted" one',
    "back\\slash\\",
    "%j %% #",
    f"; touch {TRACE} #",
    "--leading",
    "*",
    "~",
    "$HOME ${PATH}",
    "ünï☃",
    "{braces}",
    "!history",
]
# What the job does: write down how it was started, and that it is done.
SCRIPT = """
import json, os, sys
from pathlib import Path
done, end_step, *words = sys.argv[1:]
Path("seen.json").write_text(json.dumps({"words": words, "environment": dict(os.environ), "folder": os.getcwd()}))
Path(done).write_text(json.dumps({"end_step": int(end_step)}))
"""


@dataclass(frozen=True)
class Seen:
    """A job that has run in folders of these names."""

    run: Path
    plans: Path
    environ: dict[str, str]
    """What the plan gives it."""
    modules: list[str]

    @property
    def content(self) -> dict[str, Any]:
        """What the job has seen of itself."""
        content: dict[str, Any] = json.loads((self.plans / "seen.json").read_text())
        return content


def write_plan(plans: Path, launch: dict[str, Any]) -> Path:
    schedule = '[schedule]\nmax_lr = 1e-3\n[[versions]]\nname = "v1"\nsteps = 10\n[launch]\n'
    lines = [f"{name} = {toml(value)}" for name, value in launch.items()]
    plans.mkdir(parents=True)
    (plans / "plan.toml").write_text(schedule + "\n".join(lines))
    (plans / "dump it.py").write_text(SCRIPT)
    return plans / "plan.toml"


def toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(inner)}" for name, inner in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


@pytest.fixture(scope="module")
def seen(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Seen]]:
    """Jobs in folders of all these names, submitted and run to their ends on the cluster."""
    root = tmp_path_factory.mktemp("hostile")
    environ = {f"HOSTILE_{index}": word for index, word in enumerate(WORDS)}
    doubled = [word.replace("{", "{{").replace("}", "}}") for word in WORDS]
    words = ["{checkpoints}/../done.json", "{end_step}", *doubled]
    jobs = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PATH", "SLURM_CONF"):
            patch.setenv(name, cluster.environment()[name])
        patch.chdir(root)
        for number, (run, plans) in enumerate(FOLDERS):
            # The first one as at sites that keep the submitting shell's environment out of jobs.
            alone = number == 0
            modules = [] if alone else [*WORDS[2:4], "gcc/12.2"]
            job = Seen(root / str(number) / run, root / str(number) / plans, environ, modules)
            # As the login shells of a site define it.
            loaded = f'() {{ printf "%s\\n" "$@" >> {root}/{number}/modules; }}'
            patch.setenv("BASH_FUNC_module%%", loaded)
            launch = {"kind": "slurm", "command": ["dump it.py", *words], "env": environ, "modules": job.modules}
            launch |= {
                "gres": "none",
                "sbatch": [f"--mail-user=$(touch {TRACE}) it's", f"--export={'NONE' if alone else 'ALL'}"],
            }
            plan = write_plan(job.plans, launch)
            code = submit_plan(
                plan, load_plan_file(plan), job.run, "path_switching", dry_run=False, yes=True, as_json=False
            )
            assert code == 0
            jobs.append(job)
        cluster.wait_for(lambda: all((job.plans / "seen.json").exists() for job in jobs), 120, "all jobs have run")
        for job in jobs:
            list(cancel_jobs(submitted_specs(job.run), now=True))
    yield jobs


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_words_variables_folders_and_modules_arrive_as_they_stand(seen: list[Seen], number: int) -> None:
    job = seen[number]
    assert job.content["words"] == WORDS
    environment = job.content["environment"]
    assert {name: environment[name] for name in job.environ} == job.environ
    assert job.content["folder"] == str(job.plans)
    assert environment["PATHSWITCH_STOP_FILE"] == str(job.run / "path_switching/main/stop")
    loaded = job.run.parent / "modules"
    assert (loaded.read_text().splitlines() if loaded.exists() else []) == [
        line for module in job.modules for line in ("load", module)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FOLDERS)))
def test_the_log_is_where_the_run_folder_is(cluster: Cluster, seen: list[Seen], number: int) -> None:
    log = seen[number].run / "path_switching/main/log.txt"
    assert "pathswitch: main: start " in log.read_text()


@pytest.mark.slow
def test_nothing_was_executed(cluster: Cluster, seen: list[Seen]) -> None:
    root = seen[0].run.parents[1]
    everywhere = [*root.rglob("*"), *cluster.folder.rglob("*"), *Path("/").iterdir(), *Path.home().iterdir()]
    assert [file for file in [*everywhere, *Path.cwd().iterdir()] if file.name == TRACE] == []


@pytest.mark.slow
@settings(max_examples=60)
@given(value=st.text(st.sampled_from("a \\'\"#%$`;&|=:,~é☃-()*{}!"), min_size=1, max_size=12))
def test_sbatch_reads_a_quoted_value_as_it_was(cluster: Cluster, value: str) -> None:
    script = cluster.folder / "quoted.sh"
    script.write_text(f"#!/bin/bash\n{_sbatch_line('--comment', value)}\n{_sbatch_line('--job-name', value)}\ntrue\n")
    job = cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", script).strip()
    try:
        assert cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%k") == value + "\n"
        assert cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%j") == value + "\n"
    finally:
        cluster.run("scancel", job)


@pytest.mark.slow
def test_sbatch_opens_the_file_that_an_output_pattern_means(cluster: Cluster, tmp_path: Path) -> None:
    names = ["%j", "%%", "\\", "\\%j", "\\\\%%\\", "a%", "%x\\n", "%1j", "100%", "\\%"]
    jobs = []
    for name in names:
        script = tmp_path / "script.sh"
        script.write_text(f"#!/bin/bash\n{_sbatch_line('--output', _output_pattern(str(tmp_path / name)))}\ntrue\n")
        jobs.append(int(cluster.run("sbatch", "--parsable", script)))
    for job in jobs:
        cluster.wait_for_state(job, "COMPLETED")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([*names, "script.sh"])
