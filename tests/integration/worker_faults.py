"""Worker: every fault on every ZeRO stage, met by a fork, a resume and a release; each rank for itself."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import arguments, barrier, config, engine_of, finish, refused, updates
from worker_matrix import weights

from pathswitch.checkpoint import checkpoint_folders, verify_checkpoint
from pathswitch.errors import CheckpointError

FORK, NEWEST, END = "global_step4", "global_step6", "global_step8"


def victim(folder: Path) -> Path:
    """Return the shard that a fault hits: the last rank's optimizer states, or what stage 0 has in their place."""
    return max(folder.glob("*optim_states.pt"), default=folder / "mp_rank_00_model_states.pt")


def truncate(tag: Path, run: Path) -> None:
    shard = victim(tag)
    shard.write_bytes(shard.read_bytes()[:-100])


def flip_bit(tag: Path, run: Path) -> None:
    shard = victim(tag)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def other_step(tag: Path, run: Path) -> None:
    shutil.copy(victim(run / "main" / "global_step2"), victim(tag))


def other_run(tag: Path, run: Path) -> None:
    shutil.copy(victim(run.parent / "other" / "main" / FORK), victim(tag))


def missing_rank(tag: Path, run: Path) -> None:
    victim(tag).unlink()


def extra_rank(tag: Path, run: Path) -> None:
    shutil.copy(victim(tag), tag / "mp_rank_01_model_states.pt")


def empty_latest(tag: Path, run: Path) -> None:
    (tag.parent / "latest").write_text("")


def garbled_latest(tag: Path, run: Path) -> None:
    (tag.parent / "latest").write_bytes(b"\xff\x00glob\n../..")


def latest_past_commit(tag: Path, run: Path) -> None:
    (tag.parent / ".global_step9.saving").mkdir()
    (tag.parent / "latest").write_text("global_step9")


def manifest_missing(tag: Path, run: Path) -> None:
    (tag / "pathswitch.json").unlink()


def manifest_edited(tag: Path, run: Path) -> None:
    manifest = tag / "pathswitch.json"
    manifest.write_text(manifest.read_text().replace('"samples_seen": ', '"samples_seen": 1'))


def manifest_of_another_step(tag: Path, run: Path) -> None:
    shutil.copy(run / "main" / "global_step2" / "pathswitch.json", tag / "pathswitch.json")


Fault = Callable[[Path, Path], None]
FAULTS: dict[str, Fault] = {
    "truncated shard": truncate,
    "one flipped bit": flip_bit,
    "shard of another step": other_step,
    "shard of another run": other_run,
    "missing rank": missing_rank,
    "extra rank": extra_rank,
    "manifest missing": manifest_missing,
    "manifest edited": manifest_edited,
    "manifest of another step": manifest_of_another_step,
    "empty latest": empty_latest,
    "garbled latest": garbled_latest,
    "latest past the commit": latest_past_commit,
}
# A fork names its tag and does not read `latest`.
LATEST_FAULTS = ("empty latest", "garbled latest", "latest past the commit")


def train_run(run: Path, stage: int, gas: int = 1) -> None:
    """Main path with checkpoints at 2, 4 and 6; branch v1 from 4 with checkpoints at 6 and its end, 8."""
    main = engine_of(config(stage, gas=gas))
    for _ in range(3):
        updates(main, 2)
        main.save_checkpoint(run / "main")
    branch = engine_of(config(stage, gas=gas, path="v1"))
    branch.load_checkpoint(run / "main", tag=FORK)
    for _ in range(2):
        updates(branch, 2)
        branch.save_checkpoint(run / "v1")


def on_rank0(action: Callable[[], Any]) -> None:
    barrier()
    if torch.distributed.get_rank() == 0:
        action()
    barrier()


def damaged_folders(run: Path) -> list[str]:
    """Return the checkpoints of a run that are not whole."""
    damaged = []
    for folder in checkpoint_folders(run):
        try:
            verify_checkpoint(folder)
        except CheckpointError:
            damaged.append(folder.relative_to(run).as_posix())
    return damaged


def one_fault(name: str, stage: int, run: Path, engines: dict[str, Any]) -> dict[str, Any]:
    """Meet one fault in a fork, a resume and a release."""
    record: dict[str, Any] = {}
    hurt = run.parent / "hurt"
    for action, folder, tag in (("fork", "main", FORK), ("resume", "main", NEWEST), ("release", "v1", END)):
        if action == "fork" and name in LATEST_FAULTS:
            continue
        on_rank0(partial(shutil.copytree, run, hurt))
        on_rank0(partial(FAULTS[name], hurt / folder / tag, hurt))
        engine = engines[action]
        before = weights(engine)
        error = refused(partial(engine.load_checkpoint, hurt / folder, tag if action == "fork" else None))
        untouched = all(map(torch.equal, before, weights(engine))) and engine.global_steps == 0
        record[action] = {"error": error, "untouched": untouched, "damaged": damaged_folders(hurt)}
        if action == "resume":
            record[action] |= resume_previous(hurt / "main", stage) | {"damaged afterwards": damaged_folders(hurt)}
        on_rank0(partial(shutil.rmtree, hurt))
    return record


def fill(folder: Path) -> None:
    """Leave 8 KiB on the disk of a folder."""
    (folder / "filler").write_bytes(b"\0" * (shutil.disk_usage(folder).free - 8192))


def save_fault(name: str, stage: int, run: Path) -> dict[str, Any] | None:
    """Train on from the newest checkpoint where nothing can be saved, then resume."""
    disk = os.environ.get({"disk full during save": "FULL_DISK", "permission denied": "READ_ONLY_DISK"}[name])
    if disk is None:
        return None
    full = name.startswith("disk full")
    place = Path(disk) / "run" if full else run
    if full:
        on_rank0(partial(shutil.copytree, run / "main" / NEWEST, place / "main" / NEWEST))
        on_rank0(partial((place / "main" / "latest").write_text, NEWEST))
    engine = engine_of(config(stage))
    engine.load_checkpoint(place / "main")
    updates(engine, 2)
    if full:
        on_rank0(partial(fill, Path(disk)))
    error = refused(partial(engine.save_checkpoint, place / "main" if full else Path(disk) / "main"))
    again = engine_of(config(stage))
    record = {"error": error, "untouched": True, "damaged": damaged_folders(place)}
    record |= {"previous": refused(partial(again.load_checkpoint, place / "main")), "damaged afterwards": []}
    if full:
        on_rank0(partial(shutil.rmtree, place))
        on_rank0((Path(disk) / "filler").unlink)
    return record | {"step": again.lr_scheduler.last_epoch}


def clock_backwards(stage: int, run: Path) -> dict[str, Any]:
    """Save the checkpoint of step 8 with a clock, and times of files, a day before those of step 6."""
    folder, clock = run.parent / "clock", time.time
    on_rank0(partial(shutil.copytree, run / "main", folder))
    engine = engine_of(config(stage))
    engine.load_checkpoint(folder)
    updates(engine, 2)
    time.time = lambda: clock() - 86_400
    engine.save_checkpoint(folder)
    time.time = clock
    on_rank0(lambda: [os.utime(file, (0, 0)) for file in (folder / END).rglob("*")])
    on_rank0((folder / "latest").unlink)  # so that the newest has to be found among the folders
    again = engine_of(config(stage) | {"pathswitch": {"checkpoint": {"on_damage": "previous"}}})
    error = refused(partial(again.load_checkpoint, folder))
    return {"error": error, "step": again.lr_scheduler.last_epoch, "damaged": damaged_folders(folder)}


def resume_previous(folder: Path, stage: int) -> dict[str, Any]:
    """Resume again with leave to go back, train on and save."""
    engine = engine_of(config(stage) | {"pathswitch": {"checkpoint": {"on_damage": "previous"}}})
    error = refused(partial(engine.load_checkpoint, folder))
    step = engine.lr_scheduler.last_epoch
    updates(engine, 2)
    engine.save_checkpoint(folder)
    return {"previous": error, "step": step}


def main() -> None:
    """Run all stages in one process group."""
    out = arguments()
    record: dict[str, Any] = {}
    for stage in (0, 1, 2, 3):
        run, other = out / f"stage{stage}" / "run", out / f"stage{stage}" / "other"
        train_run(run, stage)
        train_run(other, stage, gas=2)
        engines = {
            "fork": engine_of(config(stage, path="v1")),
            "resume": engine_of(config(stage)),
            "release": engine_of(config(stage, path="v1")),
        }
        record[str(stage)] = {name: one_fault(name, stage, run, engines) for name in FAULTS}
        for name in ("disk full during save", "permission denied"):
            record[str(stage)][name] = {"save": save_fault(name, stage, run)}
        record[str(stage)]["clock going backwards"] = {"save": clock_backwards(stage, run)}
    finish(record, out)


if __name__ == "__main__":
    main()
