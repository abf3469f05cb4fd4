"""Worker, one process: an engine for every recipe of ds_configs/, on its main path and on a branch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from harness import USED_LRS, arguments, engine_of, finish, update

from pathswitch.kernels.layouts import ShardTensors, StepScalars
from pathswitch.kernels.ops import OperatorKernels

_original_update = OperatorKernels.adamw


def _recording_update(kernels: OperatorKernels, shards: Sequence[ShardTensors], scalars: torch.Tensor) -> None:
    """Record what the kernels compute with, as the harness does with torch's AdamW."""
    USED_LRS.append(StepScalars.from_buffer_copy(scalars[shards[0].scalars].numpy().tobytes()).lr)
    _original_update(kernels, shards, scalars)


OperatorKernels.adamw = _recording_update  # type: ignore[method-assign]


def attempts(engine: Any, until_step: int) -> list[float]:
    """Return the LRs used up to a step; fp16 may skip attempts while its loss scale comes down."""
    used = []
    while engine.lr_scheduler.last_epoch < until_step:
        used += update(engine)
    return used


def main() -> None:
    """Train two updates of main, and two of branch v2 with the counter set to its fork step."""
    out = arguments()
    get_accelerator().is_fp16_supported = lambda: True
    record: dict[str, Any] = {}
    for recipe in sorted(Path().glob("*.json")):
        settings = json.loads(recipe.read_text())
        os.environ["PATHSWITCH_PATH"] = ""
        trunk = engine_of(settings)
        lrs = attempts(trunk, 2)
        os.environ["PATHSWITCH_PATH"] = "v2"
        branch = engine_of(settings)
        fork_step = branch.lr_scheduler.path.start_step
        branch.lr_scheduler.load_state_dict(trunk.lr_scheduler.state_dict() | {"step": fork_step})
        record[recipe.stem] = {"main": lrs, "v2": attempts(branch, fork_step + 2), "fork_step": fork_step}
        record[recipe.stem]["one_pass"] = "step" in vars(branch.optimizer)
    finish(record, out)


if __name__ == "__main__":
    main()
