"""Worker: 40 updates in one go, or 20, a kill -9, and 20 more; every random number from the global generators.

--mode=whole      40 updates
--mode=killed     20 updates, a checkpoint, 3 updates that are lost with the process
--mode=resumed    20 updates from that checkpoint, and the branch's first ones
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from harness import USED_LRS, WIDTH, TinyModel, arguments, barrier, config, engine_of, finish
from worker_matrix import weights

FORK_STEP, END_STEP = 20, 40
# The knee's first 60 % are constant: until step 23 the branch does what the main path does.
PLAN: dict[str, Any] = {
    "warmup_steps": 4,
    "versions": [
        {"name": "v1", "steps": 25, "alpha": 0.2, "shape": "knee", "explore": 0.6},
        {"name": "v2", "steps": 99},
    ],
}


class DropoutModel(TinyModel):
    """The tiny model with dropout."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.dropout(inputs, 0.2))


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def engine(stage: int, dtype: str, path: str = "main") -> Any:
    model = DropoutModel()
    seed_all(100 + torch.distributed.get_rank())
    settings = config(stage, dtype, **(PLAN | {"path": path}))
    settings["gradient_clipping"] = 0.5
    return engine_of(settings, model=model, model_parameters=list(model.parameters()))


def train(engine: Any, count: int) -> list[list[float]]:
    """Return the LR, the loss and the sum of the inputs of each update."""
    rows = []
    dtype = next(engine.module.parameters()).dtype
    for _ in range(count):
        USED_LRS.clear()
        scale = random.random() + float(np.random.rand())
        inputs = (torch.randn(2, WIDTH) * scale).to(dtype)
        loss = engine(inputs)
        engine.backward(loss)
        engine.step()
        rows.append([USED_LRS[-1], loss.item(), inputs.double().sum().item()])
    return rows


def state(engine: Any) -> str:
    """Return a digest of this rank's weights and of all that the optimizer remembers."""
    hasher = blake3()
    remembered = [tensor for states in engine.lr_scheduler.optimizer.state.values() for tensor in states.values()]
    for tensor in [*weights(engine), *remembered]:
        hasher.update(torch.as_tensor(tensor).detach().float().numpy().tobytes())
    return hasher.hexdigest()


def whole(folder: Path, stage: int, dtype: str) -> dict[str, Any]:
    run = engine(stage, dtype)
    rows = train(run, FORK_STEP + 3)
    forked = state(run)
    rows += train(run, END_STEP - FORK_STEP - 3)
    return {"rows": rows, "state": state(run), "state after the fork": forked}


def killed(folder: Path, stage: int, dtype: str) -> dict[str, Any]:
    run = engine(stage, dtype)
    train(run, FORK_STEP)
    run.save_checkpoint(folder)
    train(run, 3)
    return {}


def resumed(folder: Path, stage: int, dtype: str) -> dict[str, Any]:
    run = engine(stage, dtype)
    seed_all(999)
    run.load_checkpoint(folder)
    rows = train(run, END_STEP - FORK_STEP)
    branch = engine(stage, dtype, path="v1")
    seed_all(998)
    branch.load_checkpoint(folder)
    return {"rows": rows, "state": state(run), "branch": train(branch, 3), "state after the fork": state(branch)}


def main() -> None:
    """Run one mode for every stage and dtype."""
    out = arguments()
    mode = next(argument for argument in sys.argv if argument.startswith("--mode=")).removeprefix("--mode=")
    act = {"whole": whole, "killed": killed, "resumed": resumed}[mode]
    record = {
        f"{stage} {dtype}": act(out / f"stage{stage}_{dtype}", stage, dtype)
        for stage in (0, 1, 2, 3)
        for dtype in ("fp32", "bf16")
    }
    if mode == "killed":
        barrier()
        os.kill(os.getpid(), signal.SIGKILL)
    (out / mode).mkdir(exist_ok=True)
    finish(record, out / mode)


if __name__ == "__main__":
    main()
