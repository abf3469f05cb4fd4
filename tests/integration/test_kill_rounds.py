"""Real ranks killed in saves, conversions and forks, and at any other moment: not a bit of what was trained changes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ds_job
import pytest

pytestmark = pytest.mark.slow
ROUNDS = 12


@pytest.fixture(scope="module")
def met(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the rounds met; their command fails where anything does not hold behind a kill."""
    command = [sys.executable, str(Path(__file__).with_name("kill_rounds.py")), "--rounds", str(ROUNDS)]
    finished = ds_job.run(command, tmp_path_factory.mktemp("kills"), timeout_seconds=400)
    assert finished.returncode == 0, finished.output[-4000:]
    result: dict[str, Any] = json.loads(finished.output.splitlines()[-1])
    print(result)
    return result


def test_kills_hit_saves(met: dict[str, Any]) -> None:
    assert met["seen"][".saving"] >= 2, met


@pytest.mark.parametrize("stage", ["1", "3"])
def test_updates_trained_again_have_the_same_bits(met: dict[str, Any], stage: str) -> None:
    assert met[f"stage {stage}"]["trained again"] >= 2, "each was compared"
    assert met[f"stage {stage}"]["steps"] > 3, met


def test_conversions_and_forks_were_killed(met: dict[str, Any]) -> None:
    assert met["seen"]["killed in a conversion"] == 2, met
    assert met["seen"]["killed in a fork"] >= 4, met
