"""Worker: PathSwitchAdamW against torch's AdamW under ZeRO 0 to 3, and its step in one pass against DeepSpeed's."""

from __future__ import annotations

from typing import Any

import torch
from adamw_jobs import ONE_PASS, OPTIMIZERS, OURS, WIDTH, SplitModel, engine, train
from deepspeed.accelerator import get_accelerator
from harness import arguments, finish

STEPS = 20
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {},
    "fp16": {},
    "bf16_fp32-sums": {"data_types": {"grad_accum_dtype": "fp32"}},
}
# Padding between parameters, in an order of their own, reduced while the backward pass goes on.
ALIGNED = {"stage": 2, "parameter_alignment": True, "round_robin_gradients": True, "overlap_comm": True}


class AlignedModel(SplitModel):
    """Three layers, with padding between the biases that one rank updates."""

    def __init__(self) -> None:
        super().__init__()
        self.second = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, WIDTH))


def main() -> None:
    """Run everything in one process group."""
    out = arguments()
    get_accelerator().is_fp16_supported = lambda: True
    record: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        for dtype in ("fp32", "bf16", "fp16"):
            for name in ("stock", "ours"):
                record[f"{stage}_{dtype}_{name}"] = train(
                    engine(stage, dtype, OPTIMIZERS[name], gradient_clipping=0.3), STEPS
                )
    for stage, clips in ((1, (0.0, 0.3, 1e6)), (2, (0.3,))):
        for kind, keys in KINDS.items():
            for clip in clips if kind in ("fp32", "bf16") else (0.3,):
                for name, optimizer in (("ours", OURS), ("one_pass", ONE_PASS)):
                    job = engine(stage, kind.partition("_")[0], optimizer, gradient_clipping=clip, **keys)
                    facts = {"replaced": "step" in vars(job.optimizer), "wrapper": type(job.optimizer).__name__}
                    record[f"{stage}_{kind}_{clip}_{name}"] = train(job, 5) | facts
    for name, optimizer in OPTIMIZERS.items():
        job = engine(2, "fp32", optimizer, AlignedModel(), gradient_clipping=0.3, zero_optimization=ALIGNED)
        record[f"aligned_{name}"] = train(job, 5) | {"replaced": "step" in vars(job.optimizer)}
    finish(record, out)


if __name__ == "__main__":
    main()
