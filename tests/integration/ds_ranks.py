"""Start a worker script of this folder on several ranks without DeepSpeed's launcher and without their imports."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import ds_job
from preloaded import Finished, Preloaded

# What every engine with torch's Adam imports sooner or later.
MODULES = (
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "torch._dynamo",
    "pathswitch.checkpoint",
    "pathswitch.config",
)


@cache
def _preloaded() -> Preloaded:
    return Preloaded(MODULES, ds_job.environment())


def run(
    script: str,
    *arguments: str,
    folder: Path,
    ranks: int = 2,
    extra: Mapping[str, str] | None = None,
    timeout_seconds: float = 300,
) -> Finished:
    """Run a script, or with ``-m`` a module, to its end."""
    command = [script if script == "-m" else str(ds_job.HERE / script), *arguments]
    return _preloaded().run(command, folder, ds_job.environment(extra), ranks=ranks, timeout_seconds=timeout_seconds)
