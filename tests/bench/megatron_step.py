"""Measure what the Megatron hooks cost each iteration: ``python tests/bench/megatron_step.py``.

Prints the time of Megatron core's own scheduler.step() and of ours with the write before each update, alternating in
one process, and the time that the wrapped function calls add.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pathswitch.config import plan_from_params
from pathswitch_megatron.batches import constant_batches
from pathswitch_megatron.scheduler import follow_plan
from pathswitch_megatron.upstream import Function, Upstream, patch

ROUNDS, CALLS, BATCH, MAX_LR = 15, 5_000, 1024, 3e-4
SECONDS_PER_ITERATION = 1.0


def stock(groups: int) -> Any:
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0, "max_lr": MAX_LR, "min_lr": 0.0} for _ in range(groups)])
    steps = 10_000_000 * BATCH
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=MAX_LR,
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_steps=steps,
        lr_decay_style="WSD",
        start_wd=0.1,
        end_wd=0.1,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=steps // 2,
        lr_wsd_decay_style="cosine",
    )


def ours(groups: int) -> Any:
    scheduler = stock(groups)
    plan = plan_from_params({"max_lr": MAX_LR, "versions": [{"name": "v1", "steps": 10_000_000}]})
    follow_plan(scheduler, plan, plan.path("main"), constant_batches(BATCH))
    return scheduler


def microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def wrapped_call() -> float:
    """Return the median time that a replaced function's call takes longer than the function's own."""
    module: Any = ModuleType("megatron.bench")
    module.train_step = own = lambda a, b, c, d, opt_param_scheduler, config: None
    sys.modules[module.__name__] = module
    target = Upstream("bench", "megatron.bench", "", (Function("megatron.bench", "train_step", ("config",)),))
    patch(target, {"train_step": lambda original, arguments: original()})
    replaced = module.train_step
    return statistics.median(
        microseconds(lambda: replaced(1, 2, 3, 4, 5, 6)) - microseconds(lambda: own(1, 2, 3, 4, 5, 6))
        for _ in range(ROUNDS)
    )


def main() -> None:
    total = 0.0
    for groups in (2, 8):
        first, second = stock(groups), ours(groups)

        def iteration(scheduler: Any = second) -> None:
            scheduler.before_update()
            scheduler.step(BATCH)

        times = [(microseconds(lambda s=first: s.step(BATCH)), microseconds(iteration)) for _ in range(ROUNDS)]
        theirs, own = (statistics.median(column) for column in zip(*times, strict=True))
        total = own - theirs
        print(f"{groups} param groups: stock {theirs:.1f} us, ours {own:.1f} us an iteration, ratio {own / theirs:.2f}")
    call = wrapped_call()
    print(f"a replaced function adds {call:.1f} us to a call; two of them are called in an iteration")
    share = (total + 2 * call) / (SECONDS_PER_ITERATION * 1e6)
    print(f"together {total + 2 * call:.0f} us: {share:.1e} of an iteration of {SECONDS_PER_ITERATION:g} s")


if __name__ == "__main__":
    main()
