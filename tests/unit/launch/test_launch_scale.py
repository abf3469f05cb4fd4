"""What submitting and showing a plan takes grows with the plan, and no faster."""

from __future__ import annotations

import cProfile
import pstats
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pathswitch.cli.app import app

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from launch_scale import Scale

pytestmark = pytest.mark.slow
SMALL, LARGE = 10, 50


class Counted:
    """A plan of so many versions whose commands run in this process, and their function calls counted."""

    def __init__(self, folder: Path, versions: int, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        self.scale, self.monkeypatch = Scale(folder, versions), monkeypatch

    def submit(self) -> int:
        return self._calls("submit", str(self.scale.folder / "plan.toml"), "--out", self.run, "--yes")

    def status(self) -> int:
        return self._calls("status", self.run)

    @property
    def run(self) -> str:
        return str(self.scale.folder / "run")

    def commands(self) -> dict[str, int]:
        """How often each of SLURM's commands was called."""
        names = [call[0] for call in self.scale.slurm.calls()]
        return {name: names.count(name) for name in sorted(set(names))}

    def _calls(self, *arguments: str) -> int:
        with self.monkeypatch.context() as patch, cProfile.Profile() as profile:
            patch.setenv("PATH", str(self.scale.slurm.bin), prepend=":")
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]  # typeshed leaves it out


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Counted, Counted]:
    warm = Counted(tmp_path / "warm", 1, monkeypatch)
    warm.submit(), warm.status()  # imports and what is read once
    return Counted(tmp_path / "small", SMALL, monkeypatch), Counted(tmp_path / "large", LARGE, monkeypatch)


def test_submitting_grows_with_the_versions(plans: tuple[Counted, Counted]) -> None:
    small, large = plans
    assert large.submit() < 1.1 * LARGE / SMALL * small.submit()
    few, many = small.commands(), large.commands()
    assert (few.pop("sbatch"), many.pop("sbatch")) == (SMALL + 1, LARGE + 1)
    assert few == many == {"squeue": 2}


def test_submitting_again_asks_the_controller_and_starts_nothing(plans: tuple[Counted, Counted]) -> None:
    small, large = plans
    for plan in plans:
        plan.submit()
        plan.scale.slurm.forget_calls()
    assert large.submit() < 1.1 * LARGE / SMALL * small.submit()
    assert small.commands() == large.commands() == {"squeue": 2}


def test_status_grows_with_the_ledger_and_not_with_the_ranks(plans: tuple[Counted, Counted]) -> None:
    plan, _ = plans
    plan.submit()
    plan.scale.grow("run", records=200, checkpoints=2, ranks=8)
    few = plan.status()
    plan.scale.grow("run", records=0, checkpoints=2, ranks=8000)
    assert plan.status() < 1.1 * few
    plan.scale.grow("run", records=2000, checkpoints=0)
    assert few < plan.status() < 10 * few
