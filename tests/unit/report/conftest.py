"""A fixture that writes run folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from report_runs import plan_text, write_run


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a run folder under a fresh name."""

    def make(name: str = "run", steps: Sequence[int] = (200, 200, 200, 200), **arguments: object) -> Path:
        run_keys = {key: arguments.pop(key) for key in ("paradigms",) if key in arguments}
        seed = arguments.get("seed", 1)
        assert isinstance(seed, int)
        return write_run(tmp_path / name, plan_text(steps, **arguments), seed=seed, **run_keys)  # type: ignore[arg-type]

    return make
