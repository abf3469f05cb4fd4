"""``pathswitch log``: what it says of a run folder, and how it fails."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pathswitch.cli.log import is_training
from pathswitch.run_folder import PathFolder
from pathswitch.versions.ledger import Ledger
from pathswitch.versions.records import CheckpointRecord

COMMAND = str(Path(sys.executable).with_name("pathswitch"))


def log(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, "log", *map(str, arguments)], capture_output=True, text=True, timeout=120)


def checkpoint(step: int, folder: str) -> CheckpointRecord:
    return CheckpointRecord(
        manifest=f"{step:064x}",
        folder=folder,
        paradigm="path_switching",
        path="main",
        step=step,
        samples_seen=step * 16,
        tokens_seen=None,
        next_lr=1e-3,
        parent=None,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with records of two checkpoints that are gone, one of them outside of the folder."""
    run = tmp_path / "run"
    ledger = Ledger(run / "ledger")
    ledger.append(checkpoint(80, "path_switching/main/checkpoints/global_step80"))
    ledger.append(checkpoint(160, str(tmp_path / "elsewhere" / "global_step160")))
    return run


def test_log_shows_every_recorded_checkpoint(run: Path) -> None:
    shown = log(run)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert [line.split()[:4] for line in shown.stdout.splitlines()[2:4]] == [
        ["●", "000000000000", "main", "160"],
        ["●", "000000000000", "main", "80"],
    ]
    assert shown.stdout.count("missing") == 2


def test_the_state_is_of_the_folder_that_the_record_names(run: Path, tmp_path: Path) -> None:
    (run / "path_switching/main/checkpoints/global_step80").mkdir(parents=True)
    assert states(run) == {80: "damaged", 160: "missing"}
    (tmp_path / "elsewhere" / "global_step160").mkdir(parents=True)
    assert states(run) == {80: "damaged", 160: "damaged"}


def paths(run: Path) -> list[dict[str, Any]]:
    shown = log(run, "--json")
    assert (shown.returncode, shown.stderr) == (0, "")
    content = json.loads(shown.stdout)
    assert (content["format"], len(content["paradigms"])) == (1, 1)
    found: list[dict[str, Any]] = content["paradigms"][0]["paths"]
    return found


def states(run: Path) -> dict[int, str]:
    return {node["step"]: node["state"] for node in paths(run)[0]["checkpoints"]}


def test_a_path_is_running_while_its_lock_is_held(run: Path) -> None:
    assert not paths(run)[0]["running"]
    lock = run / "path_switching" / "main" / "lock"
    assert not lock.exists() and not lock.parent.exists()
    lock.parent.mkdir(parents=True)
    with lock.open("a+") as file:
        file.write(f"{os.getpid()}")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert paths(run)[0]["running"]
        assert "running" in log(run).stdout
    assert not paths(run)[0]["running"]  # left behind by a process that ended
    assert lock.read_text() == f"{os.getpid()}"


def test_asking_for_a_lock_leaves_it_free(tmp_path: Path) -> None:
    path, lock = PathFolder(tmp_path), tmp_path / "lock"
    assert not is_training(path)
    lock.touch()
    assert not is_training(path)
    with lock.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert is_training(path)


def test_damaged_records_are_named_and_hide_nothing(run: Path) -> None:
    damaged = sorted((run / "ledger").iterdir())[0]
    damaged.write_text("{")
    for arguments in ([run], [run, "--json"]):
        shown = log(*arguments)
        assert shown.returncode == 1
        assert str(damaged) in shown.stderr
        assert shown.stdout.count("missing") == 1


def test_a_record_of_a_newer_release_is_one_line(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from pathswitch.versions import records; records.FORMAT = 2\n"
        "from pathswitch.versions.ledger import Ledger\n"
        "Ledger(Path(sys.argv[1])).append(records.PrunedRecord('a', 'b'))"
    )
    subprocess.run([sys.executable, "-c", code, run / "ledger"], check=True, timeout=60)
    shown = log(run)
    assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
    assert "format 2" in shown.stderr


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        shown = log(folder)
        assert (shown.returncode, shown.stdout, shown.stderr.count("\n")) == (2, "", 1)
        assert str(folder) in shown.stderr and "no records were written" in shown.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_empty_ledger_says_so(tmp_path: Path) -> None:
    (tmp_path / "ledger").mkdir()
    assert log(tmp_path).stdout == "No checkpoint has been recorded yet.\n"
    assert json.loads(log(tmp_path, "--json").stdout) == {"format": 1, "paradigms": []}
