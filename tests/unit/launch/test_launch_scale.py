"""A plan of 50 versions on 1,000 nodes is submitted, and shown, without a wait that anybody notices."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from launch_scale import Scale


@pytest.mark.slow
def test_a_large_plan_is_launched_in_seconds(tmp_path: Path) -> None:
    """Seconds of processors: those of a clock depend on what else the machine does."""
    scale = Scale(tmp_path)
    assert scale.submit("run").cpu < 5
    scale.grow("run", checkpoints=2)
    assert scale.submit("run").cpu < 3
    assert scale.status("run").cpu < 2
