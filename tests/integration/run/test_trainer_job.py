"""The embedded trainer as a job: asked to stop while it trains or evaluates, and on another number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ds_ranks
import pytest
from preloaded import Finished
from run_harness import assert_same_bits, checkpoint, metrics

pytestmark = pytest.mark.slow
HERE, FORK, END = Path(__file__).parent, 14, 20


@pytest.fixture
def out(two_versions: Path, tmp_path: Path) -> Path:
    """Return a copy of the run folder; its plan trains on two ranks."""
    return Path(shutil.copytree(two_versions, tmp_path / "run"))


def train(out: Path, path: str, *, ranks: int = 2, script: str = "", extra: dict[str, str] | None = None) -> Finished:
    command = [script] if script else ["-m", "pathswitch.trainer"]
    command += ["--out", str(out), "--paradigm", "path_switching", "--path", path]
    return ds_ranks.run(*command, folder=out.parent, ranks=ranks, extra=extra)


def test_stopped_behind_a_step_it_goes_on_to_the_same_bits(two_versions: Path, out: Path, tmp_path: Path) -> None:
    expected, found = two_versions / "path_switching", out / "path_switching"
    shutil.rmtree(found / "v2")
    files = {"PATHSWITCH_STOP_FILE": str(tmp_path / "stop"), "PATHSWITCH_PROGRESS_FILE": str(tmp_path / "progress")}
    (tmp_path / "stop").touch()
    stopped = train(out, "v2", extra=files)
    assert stopped.returncode == 0, stopped.output[-3000:]
    saved = found / "v2" / "checkpoints" / f"global_step{FORK + 1}"
    line = f"pathswitch: path 'v2' asked to stop (stop file {tmp_path}/stop): saved {saved} at step {FORK + 1}\n"
    assert stopped.output.count(line) == 1 and saved.is_dir()
    assert metrics(found, "v2") == metrics(expected, "v2")[:1], "the line of the step is there before its checkpoint"
    assert not (found / "v2" / "done.json").exists()
    (tmp_path / "stop").unlink()
    finished = train(out, "v2", extra=files)
    assert finished.returncode == 0, finished.output[-3000:]
    assert metrics(found, "v2") == metrics(expected, "v2")
    assert_same_bits(checkpoint(found, "v2", END), checkpoint(expected, "v2", END))
    assert (found / "v2" / "evaluation.json").read_bytes() == (expected / "v2" / "evaluation.json").read_bytes()
    assert json.loads((found / "v2" / "done.json").read_text())["end_step"] == END
    progress = json.loads((tmp_path / "progress").read_text())
    assert (progress["step"], progress["lr"]) == (FORK + 3, metrics(expected, "v2")[2]["lr"]), (
        "a second step's, at once"
    )
    assert progress["samples_per_s"] == pytest.approx(8 / progress["seconds_per_step"])


def test_stopped_while_it_evaluates(two_versions: Path, out: Path) -> None:
    expected, found = two_versions / "path_switching" / "v2", out / "path_switching" / "v2"
    for name in ("done.json", "evaluation.json"):
        (found / name).unlink()
    before = sorted((found / "checkpoints").rglob("*"))
    stopped = train(out, "v2", script=str(HERE / "rank_asked_while_evaluating.py"))
    assert stopped.returncode == 0, stopped.output[-3000:]
    assert "asked to stop (SIGTERM) while it evaluates: nothing to save at step 20" in stopped.output
    assert not (found / "done.json").exists() and not (found / "evaluation.json").exists()
    assert sorted((found / "checkpoints").rglob("*")) == before
    finished = train(out, "v2")
    assert finished.returncode == 0, finished.output[-3000:]
    assert (found / "evaluation.json").read_bytes() == (expected / "evaluation.json").read_bytes()
    assert (found / "done.json").exists()


def test_the_real_number_of_ranks_counts(two_versions: Path, out: Path) -> None:
    """One rank where the plan says two: the same steps, up to the order in which gradients are added up."""
    shutil.rmtree(out / "path_switching")
    refused = train(out, "main", ranks=3)
    assert refused.returncode == 2
    message = "the number of ranks of this job: given 3; allowed: a divisor of [train] global_batch_size (8)"
    assert message in refused.output and not list((out / "path_switching").rglob("global_step*"))
    done = train(out, "main", ranks=1)
    assert done.returncode == 0, done.output[-3000:]
    expected, found = (metrics(folder / "path_switching", "main") for folder in (two_versions, out))
    assert [row["lr"] for row in found] == [row["lr"] for row in expected]
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], rel=1e-4)
