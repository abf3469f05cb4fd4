"""Clusters that tests run jobs on; where none can run, the reason says what is missing and how to get it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster import Cluster, unavailable


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Four nodes that run jobs. A test leaves none of its jobs and no node down."""
    if reason := unavailable():
        pytest.skip(f"a SLURM cluster on this machine {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def large_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A controller of 1,024 nodes with 8 GPUs each, for `sbatch --test-only`."""
    if reason := unavailable(simulated=True):
        pytest.skip(f"a SLURM controller on this machine {reason}")
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=1024, gpus=8, simulated=True) as cluster:
        yield cluster
