"""ms per ``engine.step()`` under ZeRO 1 and 2 on one rank: DeepSpeed's own step against the one in one pass.

The engines of a size are real ones that take turns; only their steps are timed: norm, clipping, update and the model's
weights. Medians, and how many times as long as one pass DeepSpeed's own step takes.

Run: python tests/bench/zero_step.py [--rounds 9] [--millions 50 200] [--stages 1 2] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from optimizer_step import SETTINGS
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from pathswitch.integrations.adamw import PathSwitchAdamW

TENSORS = 8
OURS = "PathSwitchAdamW, one_pass"
OPTIMIZERS: dict[str, Any] = {
    OURS: partial(PathSwitchAdamW, one_pass=True),
    "DeepSpeedCPUAdam": DeepSpeedCPUAdam,
    "torch AdamW(fused)": partial(torch.optim.AdamW, fused=True),
}


class Weights(nn.Module):
    """Nothing but parameters, whose gradients are the weights."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.tensors = nn.ParameterList(torch.randn(numel // TENSORS) for _ in range(TENSORS))

    def forward(self) -> Tensor:
        """Return half their squares' sum."""
        return torch.stack([tensor.square().sum() for tensor in self.tensors]).sum() / 2


def engine(numel: int, optimizer: str, stage: int, *, bf16: bool) -> Any:
    """Return an engine that clips and trains ``numel`` parameters."""
    model = Weights(numel)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
    }
    chosen = OPTIMIZERS[optimizer](model.parameters(), **SETTINGS)
    return deepspeed.initialize(model=model, optimizer=chosen, config=settings)[0]


def measure(numel: int, stage: int, rounds: int, *, bf16: bool) -> dict[str, float]:
    """Return the median ms of each engine's step."""
    engines = {name: engine(numel, name, stage, bf16=bf16) for name in OPTIMIZERS}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, one in engines.items():
            one.backward(one())
            started = time.perf_counter()
            one.step()
            if turn:  # the first one warms up
                times[name].append(1000 * (time.perf_counter() - started))
    for one in engines.values():
        one.destroy()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--millions", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    deepspeed.logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.init_distributed("gloo")
    table = Table(title="ms per engine.step(), norm and clipping included")
    for column in ("parameters", "ZeRO", "training in", *OPTIMIZERS, "times ours"):
        table.add_column(column, justify="right")
    results = []
    for millions in arguments.millions:
        for stage in arguments.stages:
            for bf16 in (False, True):
                medians = measure(millions * 10**6, stage, arguments.rounds, bf16=bf16)
                kind, ours = "bfloat16" if bf16 else "float32", medians[OURS]
                ratios = ", ".join(f"{ms / ours:.2f}" for name, ms in medians.items() if name != OURS)
                table.add_row(f"{millions}M", str(stage), kind, *(f"{ms:.1f}" for ms in medians.values()), ratios)
                results.append({"millions": millions, "stage": stage, "training_in": kind, "ms": medians})
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
