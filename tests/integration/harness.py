"""For worker scripts: tiny engines, and the LR that torch's Adam computed each update with, recorded by itself.

The record does not come from PathSwitchLR or from the param groups: torch's functional ``adam`` is wrapped, and the
argument ``lr`` of every call that updates a tensor is what counts.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
from tiny_plan import PLAN

# DeepSpeed's all-reduce in shared memory takes a minute to compile, and its ranks wait for each other in a loop that
# keeps a core busy; the embedded trainer does without it as well.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

USED_LRS: list[float] = []
# torch.optim deletes the names of its submodules.
_adam_module = sys.modules["torch.optim.adam"]
_original_adam = _adam_module.adam
WIDTH = 8


def _recording_adam(params: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
    if params:
        USED_LRS.append(float(kwargs["lr"]))
    _original_adam(params, *args, **kwargs)


_adam_module.adam = _recording_adam


class TinyModel(torch.nn.Module):
    """Two layers and a mean square loss; three possible param groups."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss on inputs of shape (batch, WIDTH)."""
        outputs: torch.Tensor = self.second(torch.tanh(self.first(inputs)))
        return outputs.float().square().mean()


def config(stage: int = 1, dtype: str = "fp32", gas: int = 1, **scheduler: Any) -> dict[str, Any]:
    """Return a ds_config for 2 ranks with PathSwitchLR and the inline PLAN, overridden by ``scheduler``."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": gas,
        "steps_per_print": 1000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "PathSwitchLR", "params": PLAN | scheduler},
        "zero_optimization": {"stage": stage},
    }
    if dtype != "fp32":
        settings[dtype] = {"enabled": True}
    return settings


def three_groups(model: TinyModel) -> list[dict[str, Any]]:
    """Return param groups with the multiples 1, 0.1 and 3."""
    return [
        {"params": [model.first.weight], "lr": 1e-3},
        {"params": [model.second.weight], "lr": 1e-4},
        {"params": [model.first.bias, model.second.bias], "lr": 3e-3},
    ]


def engine_of(settings: dict[str, Any], groups: bool = False, **initialize: Any) -> Any:
    """Make an engine; DeepSpeed changes the dictionary it is given, so it gets a copy."""
    model = initialize.pop("model", None) or TinyModel()
    if groups:
        initialize["model_parameters"] = three_groups(model)
    else:
        initialize.setdefault("model_parameters", list(model.parameters()))
    return deepspeed.initialize(model=model, config=copy.deepcopy(settings), **initialize)[0]


def update(engine: Any) -> list[float]:
    """Run micro steps up to one attempted update and return the LRs it was computed with."""
    USED_LRS.clear()
    dtype = next(engine.module.parameters()).dtype
    for _ in range(engine.gradient_accumulation_steps()):
        generator = torch.Generator().manual_seed(engine.micro_steps)
        loss = engine(torch.randn(2, WIDTH, generator=generator).to(dtype))
        engine.backward(loss)
        engine.step()
    return list(USED_LRS)


def updates(engine: Any, count: int) -> list[list[float]]:
    return [update(engine) for _ in range(count)]


def counters(engine: Any) -> list[int]:
    """Return PathSwitchLR's counter and the engine's own count of updates that were not skipped."""
    return [engine.lr_scheduler.last_epoch, engine.global_steps - engine.skipped_steps]


def refused(action: Callable[[], Any]) -> str:
    """Return ``ErrorType: message`` of what the action raises, or an empty string."""
    try:
        action()
    except BaseException as error:  # bare AssertionErrors of DeepSpeed count too
        return f"{type(error).__name__}: {error}"
    return ""


def barrier() -> None:
    torch.distributed.barrier()


def finish(record: dict[str, Any], out: Path) -> None:
    """Write this rank's record and leave; the last thing that a worker does."""
    (out / f"rank{os.environ['RANK']}.json").write_text(json.dumps(record))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    # Threads of native libraries, of many engines and monitors here, may abort an interpreter that takes itself apart.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def arguments() -> Path:
    """Start the process group and return the folder that is the worker's only argument of its own."""
    deepspeed.init_distributed()
    return Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
