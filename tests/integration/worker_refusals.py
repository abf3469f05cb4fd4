"""Worker: what PathSwitchLR refuses under DeepSpeed, what it accepts, and what is logged; every rank for itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import arguments, barrier, config, counters, engine_of, finish, refused, update, updates
from tiny_plan import PLAN

from pathswitch.config import plan_from_params
from pathswitch.integrations.adopt import adopt_checkpoint

Record = dict[str, Any]
V1, V2 = PLAN["versions"]
UNVERIFIED = {"pathswitch": {"checkpoint": {"verify": "off"}}}
WARMUP_LR = {"type": "WarmupLR", "params": {"warmup_max_lr": 5e-4, "warmup_num_steps": 2}}

BAD_PARAMETERS: dict[str, Record] = {
    "unknown key": {"max_lrr": 1e-3},
    "alpha": {"versions": [V1 | {"alpha": 1.5}]},
    "path": {"path": "v9"},
    "path type": {"path": 3},
    "paradigm": {"paradigm": "cpt"},
    "NaN": {"max_lr": float("nan")},
    "missing plan": {"plan": "nowhere.toml"},
    "plan and inline": {"plan": "nowhere.toml", "max_lr": 1e-3},
    "initial_step": {"initial_step": -1},
}


def on_rank0(action: Callable[[], Any]) -> None:
    """Change files once, while the other rank waits."""
    barrier()
    if torch.distributed.get_rank() == 0:
        action()
    barrier()


def loads(load_dir: Path, *args: Any, settings: Record | None = None, **kwargs: Any) -> str:
    """Load in a fresh engine of branch v1 (or of ``settings``) and run an update; return how that was refused."""
    engine = engine_of(config(path="v1") if settings is None else settings)

    def load_and_train() -> None:
        engine.load_checkpoint(load_dir, *args, **kwargs)
        update(engine)

    return refused(load_and_train)


def trained(folder: Path, steps: int, settings: Record) -> Any:
    engine = engine_of(settings)
    updates(engine, steps)
    engine.save_checkpoint(folder)
    return engine


def latest_file(out: Path) -> Record:
    """``latest`` missing or empty, with and without checkpoints beside it."""
    record: Record = {}
    folder, empty = out / "latest_case", out / "empty"
    main = trained(folder, 4, config())
    on_rank0((folder / "latest").unlink)
    record["missing beside one, branch"] = loads(folder)
    record["missing beside one, main"] = loads(folder, settings=config())
    record["missing beside another's, branch"] = loads(folder, settings=config(path="v2"))
    main.save_checkpoint(folder, tag="again")
    on_rank0(lambda: (folder / "latest").write_text(""))
    record["empty, branch"] = loads(folder)
    record["empty, main"] = loads(folder, settings=config())
    on_rank0((folder / "latest").unlink)
    record["missing, branch"] = loads(folder)
    record["missing, main"] = loads(folder, settings=config())
    record["by tag"] = loads(folder, "global_step4")
    on_rank0(empty.mkdir)
    record["no checkpoint, branch"] = loads(empty)
    record["no checkpoint, main"] = loads(empty, settings=config())
    record["no folder, main"] = loads(out / "never made", settings=config())
    on_rank0(lambda: (empty / "latest").write_text("\n"))
    record["empty without checkpoints, main"] = loads(empty, settings=config())
    return record


def partial_loads(main: Path) -> Record:
    """Loading everything but the scheduler's state, or nothing."""
    never, loading = engine_of(config(path="v1")), engine_of(config(path="v1"))
    return {
        "module only, load": refused(lambda: loading.load_checkpoint(main, tag="global_step4", load_module_only=True)),
        "never loaded": refused(lambda: update(never)),
        "without scheduler states": loads(main, "global_step4", load_lr_scheduler_states=False),
        "module only": loads(main, "global_step4", load_module_only=True),
        "positional": loads(main, "global_step4", True, True, False),
        "all": loads(main, "global_step4", True),
        "module only, main": loads(main, "global_step4", settings=config(), load_module_only=True),
    }


def other_checkpoints(out: Path, main: Path) -> Record:
    """Checkpoints of other schedulers, other steps, other paths, other schedules."""
    plain = config()
    del plain["scheduler"]
    trained(out / "plain", 4, plain)
    trained(out / "warmup", 4, config() | {"scheduler": WARMUP_LR})
    branch = engine_of(config(path="v1"))
    branch.load_checkpoint(main, tag="global_step4")
    updates(branch, 2)
    branch.save_checkpoint(out / "v1")

    on_rank0(partial(shutil.copytree, out / "warmup", out / "adopted"))
    plan = plan_from_params(PLAN)
    on_rank0(partial(adopt_checkpoint, out / "adopted" / "global_step4", step=4, path="main", plan=plan, key=None))

    def main_with(**changes: Any) -> str:
        return loads(main, "global_step4", settings=config(**changes))

    def branch_with(**changes: Any) -> str:
        versions = [V1 | changes.pop("v1", {}), V2, *changes.pop("more", [])]
        return loads(out / "v1", settings=config(path="v1", versions=versions, **changes))

    v3 = {"name": "v3", "steps": 9}
    return {
        "not committed": loads(out / "warmup"),
        "adopted, initial_step": loads(out / "adopted", settings=config(path="v1", initial_step=4)),
        "no state": loads(out / "plain", settings=config(path="v1") | UNVERIFIED),
        "foreign state": loads(out / "warmup", settings=config(path="v1") | UNVERIFIED),
        "no state, initial_step": loads(out / "plain", settings=config(path="v1", initial_step=4) | UNVERIFIED),
        "foreign state, initial_step": loads(out / "warmup", settings=config(path="v1", initial_step=4) | UNVERIFIED),
        "not at the fork step": loads(main, "global_step6"),
        "another branch": loads(out / "v1", settings=config(path="v2")),
        "a branch on main": loads(out / "v1", settings=config()),
        "max_lr": main_with(max_lr=2e-3),
        "max_lr, fork": main_with(max_lr=2e-3, path="v1"),
        "warmup_steps": main_with(warmup_steps=3, init_lr=0.0),
        "shape": branch_with(v1={"shape": "knee"}),
        "alpha": branch_with(v1={"alpha": 0.75}),
        "extended, main": main_with(versions=[V1, V2, v3]),
        "extended, branch": branch_with(more=[v3]),
        "same branch": branch_with(),
    }


def foreign_parents_lr(out: Path) -> Record:
    """The LR of the first branch updates behind a main path that WarmupLR trained at another LR."""
    branch = engine_of(config(path="v1", initial_step=4) | UNVERIFIED)
    branch.load_checkpoint(out / "warmup")
    return {"lrs": updates(branch, 4)}


def type_error() -> Record:
    """DeepSpeed answers a TypeError from step() with step(train_batch_size)."""
    engine = engine_of(config(stage=0))
    updates(engine, 2)

    def cannot_write(*_: Any) -> None:
        raise TypeError("this group's lr is not a number")

    def break_scheduler(*_: Any) -> None:
        engine.lr_scheduler._write = cannot_write

    engine.lr_scheduler.optimizer.register_step_post_hook(break_scheduler)
    error = refused(lambda: update(engine))
    return {"error": error, "counter": engine.lr_scheduler.last_epoch}


def monitors(out: Path) -> Record:
    """DeepSpeed's own logs, for PathSwitchLR and for a stock scheduler in the same, patched, process."""
    record: Record = {}
    for name, scheduler in (("ours", config()["scheduler"]), ("stock", WARMUP_LR)):
        settings = config() | {"scheduler": scheduler}
        for monitor in ("csv_monitor", "tensorboard"):
            settings[monitor] = {"enabled": True, "output_path": str(out / monitor), "job_name": name}
        engine = engine_of(settings)
        used, shown, in_groups = [], [], []
        for _ in range(4):
            used.append(update(engine)[0])
            shown.append(engine.get_lr()[0])
            in_groups.append(float(engine.optimizer.param_groups[0]["lr"]))
        batch = engine.train_batch_size()
        record[name] = {"used": used, "get_lr": shown, "in_groups": in_groups, "train_batch_size": batch}
    return record


def main() -> None:
    """Run everything in one process group."""
    out = arguments()
    trunk = trained(out / "main", 4, config())
    updates(trunk, 2)
    trunk.save_checkpoint(out / "main")
    record: Record = {"counters": counters(trunk)}
    record["latest"] = latest_file(out)
    record["partial"] = partial_loads(out / "main")
    record["other"] = other_checkpoints(out, out / "main")
    record["foreign_parent"] = foreign_parents_lr(out)
    record["type_error"] = type_error()
    record["monitor"] = monitors(out)
    record["bad"] = {}
    for name, parameters in BAD_PARAMETERS.items():
        settings = config()
        inline = {} if "plan" in parameters else settings["scheduler"]["params"]
        settings["scheduler"]["params"] = inline | parameters
        record["bad"][name] = refused(lambda settings=settings: engine_of(settings))  # type: ignore[misc]
    finish(record, out)


if __name__ == "__main__":
    main()
