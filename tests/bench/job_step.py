"""Measure what a job's section costs a step: ``python tests/bench/job_step.py [RANKS]``.

Prints, on gloo, the time of one agreement of all ranks whether to stop, and of a whole step of a small model with and
without the section, in the same processes, rounds interleaved.
"""

from __future__ import annotations

import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROUNDS, STEPS, WIDTH = 15, 100, 8
PLAN = {"max_lr": 1e-3, "versions": [{"name": "v1", "steps": 10_000_000}]}


def _engine(section: dict[str, Any] | None) -> Any:
    import deepspeed
    import torch

    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "steps_per_print": 10_000_000,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "PathSwitchLR", "params": PLAN},
        "zero_optimization": {"stage": 1},
    }
    if section is not None:
        settings["pathswitch"] = {"job": section}
    model = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, 1))
    return deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)[0]


def _microseconds(action: Callable[[], object], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        action()
    return (time.perf_counter() - start) / count * 1e6


def measure() -> None:
    """Run as one rank."""
    import deepspeed
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    with tempfile.TemporaryDirectory() as folder:
        files = {"PATHSWITCH_STOP_FILE": f"{folder}/stop", "PATHSWITCH_PROGRESS_FILE": f"{folder}/progress.json"}
        os.environ.update(files)
        job, plain = _engine({"save_dir": f"{folder}/{{path}}"}), _engine(None)
        inputs = torch.ones(2, WIDTH)

        def step(engine: Any) -> None:
            engine.backward(engine(inputs).square().mean())
            engine.step()

        flags = torch.zeros(2, dtype=torch.int32)
        measured: dict[str, list[float]] = {"job": [], "plain": [], "agreement": [], "bare all-reduce": []}
        for _ in range(ROUNDS):
            measured["plain"].append(_microseconds(lambda: step(plain), STEPS))
            measured["job"].append(_microseconds(lambda: step(job), STEPS))
            measured["agreement"].append(_microseconds(job.pathswitch_job.control.agree, STEPS))
            measured["bare all-reduce"].append(_microseconds(lambda: torch.distributed.all_reduce(flags), STEPS))
        if torch.distributed.get_rank() == 0:
            for name, times in measured.items():
                print(f"{name}: {statistics.median(times):.0f} us", flush=True)
            more = statistics.median(a - b for a, b in zip(measured["job"], measured["plain"], strict=True))
            print(f"the section adds {more:.0f} us to a step", flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main() -> None:
    """Start the ranks."""
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            env={**os.environ, "OMP_NUM_THREADS": "1", **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    if any([process.wait() for process in processes]):
        sys.exit("a rank has failed")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    if "RANK" in os.environ:
        measure()
    else:
        main()
