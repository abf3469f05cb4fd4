"""What the ranks on other hosts get, through real pdsh, mpirun and ssh: every variable and argument as it was given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostfile_job import HERE, Jobs
from two_hosts import TwoHosts

pytestmark = pytest.mark.slow

HARD = [
    "plain",
    "",
    "two words",
    " around ",
    'it\'s "quoted"',
    "$HOME ${HOME} $(touch {mark}) `touch {mark}`",
    "$(touch${IFS}{mark})",
    "%n %h %u %% 100% %",
    "%n",
    "a;b|c&d<e>f*g?h[i]~!j#k(l){m}",
    '\\ \\\\ \\n \\$ \\" \\`',
    "*",
    "~",
    "-x",
    "ü € \u00a0 é",
    "x y" * 2000,
]
USER_FILE = "OF_USER=as it is\n\nPATH_OF_USER=$HOME/bin\nHARD_2=of the user\n"


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi"])
def test_variables_and_arguments_arrive_as_they_are(hosts: TwoHosts, tmp_path: Path, launcher: str) -> None:
    mark = tmp_path / "executed"
    words = [word.replace("{mark}", str(mark)) for word in HARD]
    env = {f"HARD_{number}": word for number, word in enumerate(words)} | {"SHOW_FOLDER": str(tmp_path)}
    command = [str(HERE / "show_rank.py"), *(word.replace("{", "{{").replace("}", "}}") for word in words[1:])]
    jobs = Jobs(hosts, tmp_path, launcher, command, env=env)
    (tmp_path / "home" / ".deepspeed_env").write_text(USER_FILE)
    result = jobs.result("main", jobs.start("main"))
    assert result["code"] == 0 and result["failure"] is None and result["ended"] == [], (result, jobs.log("main"))
    got = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [rank["host"] for rank in got] == ["hA", "hB"]
    for number, rank in enumerate(got):
        has = rank["environment"]
        assert {name: has.get(name) for name in env} == env
        arguments = [word for word in rank["arguments"] if not word.startswith("--local_rank")]
        assert arguments == words[1:]
        places = {"RANK": str(number), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_SIZE": "1"}
        assert {name: has.get(name) for name in places} == places
        assert (has["MASTER_ADDR"], has["MASTER_PORT"]) == ("10.77.0.1", got[0]["environment"]["MASTER_PORT"])
        assert has["PYTHONPATH"].split(":")[0] == str(tmp_path)
    assert not mark.exists()
    assert (tmp_path / "home" / ".deepspeed_env").read_text() == USER_FILE
    # The user's file means what it means to DeepSpeed, whose quotes a shell reads behind pdsh, nobody behind mpirun.
    of_user = ("as it is", "/root/bin") if launcher == "pdsh" else ('"as it is"', '"$HOME/bin"')
    assert all((r["environment"]["OF_USER"], r["environment"]["PATH_OF_USER"]) == of_user for r in got)
