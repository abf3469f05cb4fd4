"""What is asked of every batch script that pathswitch writes: bash, shellcheck and sbatch itself accept it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cluster import Cluster


def check_script(script: Path, cluster: Cluster) -> str:
    """Check a batch script and return what ``sbatch --test-only`` says of it: processors, nodes and partition.

    A cluster of ``Cluster(..., simulated=True)`` is enough; it needs to have the nodes that the script asks for.
    """
    if shutil.which("shellcheck") is None:
        pytest.skip("needs the package shellcheck: apt-get install --no-install-recommends shellcheck")
    for command in (["bash", "-n"], ["shellcheck", "--severity=style"], ["sbatch", "--test-only"]):
        line = [*command, str(script)]
        done = subprocess.run(line, capture_output=True, text=True, env=cluster.environment(), timeout=60)
        assert done.returncode == 0, f"{' '.join(line)}\n{done.stdout}{done.stderr}\n{script.read_text()}"
    return done.stderr
