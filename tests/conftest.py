"""Settings of all tests, and how they are shared out among pytest-xdist's workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# What starts jobs is there for the tests of every folder.
sys.path.append(str(Path(__file__).parent / "integration"))

# The same examples on every run: a test that fails now and then tells nobody anything.
settings.register_profile("pathswitch", deadline=None, derandomize=True)
settings.load_profile("pathswitch")

# Folders whose tests share something that takes long to make, or that a machine has one of: one worker runs them all.
TOGETHER = ("tests/slurm", "tests/integration/run", "tests/hosts")
# What takes long comes first, so that the workers end at the same time.
LONG = (*TOGETHER, "tests/integration", "tests/megatron")


def folder_of(nodeid: str) -> str:
    return nodeid.partition("::")[0].rpartition("/")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a worker all tests of a file, which share its fixtures, or of a folder."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return folder if (folder := folder_of(nodeid)) in TOGETHER else nodeid.partition("::")[0]

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        order = {folder: place for place, folder in enumerate(LONG)}
        items.sort(key=lambda item: order.get(folder_of(item.nodeid), len(order)))
