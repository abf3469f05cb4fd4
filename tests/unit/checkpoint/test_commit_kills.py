"""Kill -9 in the midst of saves, saves of the same tag and forks: nothing that was committed is ever lost or mixed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

WRITER = Path(__file__).with_name("commit_writer.py")
KILLS, KILLS_WITH_A_WRONG_CLOCK = 200, 40

pytestmark = pytest.mark.slow


@pytest.fixture
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a disk would spend most of the time in syncs."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


def run(*arguments: object) -> Counter[str]:
    """Run a command of the writers' killer; it fails where anything does not hold behind a kill."""
    command = [sys.executable, str(WRITER), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    print(done.stdout)
    return Counter(json.loads(done.stdout))


def test_killed_before_any_operation_on_files_nothing_committed_is_lost(fast_folder: Path) -> None:
    seen = run("operations", fast_folder)
    assert seen["operations"] > 60, seen
    for kind in (".saving", ".replaced", ".forking-", ".tmp", "unnamed"):
        assert seen[kind] >= 2, seen
    assert seen["recovered"] == 1, "between the two renames of a save of the same tag"


def test_killed_at_random_moments_nothing_committed_is_lost(fast_folder: Path) -> None:
    seen = run("moments", fast_folder, KILLS, 1)
    assert seen[".saving"] > KILLS / 5, seen
    assert seen[".saving"] + seen[".tmp"] + seen[".replaced"] + seen[".forking-"] > KILLS / 3, seen
    assert seen["last step"] > KILLS / 8, "the writers got on between the kills"


def test_a_clock_that_goes_backwards_changes_nothing(fast_folder: Path) -> None:
    seen = run("moments", fast_folder, KILLS_WITH_A_WRONG_CLOCK, 2, "--clock-back")
    assert seen[".saving"] > KILLS_WITH_A_WRONG_CLOCK / 10, seen
    assert seen["last step"] > KILLS_WITH_A_WRONG_CLOCK / 8, seen
    records = [json.loads(file.read_text()) for file in (fast_folder / "ledger").glob("*.json")]
    by_clock = sorted(records, key=lambda record: record["written_at"])
    assert by_clock[0]["step"] > by_clock[-1]["step"], "the clock did go backwards"
