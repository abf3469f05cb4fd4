"""Worker: checkpoints of PathSwitchAdamW: resume behind a kill, other ranks, other optimizers, a fork's policy.

Arguments: folder, then ``first`` (the last rank is killed at the end), ``resumed``, or, on one rank, ``alone``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from adamw_jobs import ONE_PASS, OURS, STOCK, bits, engine, optimizer_of, train
from harness import arguments, barrier, finish
from tiny_plan import PLAN
from worker_one_pass import FP32_SUMS, Warnings

from pathswitch.checkpoint import Policy
from pathswitch.integrations.hyperparameters import apply_policy

SCHEDULER = {"scheduler": {"type": "PathSwitchLR", "params": PLAN | {"max_lr": 1e-2}}}
AVERAGE = {"average": 0.75}
RESUMED: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "0_fp32": (0, "fp32", OURS | AVERAGE, {}),
    "0_bf16": (0, "bf16", OURS | AVERAGE, {}),
    "1_fp32": (1, "fp32", ONE_PASS, {}),
    "1_bf16": (1, "bf16", ONE_PASS | AVERAGE, {"gradient_clipping": 0.3}),
    "1_bf16_fp32-sums": (1, "bf16", ONE_PASS | AVERAGE, FP32_SUMS | {"gradient_clipping": 0.3}),
    "2_bf16": (2, "bf16", ONE_PASS | AVERAGE, {"gradient_clipping": 0.3}),
    "3_bf16": (3, "bf16", OURS | AVERAGE, {"gradient_clipping": 0.3}),
    "3_fp32": (3, "fp32", OURS, {}),
}


def make(name: str, **keys: Any) -> Any:
    stage, dtype, optimizer, own = RESUMED[name]
    return engine(stage, dtype, optimizer, **(SCHEDULER | own | keys))


def first(out: Path) -> dict[str, Any]:
    """Save after three updates, and go on."""
    record = {}
    for name in RESUMED:
        job = make(name)
        train(job, 3)
        saved = bits(job)
        job.save_checkpoint(str(out / name))
        record[name] = train(job, 3) | {"saved": saved}
    return record


def resumed(out: Path) -> dict[str, Any]:
    """Load what the killed job has saved; and do what needs two ranks besides."""
    record: dict[str, Any] = {}
    for name in RESUMED:
        job = make(name)
        job.load_checkpoint(str(out / name))
        loaded = bits(job)
        record[name] = train(job, 3) | {"loaded": loaded}
    for stage in (0, 1, 2, 3):
        record[f"switched_{stage}"] = switched(out / f"switched_{stage}", stage)
        record[f"not_switched_{stage}"] = train(engine(stage, "fp32", STOCK, **SCHEDULER), 9)
    for name, optimizer in (("stock", STOCK), ("ours", OURS | AVERAGE), ("one_pass", ONE_PASS | AVERAGE)):
        record[f"policy_{name}"] = with_policy(out / f"policy_{name}", optimizer)
    return record


def switched(folder: Path, stage: int) -> dict[str, Any]:
    """Train by AdamW, by PathSwitchAdamW and by AdamW again, each from the checkpoint of the one before."""
    losses: list[float] = []
    for step, optimizer in enumerate((STOCK, ONE_PASS, STOCK)):
        job = engine(stage, "fp32", optimizer, **SCHEDULER)
        if step > 0:
            job.load_checkpoint(str(folder))
        losses += train(job, 3)["losses"]
        job.save_checkpoint(str(folder))
        barrier()
    return {"losses": losses}


def with_policy(folder: Path, optimizer: dict[str, Any]) -> dict[str, Any]:
    """Train behind a fork that changes everything that a fork can change."""
    job = engine(1, "fp32", optimizer, gradient_clipping=1e6, **SCHEDULER)
    train(job, 3)
    job.save_checkpoint(str(folder))
    job = engine(1, "fp32", optimizer, gradient_clipping=1e6, **SCHEDULER)
    job.load_checkpoint(str(folder))
    inner = optimizer_of(job)
    means = [state["average"].clone() for state in inner.state.values() if "average" in state]
    policy = Policy(reset_moments=True, beta2=0.8, weight_decay=0.5, gradient_clipping=0.3)
    apply_policy(job, inner, policy, at_fork=True)
    states = list(inner.state.values())
    facts = {
        "moments": sum(float(state[name].abs().sum()) for state in states for name in ("exp_avg", "exp_avg_sq")),
        "steps": [float(state["step"]) for state in states],
        "means_kept": all(torch.equal(s["average"], mean) for s, mean in zip(states, means, strict=False)),
        "means": len(means),
    }
    return train(job, 3) | facts | {"steps_then": [float(state["step"]) for state in inner.state.values()]}


def alone(out: Path) -> dict[str, Any]:
    """Go on with one rank, which accumulates the micro-batches of two."""
    record: dict[str, Any] = {}
    warnings = Warnings()
    for name in ("2_bf16", "3_fp32"):
        job = make(name, gradient_accumulation_steps=2)
        job.load_checkpoint(str(out / name))
        record[name] = train(job, 3) | {"warnings": warnings.taken()}
    return record


def main() -> None:
    """Run one part."""
    out = arguments()
    part = {"first": first, "resumed": resumed, "alone": alone}[sys.argv[2]]
    record = part(out)
    if sys.argv[2] == "first":
        (out / f"first{os.environ['RANK']}.json").write_text(json.dumps(record))
        barrier()
        job = make("1_fp32")
        job.load_checkpoint(str(out / "1_fp32"))
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        train(job, 3)
    (out / sys.argv[2]).mkdir(exist_ok=True)
    finish(record, out / sys.argv[2])


if __name__ == "__main__":
    main()
