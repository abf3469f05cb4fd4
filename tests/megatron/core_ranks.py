"""Start scripts of this folder that use Megatron core, without torchrun and without their imports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from preloaded import Finished, Preloaded

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
MODULES = ("worker_core", "megatron.core.datasets.blended_megatron_dataset_builder")


@cache
def _preloaded() -> Preloaded:
    return Preloaded(MODULES, {**ENVIRONMENT, "PYTHONPATH": str(HERE)})


def run(
    script: str,
    *arguments: str,
    folder: Path,
    ranks: int = 1,
    extra: Mapping[str, str] | None = None,
    timeout_seconds: float = 240,
) -> Finished:
    """Run a script to its end."""
    environment = {**ENVIRONMENT, **(extra or {})}
    command = [str(HERE / script), *arguments]
    return _preloaded().run(command, folder, environment, ranks=ranks, timeout_seconds=timeout_seconds)
