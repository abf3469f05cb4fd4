"""Plans on this machine, from the command to the ranks: what runs beside what, and what happens when one is ended."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_jobs import commit, complete, open_run, wait_for, write_plan

from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import JobSpec

PATHSWITCH = str(Path(sys.executable).with_name("pathswitch"))
PATIENCE_SECONDS = 120
# In the place of the ranks' interpreter, and so of the deepspeed launcher: does what a file of the path's name says.
RANKS = """#!/bin/bash
here={folder}
cd "$here"
path=$PATHSWITCH_PATH
checkpoints=run/path_switching/$path/checkpoints
save() {{ mkdir -p $checkpoints; mv ready/$path/global_step$1 $checkpoints/; }}
wait_for() {{ until [ -e "$1" ]; do sleep 0.02; done; }}
touch started.$path
echo "$@" > words.$path
. "./$path.sh"
"""
ASKED = 'wait_for "$PATHSWITCH_STOP_FILE"'


class Plan:
    """A plan whose paths do what the tests say."""

    def __init__(self, folder: Path, versions: int = 1, more: str = "") -> None:
        self.folder, self.run = folder, folder / "run"
        launch = f'command = ["train.py"]\npython = "{folder}/ranks"\nrestart_budget = 0\n{more}'
        self.file = write_plan(folder / "plans" / "plan.toml", launch, versions)
        (folder / "ranks").write_text(RANKS.format(folder=folder))
        (folder / "ranks").chmod(0o755)

    def jobs(self) -> dict[str, JobSpec]:
        return open_run(self.file, self.run)

    def script(self, path: str, text: str, *steps: int) -> None:
        """Say what a path's ranks do, and have checkpoints lie ready for them."""
        (self.folder / f"{path}.sh").write_text(text + "\n")
        for step in steps:
            commit(self.jobs()[path], step, folder=self.folder / "ready" / path)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        line = [PATHSWITCH, "submit", str(self.file), "--out", str(self.run), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(line, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    def submit(self) -> tuple[int, str, str]:
        return end(self.start())

    def events(self, path: str) -> list[str]:
        read = Journal(self.run, "path_switching", path).read()
        return [event.record.event for event in read]


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err


@pytest.mark.slow
def test_a_branch_trains_beside_its_parent_as_soon_as_it_may(tmp_path: Path) -> None:
    plan = Plan(tmp_path, versions=2, more="parallel = 2")
    plan.script("main", "save 40; wait_for started.v1; save 140", 40, 140)
    plan.script("v1", "save 100", 100)
    plan.script("v2", "save 200", 200)
    # Whatever is called like a module of ours or of Python's is none of the agent's.
    for name in ("signal.py", "json.py", "pathswitch.py"):
        (plan.file.parent / name).write_text("raise SystemExit('a file of the plan\\'s folder was imported')")
        (tmp_path / name).write_text("raise SystemExit('a file of the working folder was imported')")
    code, out, err = plan.submit()
    assert (code, err) == (0, ""), err
    for path, events in (("main", ["started", "completed"]), ("v1", ["opened", "started", "completed"])):
        assert plan.events(path) == events
    assert [re.split(" +", line)[:3] for line in out.splitlines()[-3:]] == [
        ["main", "done", "140/140"],
        ["v1", "done", "100/100"],
        ["v2", "done", "200/200"],
    ]
    words = (tmp_path / "words.v1").read_text().split()
    assert words[:4] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "1"] and words[-1] == "train.py"
    assert plan.submit()[0] == 0 and plan.events("main") == ["started", "completed"]  # nothing is left to do


@pytest.mark.slow
def test_one_at_a_time_means_one_and_gates_of_a_parent_that_is_done_are_opened(tmp_path: Path) -> None:
    plan = Plan(tmp_path, versions=2)
    jobs = plan.jobs()
    commit(jobs["main"], 40)
    commit(jobs["main"], 140)
    complete(jobs["main"])
    plan.script("v1", "sleep 0.5; [ ! -e started.v2 ] && touch ended.v1 && save 100", 100)
    plan.script("v2", "[ -e ended.v1 ] && save 200", 200)
    code, _, err = plan.submit()
    assert code == 0, err
    assert plan.events("v1") == plan.events("v2") == ["opened", "started", "completed"]
    assert not (tmp_path / "started.main").exists()


@pytest.mark.slow
def test_ctrl_c_has_all_jobs_save_and_the_next_submission_goes_on(tmp_path: Path) -> None:
    plan = Plan(tmp_path, versions=2, more="parallel = 2")
    plan.script("main", f"save 40; {ASKED}; save 50", 40, 50, 140)
    plan.script("v1", f"{ASKED}; save 60", 60, 100)
    process = plan.start()
    wait_for((tmp_path / "started.v1").exists, "v1 trains")
    process.send_signal(signal.SIGINT)
    code, _, err = end(process)
    assert code == 130 and "the jobs have saved and ended; submit again to go on" in err
    assert plan.events("main")[-1] == plan.events("v1")[-1] == "stopped"
    assert not (tmp_path / "started.v2").exists()
    plan.script("main", "save 140")
    plan.script("v1", "save 100")
    plan.script("v2", "save 200", 200)
    code, _, err = plan.submit()
    assert code == 0, err
    assert plan.events("v1") == ["opened", "started", "stopped", "started", "completed"]


@pytest.mark.slow
def test_what_fails_is_named_and_the_others_are_seen_to_their_ends(tmp_path: Path) -> None:
    plan = Plan(tmp_path, versions=3)
    plan.script("main", "save 40; save 140; save 240", 40, 140, 240)
    plan.script("v1", "echo 'ValueError: of v1'; exit 3")
    plan.script("v2", "save 200", 200)
    plan.script("v3", "save 300", 300)
    code, _, err = plan.submit()
    assert code == 2 and "pathswitch: error: not all paths are trained:\n  v1: " in err
    assert "ValueError: of v1" in err and "v2" not in err
    assert [plan.events(path)[-1] for path in ("v1", "v2", "v3")] == ["gave up", "completed", "completed"]


@pytest.mark.slow
def test_a_branch_that_may_not_start_says_why(tmp_path: Path) -> None:
    plan = Plan(tmp_path, versions=2)
    plan.script(
        "main",
        "save 40; echo x >> run/path_switching/main/checkpoints/global_step40/offloaded/rank_0.swp; save 140",
        40,
        140,
    )
    shutil.rmtree(tmp_path / "ready" / "main" / "global_step140")
    plan.script("main", (tmp_path / "main.sh").read_text(), 140)
    plan.script("v2", "save 200", 200)
    code, _, err = plan.submit()
    assert code == 2 and "v1: was not started: " in err
    assert "offloaded/rank_0.swp: expected 300 bytes, found 302 bytes" in err
    assert plan.events("v2")[-1] == "completed"


@pytest.mark.slow
def test_a_cancelled_plan_can_be_submitted_again(tmp_path: Path) -> None:
    plan = Plan(tmp_path)
    plan.script("main", ASKED, 40)
    process = plan.start()
    wait_for((tmp_path / "started.main").exists, "main trains")
    done = subprocess.run([PATHSWITCH, "cancel", str(plan.run)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "is asked to save and end" in done.stdout
    code, _, err = end(process)
    assert code == 2 and "main: was asked to end; submit again to go on" in err
    assert plan.events("main")[-1] == "cancelled"
    plan.script("main", "save 40")
    plan.script("v1", "save 100", 100)
    assert plan.submit()[0] == 0


@pytest.mark.slow
def test_a_second_submission_does_not_train_what_the_first_one_trains(tmp_path: Path) -> None:
    plan = Plan(tmp_path)
    plan.script("main", f"echo $$ >> pids; {ASKED}", 40)
    first = plan.start()
    wait_for((tmp_path / "pids").exists, "main trains")
    code, _, err = plan.submit()
    assert code == 2 and re.search(r"main: .*process \d+ on \S+ looks after this path", err)
    assert first.poll() is None and len((tmp_path / "pids").read_text().splitlines()) == 1
    first.send_signal(signal.SIGTERM)
    assert end(first)[0] == 130


@pytest.mark.slow
def test_a_user_script_under_the_real_deepspeed_launcher(tmp_path: Path) -> None:
    """Two ranks of a branch; the first commits its path's last checkpoint, the other one waits for it."""
    plan = write_plan(tmp_path / "plan.toml", 'command = ["train it.py", "{path}", "it\'s"]\ngpus_per_node = 2', 1)
    (tmp_path / "train it.py").write_text(
        "import os, sys, time\nfrom pathlib import Path\n"
        "rank, path = os.environ['RANK'], os.environ['PATHSWITCH_PATH']\n"
        f"root = Path({str(tmp_path)!r})\n"
        "with (root / 'ranks').open('a') as file:\n"
        "    file.write(' '.join([path, rank, os.environ['WORLD_SIZE'], *sys.argv[-2:]]) + '\\n')\n"
        "checkpoints, ready = root / 'run/path_switching' / path / 'checkpoints', root / 'ready' / path\n"
        "if rank == '0':\n"
        "    checkpoints.mkdir(exist_ok=True)\n"
        "    for folder in sorted(ready.iterdir()):\n"
        "        if folder.name.startswith('global_step'):\n"
        "            folder.rename(checkpoints / folder.name)\n"
        "else:\n"
        "    while not (checkpoints / 'global_step100').exists():\n"
        "        time.sleep(0.1)\n"
    )
    jobs = open_run(plan, tmp_path / "run")
    commit(jobs["main"], 40)
    complete(jobs["main"])
    commit(jobs["v1"], 100, folder=tmp_path / "ready" / "v1")
    line = [PATHSWITCH, "submit", str(plan), "--out", str(tmp_path / "run")]
    environ = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, env=environ, cwd=tmp_path)
    logs = "".join(job.files.log.read_text() for job in jobs.values() if job.files.log.exists())
    assert done.returncode == 0, done.stderr + logs
    ranks = {tuple(line.split()) for line in (tmp_path / "ranks").read_text().splitlines()}
    assert ranks == {("v1", rank, "2", "v1", "it's") for rank in ("0", "1")}
