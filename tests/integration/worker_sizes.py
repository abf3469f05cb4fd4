"""Worker: one job of a given number of ranks saves its own checkpoints and loads those of other jobs.

--load=NAME,...   names of jobs whose checkpoints are loaded; --name=NAME: what this job's are called
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from harness import USED_LRS, WIDTH, TinyModel, arguments, config, engine_of, finish, refused
from worker_matrix import digest_of, saved_digest

SAMPLES, STEP = 8, 4
STAGES = (1, 2, 3)


def engine(stage: int, path: str = "main", **pathswitch: Any) -> Any:
    """Return an engine with two param groups, one without weight decay."""
    settings = config(stage, path=path)
    settings["train_micro_batch_size_per_gpu"] = SAMPLES // torch.distributed.get_world_size()
    settings["gradient_clipping"] = 0.5
    settings["pathswitch"] = {"checkpoint": pathswitch}
    model = TinyModel()
    matrices, biases = ([p for p in model.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": biases, "weight_decay": 0.0}]
    return deepspeed.initialize(model=model, model_parameters=groups, config=settings)[0]


def train(engine: Any, count: int) -> list[list[float]]:
    """Return the LR and the mean loss of updates on a batch that is a function of the step."""
    rows = []
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    for _ in range(count):
        USED_LRS.clear()
        generator = torch.Generator().manual_seed(engine.lr_scheduler.last_epoch)
        batch = torch.randn(SAMPLES, WIDTH, generator=generator).chunk(world)[rank]
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().double() / world
        torch.distributed.all_reduce(mean)
        rows.append([USED_LRS[-1], mean.item()])
    return rows


def state(engine: Any, scratch: Path) -> dict[str, Any]:
    """Return all weights and moments in full, put together from shards, and the optimizer's settings and counts."""
    engine.save_checkpoint(scratch, tag="now", save_latest=False)
    full: dict[str, Any] = full_state(scratch / "now") if torch.distributed.get_rank() == 0 else {}
    optimizer = engine.lr_scheduler.optimizer
    full["steps"] = sorted({int(states["step"]) for states in optimizer.state.values()})
    full["decays"] = [group["weight_decay"] for group in optimizer.param_groups]
    return full


def full_state(tag: Path) -> dict[str, list[float]]:
    """Return every parameter's fp32 value and its two moments, cut out of all ranks' flat partitions."""
    shards = [torch.load(path, weights_only=False) for path in sorted(tag.glob("*optim_states.pt"))]
    model = torch.load(min(tag.glob("*model_states.pt")), weights_only=False)
    states = [shard["optimizer_state_dict"] for shard in shards]
    full = {}
    for index, shapes in enumerate(model["param_shapes"]):
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            parts = [flat(state, index, key) for state in states]
            full |= {f"{name}/{key}": values for name, values in cut(parts, shapes, "fp32_flat_groups" in states[0])}
    return full


def flat(state: dict[str, Any], group: int, key: str) -> torch.Tensor:
    if "fp32_flat_groups" in state:  # ZeRO 3
        if key == "fp32":
            return state["fp32_flat_groups"][group]  # type: ignore[no-any-return]
        return state["optimizer_state_dict"]["state"][group][key]  # type: ignore[no-any-return]
    if key == "fp32":
        return state["single_partition_of_fp32_groups"][group]  # type: ignore[no-any-return]
    return state["base_optimizer_state"]["state"][group][key]  # type: ignore[no-any-return]


def cut(parts: list[torch.Tensor], shapes: dict[str, torch.Size], per_parameter: bool) -> Iterator[Any]:
    """Yield (name, values): ZeRO 3 cuts every parameter into equal parts, ZeRO 1 and 2 the whole group."""
    offset, whole = 0, torch.cat(parts)
    for name, shape in shapes.items():
        if per_parameter:
            size = -(-shape.numel() // len(parts))
            values = torch.cat([part[offset : offset + size] for part in parts])[: shape.numel()]
        else:
            size = shape.numel()
            values = whole[offset : offset + size]
        offset += size
        yield name, values.tolist()


def save(folder: Path, stage: int) -> dict[str, Any]:
    run = engine(stage)
    train(run, STEP)
    run.save_checkpoint(folder)
    scratch = folder.with_name(f"{folder.name}_saved")
    record = {"digest": saved_digest(folder / f"global_step{STEP}"), "state": state(run, scratch)}
    return record | {"rows": train(run, 4), "later": state(run, scratch)}


def load(folder: Path, stage: int) -> dict[str, Any]:
    """Go on with the main path, and fork: F is the step of the checkpoint."""
    run = engine(stage)
    loaded, _ = run.load_checkpoint(folder)
    scratch = folder.with_name(f"{folder.name}_loaded")
    record: dict[str, Any] = {"loaded": str(loaded), "digest": digest_of(run), "state": state(run, scratch)}
    record["rows"] = train(run, 4)
    record["later"] = state(run, scratch)
    if stage == 1:
        branch = engine(stage, path="v1")
        branch.load_checkpoint(folder, tag=f"global_step{STEP}")
        record["branch"] = train(branch, 4)
    record["left"] = sorted(path.name for path in folder.iterdir())
    return record


def convert_on_a_full_disk(folder: Path, disk: Path) -> dict[str, Any]:
    """Convert where there is no room, then where there is."""
    filler = disk / "filler"
    if torch.distributed.get_rank() == 0:
        filler.write_bytes(b"\0" * (shutil.disk_usage(disk).free - 8192))
    torch.distributed.barrier()
    error = refused(partial(engine(2, convert_folder=str(disk)).load_checkpoint, folder))
    torch.distributed.barrier()
    record: dict[str, Any] = {"error": error, "left": sorted(path.name for path in disk.iterdir())}
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        filler.unlink()
    torch.distributed.barrier()
    return record | {"again": refused(partial(engine(2, convert_folder=str(disk)).load_checkpoint, folder))}


def other_layouts(out: Path, name: str) -> dict[str, Any]:
    """Load a stage's checkpoint under every other stage, with the same and with another number of ranks."""
    record = {}
    for there, here in ((1, 2), (2, 1), (1, 3), (3, 1), (0, 1), (1, 0)):
        folder = out / name / f"stage{there}"
        if there == 0 and not folder.exists():
            continue
        run = engine(here)
        record[f"{there} to {here}"] = refused(partial(run.load_checkpoint, folder))
    return record


def main() -> None:
    """Save, then load what other jobs have saved."""
    out = arguments()
    flags = dict(argument.removeprefix("--").split("=", 1) for argument in sys.argv[1:] if argument.startswith("--"))
    name, others = flags["name"], [other for other in flags["load"].split(",") if other]
    record: dict[str, Any] = {"saved": {str(stage): save(out / name / f"stage{stage}", stage) for stage in STAGES}}
    stage0 = engine_of(config(0))
    stage0.save_checkpoint(out / name / "stage0")
    for other in others:
        record[other] = {str(stage): load(out / other / f"stage{stage}", stage) for stage in STAGES}
        record["layouts"] = other_layouts(out, other)
    if others:
        damaged = max((out / others[0] / "stage1" / "global_step4").glob("*optim_states.pt"))
        if torch.distributed.get_rank() == 0:
            damaged.write_bytes(damaged.read_bytes()[:-1])
        torch.distributed.barrier()
        if "FULL_DISK" in os.environ:
            record["full disk"] = convert_on_a_full_disk(out / others[0] / "stage2", Path(os.environ["FULL_DISK"]))
        record["damaged"] = refused(partial(engine(1).load_checkpoint, out / others[0] / "stage1"))
    (out / f"{name}_record").mkdir(exist_ok=True)
    finish(record, out / f"{name}_record")


if __name__ == "__main__":
    main()
