"""Measure what PathSwitchLR costs: ``python tests/bench/scheduler_step.py``.

Prints step() against DeepSpeed's WarmupCosineLR in the same run, the hook before each update, one million evaluations
of every schedule, and our part of ``import torch``.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from deepspeed.runtime.lr_schedules import WarmupCosineLR

from pathswitch.integrations.scheduler import PathSwitchLR
from pathswitch.schedule import SHAPES, BranchPath, MainPath, make_shape

ROUNDS, CALLS = 15, 20_000
VERSIONS = [{"name": "v1", "steps": 10_000_000, "alpha": 0.6}]
IMPORT = "import time; t = time.perf_counter(); import torch; print(time.perf_counter() - t)"


def _optimizer(groups: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW([{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)], lr=1e-3)


def _microseconds(call: Callable[[], object], calls: int = CALLS) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls * 1e6


def _on_branch(groups: int) -> PathSwitchLR:
    """Return a scheduler in the middle of a cosine branch, the dearest place of a path."""
    optimizer = _optimizer(groups)
    main = PathSwitchLR(optimizer, max_lr=1e-3, versions=VERSIONS)
    state = main.state_dict() | {"step": 4_000_000}
    scheduler = PathSwitchLR(optimizer, max_lr=1e-3, versions=VERSIONS, path="v1")
    scheduler.load_state_dict(state)
    return scheduler


def compare_steps(groups: int) -> None:
    """Print the median cost of one step() of both schedulers, rounds interleaved, and of the hook."""
    ours, stock = _on_branch(groups), WarmupCosineLR(_optimizer(groups), 10_000_000, warmup_num_steps=1)

    def step() -> None:
        ours._updated_since_step = True  # what the hook sets: without an update in between step() does nothing
        ours.step()

    pairs = [(_microseconds(step), _microseconds(stock.step)) for _ in range(ROUNDS)]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    hook = statistics.median(_microseconds(lambda: ours._before_update(ours.optimizer, (), {})) for _ in range(ROUNDS))
    print(
        f"{groups} group(s): PathSwitchLR.step {mine:.2f} us, WarmupCosineLR.step {theirs:.2f} us, "
        f"ratio {mine / theirs:.2f}; hook before an update {hook:.2f} us"
    )


def evaluate_schedules(steps: int = 1_000_000) -> None:
    """Print the time of ``steps`` evaluations of every schedule in a plain loop."""
    main = MainPath(max_lr=1e-3, warmup_steps=100)
    schedules = {"main": main.schedule()}
    for name in SHAPES:
        shape = make_shape(name, {})
        final_lr = shape.resolve_final_lr(1e-3, 1e-4 if name == "harmonic" else None, "bench")
        schedules[name] = BranchPath(main, 100, steps, shape, final_lr).schedule()
    for name, schedule in schedules.items():
        start = time.perf_counter()
        for step in range(100, 100 + steps):
            schedule(step)
        print(f"{steps} evaluations of {name}: {time.perf_counter() - start:.3f} s")


def import_cost(rounds: int = 5) -> None:
    """Print the median time of ``import torch`` with and without PyTorch's loading of entry points."""
    seconds: dict[str, list[float]] = {"1": [], "0": []}
    for _ in range(rounds):
        for autoload, times in seconds.items():
            environment = os.environ | {"TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
            output = subprocess.run([sys.executable, "-c", IMPORT], env=environment, capture_output=True, check=True)
            times.append(float(output.stdout))
    with_us, without = statistics.median(seconds["1"]), statistics.median(seconds["0"])
    print(f"import torch: {with_us:.3f} s with entry points, {without:.3f} s without: {with_us - without:+.3f} s")


if __name__ == "__main__":
    for group_count in (1, 8):
        compare_steps(group_count)
    evaluate_schedules()
    import_cost()
