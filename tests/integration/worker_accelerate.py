"""Worker: Accelerate and Hugging Face's Trainer with an optimizer and a scheduler of the user's, two processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from harness import USED_LRS, WIDTH, TinyModel, finish
from huggingface import SAVED, make_model, train
from tiny_plan import PLAN
from torch.optim.lr_scheduler import PathSwitchLR  # type: ignore[attr-defined]


def accelerate(folder: Path, accumulation: int) -> dict[str, Any]:
    """Train main with prepare(scheduler), save, and train the branch from the saved state."""
    record: dict[str, Any] = {}
    for path, batches in (("main", 4 * accumulation), ("v1", 4 * accumulation)):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        plain = TinyModel()
        optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3)
        data = torch.utils.data.DataLoader(torch.randn(4 * batches, WIDTH), batch_size=2)  # type: ignore[arg-type]
        scheduler = PathSwitchLR(optimizer, path=path, **PLAN)
        model, optimizer, data, prepared = accelerator.prepare(plain, optimizer, data, scheduler)
        if path != "main":
            accelerator.load_state(str(folder))
        USED_LRS.clear()
        for batch in data:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch))
                optimizer.step()
                prepared.step()
                optimizer.zero_grad()
        record[path] = {"used": list(USED_LRS), "counter": scheduler.last_epoch}
        accelerator.save_state(str(folder))
        accelerator.wait_for_everyone()
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
    return record


def trainer(folder: Path) -> dict[str, Any]:
    """Train main with optimizers=(optimizer, scheduler), then the branch from Trainer's own checkpoint."""
    record: dict[str, Any] = {}
    for path, steps, resume in (("main", 5, None), ("v1", 8, folder / "checkpoint-4")):
        model = make_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scheduler = PathSwitchLR(optimizer, path=path, **PLAN)
        record[path] = train(model, folder, steps, resume, optimizers=(optimizer, scheduler), use_cpu=True)
    return record


def main() -> None:
    """Run everything, one after the other."""
    out = Path(os.environ["OUT"])
    record = {f"accelerate_{n}": accelerate(out / f"accelerate_{n}", n) for n in (1, 2)}
    record["trainer"] = trainer(out / f"trainer_{SAVED}")
    finish(record, out)


if __name__ == "__main__":
    main()
