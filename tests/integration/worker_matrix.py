"""Worker: ZeRO stages and dtypes, forks, resumes, param groups, overflows, accumulation, universal checkpoints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from harness import arguments, barrier, config, counters, engine_of, finish, refused, update, updates

from pathswitch.checkpoint import read_manifest
from pathswitch.integrations.state_digest import state_digest

CPT = {"paradigm": "cpt_rewarm"}


def weights(engine: Any) -> list[torch.Tensor]:
    """Return copies of the weights; under ZeRO 3 this rank's partitions, as parameters come and go there."""
    partitions = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    return [weight.detach().clone() for weight in partitions or engine.module.parameters()]


def digest_of(engine: Any) -> dict[str, Any]:
    """Return the digest of an engine's optimizer state."""
    return {stream: digest.model_dump() for stream, digest in (state_digest(engine) or {}).items()}


def saved_digest(folder: Path) -> Any:
    """Return what a checkpoint's manifest says of the optimizer state."""
    return read_manifest(folder).model_dump()["state_digest"]


def main_fork_resume(folder: Path, stage: int, dtype: str) -> dict[str, Any]:
    """Main path with a resume, the branch from its fork step with a resume, and one update too many."""
    record: dict[str, Any] = {}
    main = engine_of(config(stage, dtype))
    record["initial_digest"] = digest_of(main)
    record["main"] = updates(main, 4)
    main.save_checkpoint(folder / "main")
    record["saved_digest"] = saved_digest(folder / "main" / "global_step4")
    record["main"] += updates(main, 2)
    main.save_checkpoint(folder / "main")
    record["main_counters"] = counters(main)
    main = engine_of(config(stage, dtype))
    main.load_checkpoint(folder / "main")
    record["main"] += updates(main, 6)

    branch = engine_of(config(stage, dtype, path="v1"))
    branch.load_checkpoint(folder / "main", tag="global_step4")
    record["forked_digest"] = digest_of(branch)
    record["v1"] = updates(branch, 2)
    branch.save_checkpoint(folder / "v1")
    branch = engine_of(config(stage, dtype, path="v1"))
    branch.load_checkpoint(folder / "v1")
    record["lr_after_load"] = branch.get_lr()
    record["v1"] += updates(branch, 2)
    record["v1_counters"] = counters(branch)
    before = weights(branch)
    record["past_end"] = refused(lambda: update(branch))
    record["past_end_changed"] = not all(map(torch.equal, before, weights(branch)))
    return record


def param_groups(folder: Path, stage: int) -> dict[str, Any]:
    """Three param groups over a fork and a resume; ZeRO 1 and 2 narrow the optimizer to one group in a step."""
    main = engine_of(config(stage), groups=True)
    record = {"main": updates(main, 4)}
    main.save_checkpoint(folder)
    branch = engine_of(config(stage, path="v1"), groups=True)
    branch.load_checkpoint(folder)
    record["v1"] = updates(branch, 4)
    return record


def overflow(folder: Path, stage: int) -> dict[str, Any]:
    """fp16 with a loss scale that overflows in the first attempts and again after a resume."""
    # DeepSpeed refuses fp16 on CPUs without fp16 instructions; torch computes it there all the same.
    get_accelerator().is_fp16_supported = lambda: True
    settings = config(stage)
    settings["fp16"] = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 1000}
    main = engine_of(settings)
    attempts = []
    while not attempts or main.lr_scheduler.last_epoch < 3:
        attempts.append(update(main))
    record: dict[str, Any] = {"main": attempts, "counters": counters(main), "skipped": main.skipped_steps}
    main.save_checkpoint(folder)
    record["saved_digest"] = saved_digest(next(folder.glob("global_step*")))
    main = engine_of(settings)
    main.load_checkpoint(folder)
    record["after_load"] = counters(main)
    record["loaded_digest"] = digest_of(main)
    record["resumed"] = updates(main, 2)
    return record


def accumulation() -> dict[str, Any]:
    """Two micro steps an update."""
    engine = engine_of(config(1, gas=2))
    return {"main": updates(engine, 5), "counters": counters(engine), "micro_steps": engine.micro_steps}


def without_hooks(engine: Any) -> None:
    """Make PathSwitchLR a scheduler that only acts in step(), like every other."""
    for handle in engine.lr_scheduler.optimizer._pathswitch_hooks:
        handle.remove()

    def only_count(*_: Any) -> None:
        engine.lr_scheduler._updated_since_step = True

    engine.lr_scheduler.optimizer.register_step_pre_hook(only_count)


def parents_lr(folder: Path, stage: int, groups: bool) -> dict[str, Any]:
    """Re-warmed continual pre-training: the parent ends at LR 0, the child begins at its warm-up."""
    record: dict[str, Any] = {}
    first = engine_of(config(stage, path="v1", **CPT), groups=groups)
    updates(first, 8)
    first.save_checkpoint(folder)
    for name, sabotage in (("right", False), ("control", True)):
        second = engine_of(config(stage, path="v2", **CPT), groups=groups)
        if sabotage:
            without_hooks(second)
        second.load_checkpoint(folder)
        record[name] = updates(second, 3)
    return record


def universal(folder: Path, stage: int, groups: bool) -> dict[str, Any]:
    """The same through a universal checkpoint, where the optimizer's load_state_dict is never called."""
    if torch.distributed.get_rank() == 0:
        converter = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        folders = ["--input_folder", str(folder / "global_step8"), "--output_folder", str(folder / "universal")]
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        subprocess.run([*converter, *folders, *workers], check=True, capture_output=True)
    barrier()
    record: dict[str, Any] = {}
    for name, sabotage in (("right", False), ("control", True)):
        settings = config(stage, path="v2", **CPT) | {"checkpoint": {"load_universal": True}}
        second = engine_of(settings, groups=groups)
        if sabotage:
            without_hooks(second)
        second.load_checkpoint(folder)
        record[name] = updates(second, 3)
    return record


def main() -> None:
    """Run everything in one process group."""
    out = arguments()
    record: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        for dtype in ("fp32", "bf16"):
            record[f"matrix_{stage}_{dtype}"] = main_fork_resume(out / f"matrix_{stage}_{dtype}", stage, dtype)
    for stage in (0, 1, 2, 3):
        record[f"groups_{stage}"] = param_groups(out / f"groups_{stage}", stage)
        record[f"parent_{stage}"] = parents_lr(out / f"parent_{stage}", stage, groups=False)
    for stage in (1, 3):
        record[f"universal_{stage}"] = universal(out / f"parent_{stage}", stage, groups=False)
        parents_lr(out / f"parent_groups_{stage}", stage, groups=True)
        record[f"universal_groups_{stage}"] = universal(out / f"parent_groups_{stage}", stage, groups=True)
    for stage in (1, 2):
        record[f"overflow_{stage}"] = overflow(out / f"overflow_{stage}", stage)
    record["accumulation"] = accumulation()
    finish(record, out)


if __name__ == "__main__":
    main()
