"""Worker: Hugging Face's Trainer with a ds_config that names PathSwitchLR, on the ranks of the deepspeed launcher."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from harness import finish
from huggingface import make_model, train
from tiny_plan import PLAN


def ds_config(stage: int) -> dict[str, Any]:
    """Return a ds_config as Trainer's users write it, with its ``auto`` values."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "scheduler": {"type": "PathSwitchLR", "params": PLAN},
        "zero_optimization": {"stage": stage},
    }


def main() -> None:
    """Train main, and the branch from Trainer's own checkpoint, under ZeRO 2 and 3."""
    out = Path(os.environ["OUT"])
    record: dict[str, Any] = {}
    for stage in (2, 3):
        folder = out / f"stage_{stage}"
        for path, steps, resume in (("main", 5, None), ("v1", 8, folder / "checkpoint-4")):
            os.environ["PATHSWITCH_PATH"] = path
            record[f"{path}_{stage}"] = train(make_model, folder, steps, resume, deepspeed=ds_config(stage))
    finish(record, out)


if __name__ == "__main__":
    main()
