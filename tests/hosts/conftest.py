"""Two hosts for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from two_hosts import TwoHosts, missing, two_hosts


@pytest.fixture(scope="session")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    if reason := missing():
        pytest.skip(reason)
    with two_hosts(tmp_path_factory.mktemp("hosts")) as started:
        yield started
