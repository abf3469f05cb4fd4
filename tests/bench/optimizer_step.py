"""ms per optimizer step on the CPU: PathSwitchAdamW's kernels against torch's, DeepSpeed's, and the memory's speed.

All cases of a size work on the same tensors and take turns, so that the machine's moods meet all of them; medians. The
copy is the floor: what moves the fewest bytes at its speed cannot be faster.

Run: python tests/bench/optimizer_step.py [--rounds 9] [--millions 50 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from rich.console import Console
from rich.table import Table
from torch import Tensor

from pathswitch.kernels.layouts import SCALARS_BYTES, ShardTensors, StepScalars, struct_bytes
from pathswitch.kernels.ops import OperatorKernels

SETTINGS: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SCALARS = struct_bytes(StepScalars(1e-4, 0.9, 0.9, 0.1, 0.95, 0.05, 1e-8, 1e-5, 1e-4, 1.1, 0.01))


class State:
    """One flat shard of ``numel`` parameters, as ZeRO has it, with gradients of one type."""

    def __init__(self, numel: int, grad: torch.dtype) -> None:
        self.weight, self.exp_avg, self.exp_avg_sq = torch.randn(numel), torch.zeros(numel), torch.full((numel,), 1e-4)
        self.average = self.weight.clone()
        self.grad = torch.randn(numel).to(grad)
        self.grad_32 = torch.randn(numel)
        self.low = self.weight.bfloat16()
        self.grad_64, self.cast = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel)
        self.kernels = OperatorKernels()
        self.scalars = SCALARS.view(1, SCALARS_BYTES)
        self.torch_adamw = self._peer(torch.optim.AdamW, fused=True)
        self.deepspeed_adam = self._peer(DeepSpeedCPUAdam)

    def _peer(self, kind: Any, **options: Any) -> torch.optim.Optimizer:
        parameter = torch.nn.Parameter(self.weight)
        optimizer: torch.optim.Optimizer = kind([parameter], **SETTINGS, **options)
        parameter.grad = torch.zeros_like(self.weight)
        optimizer.step()
        optimizer.state[parameter].update(exp_avg=self.exp_avg, exp_avg_sq=self.exp_avg_sq)
        parameter.grad = self.grad_32
        return optimizer

    def update(self, grad: Tensor, *, low: bool = False, average: bool = False) -> None:
        out, running = self.low if low else None, self.average if average else None
        shard = ShardTensors(grad, self.weight, self.exp_avg, self.exp_avg_sq, out, running, 0)
        self.kernels.adamw([shard], self.scalars)

    def ours(self, *, average: bool = False) -> None:
        """The norm and one pass over gradient, state and the model's weights."""
        self.kernels.norm([self.grad], torch.zeros(1, dtype=torch.float64))
        self.update(self.grad, low=True, average=average)

    def deepspeed(self, *, average: bool = False) -> None:
        """What DeepSpeed's ZeRO 1 and 2 do to a flat shard: norm in float64, cast, scale, Adam, copy.

        Its temporary tensors are there already here; DeepSpeed allocates them in each step.
        """
        norm = torch.linalg.vector_norm(self.grad_64.copy_(self.grad))
        self.cast.copy_(self.grad).mul_(1.0 / max(1.0, float(norm)))
        parameter = self.deepspeed_adam.param_groups[0]["params"][0]
        parameter.grad = self.cast
        self.deepspeed_adam.step()
        parameter.grad = self.grad_32
        self.low.copy_(self.weight)
        if average:
            self.average.lerp_(self.weight, 0.01)


def cases(state: State) -> dict[str, Callable[[], Any]]:
    """The cases by name; each works on all elements once."""
    total = torch.zeros(1, dtype=torch.float64)
    digest = torch.zeros(2, dtype=torch.int64)
    result: dict[str, Callable[[], Any]] = {
        "copy": lambda: state.grad_32.copy_(state.weight),
        "read (torch sum)": lambda: state.weight.sum(),
        "norm": lambda: state.kernels.norm([state.grad], total),
        "digest": lambda: state.kernels.digest(state.weight, 0, digest),
        "update, float32 gradients": lambda: state.update(state.grad_32),
        "torch AdamW(fused)": state.torch_adamw.step,
        "DeepSpeedCPUAdam": state.deepspeed_adam.step,
        "norm + update": state.ours,
        "DeepSpeed's sequence": state.deepspeed,
        "norm + update + average": lambda: state.ours(average=True),
        "DeepSpeed's sequence + average": lambda: state.deepspeed(average=True),
    }
    return result


PEERS = {
    "torch AdamW(fused)": "update, float32 gradients",
    "DeepSpeedCPUAdam": "update, float32 gradients",
    "DeepSpeed's sequence": "norm + update",
    "DeepSpeed's sequence + average": "norm + update + average",
}
READ_BYTES = {"copy": 8, "read (torch sum)": 4, "digest": 4}


def measure(numel: int, grad: torch.dtype, rounds: int) -> dict[str, float]:
    """Return the median ms of each case."""
    with torch.no_grad():
        todo = cases(State(numel, grad))
        times: dict[str, list[float]] = {name: [] for name in todo}
        for turn in range(rounds + 1):
            for name, run in todo.items():
                started = time.perf_counter()
                run()
                if turn:  # the first one warms up
                    times[name].append(1000 * (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in times.items()}


def show(numel: int, grad: torch.dtype, medians: dict[str, float]) -> None:
    """Print one table."""
    console = Console()
    table = Table(title=f"{numel // 10**6}M parameters, {str(grad).removeprefix('torch.')} gradients")
    for column in ("", "ms", "GB/s", "times ours"):
        table.add_column(column, justify="left" if not column else "right")
    sizes = {**READ_BYTES, "norm": grad.itemsize, "update, float32 gradients": 28}
    for name in ("torch AdamW(fused)", "DeepSpeedCPUAdam"):
        sizes[name] = 28
    sizes |= {"norm + update": 26 + 2 * grad.itemsize, "norm + update + average": 34 + 2 * grad.itemsize}
    for name, ms in medians.items():
        speed = f"{sizes[name] * numel / ms / 1e6:.1f}" if name in sizes else ""
        ratio = f"{ms / medians[PEERS[name]]:.2f}" if name in PEERS else ""
        table.add_row(name, f"{ms:.1f}", speed, ratio)
    console.print(table)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--millions", type=int, nargs="+", default=[50, 200])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = []
    for millions in arguments.millions:
        for grad in (torch.float32, torch.bfloat16):
            medians = measure(millions * 10**6, grad, arguments.rounds)
            show(millions * 10**6, grad, medians)
            results.append({"millions": millions, "gradients": str(grad), "ms": medians})
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
