"""The gate before a branch: it opens when the parent's checkpoint at the fork step is committed and verified.

Opening is forking: the checkpoint's files become the branch's first checkpoint, verified on the way. So the branch's
command is the same at its first start and at every later one, and its parent may prune the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pathswitch.atomic import file_stamp
from pathswitch.checkpoint import MANIFEST_FILE, Manifest, Policy, iteration_folder, layout_of, read_manifest
from pathswitch.checkpoint.fork import fork_checkpoint
from pathswitch.errors import CheckpointError
from pathswitch.launch.journal import Journal
from pathswitch.run_folder import PathFolder, RunFolder, tag
from pathswitch.versions import Path as TrainingPath
from pathswitch.versions.ledger import folder_name, run_ledger
from pathswitch.versions.records import BranchRecord

GateState = Literal["open", "waiting", "refused"]


@dataclass(frozen=True)
class Gate:
    """Whether a path's job may start."""

    state: GateState
    reason: str | None = None


OPEN = Gate("open")


@dataclass(frozen=True)
class _Head:
    """What of a manifest is asked for again and again: that of a thousand nodes has a line for each rank's shards."""

    folder: Path
    paradigm: str
    path: str
    step: int
    is_fork: bool


def _heads(checkpoints: Path) -> Iterator[_Head]:
    """Yield the readable committed checkpoints of a folder; a manifest that has not changed is not read again."""
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if folder.name.startswith("."):
            continue
        try:
            yield _head(folder, file_stamp(folder / MANIFEST_FILE))
        except (OSError, CheckpointError):
            continue


@lru_cache(maxsize=10_000)
def _head(folder: Path, stamp: tuple[int, ...]) -> _Head:
    manifest = read_manifest(folder)
    return _Head(folder, manifest.paradigm, manifest.path, manifest.step, manifest.forked_from is not None)


def is_open(run: RunFolder, path: TrainingPath) -> bool:
    """Return whether a path starts from scratch, or has a checkpoint of its own to go on from."""
    return path.start_step == 0 or durable_step(run.path(path), path.name) is not None


def durable_step(files: PathFolder, path: str) -> int | None:
    """Return the updates behind a path's newest committed checkpoint, None where it has none."""
    return max((head.step for head in _heads(files.checkpoints) if head.path == path), default=None)


def open_gate(run: RunFolder, path: TrainingPath, key: bytes | None, attempt: str) -> Gate:
    """Open a path's gate if its parent's checkpoint is there, verify it, and record what came of it.

    Args:
        run: the run.
        path: the path that wants to start.
        key: signs manifests, and must have signed the parent's.
        attempt: who asks, for the record.
    """
    if is_open(run, path):
        _finish_fork(run, path)
        return OPEN
    journal = Journal(run.out, path.paradigm, path.name)
    try:
        source = fork_source(run, path)
        if source is None:
            return Gate("waiting", f"until {path.parent}@{path.start_step}")
        _fork(run, path, *source, key)
    except CheckpointError as error:
        journal.write("refused", attempt, path.start_step, str(error))
        return Gate("refused", str(error))
    journal.write("opened", attempt, path.start_step)
    return OPEN


def fork_source(run: RunFolder, path: TrainingPath) -> tuple[Path, Manifest] | None:
    """Return the parent's committed checkpoint that a path starts from, None while there is none.

    Raises:
        CheckpointError: a folder of its name is there, but what it holds is not a committed checkpoint of the parent.
    """
    checkpoints, step = run.parent(path).checkpoints, path.start_step
    for head in _heads(checkpoints):
        if (head.paradigm, head.path, head.step) == (path.paradigm, path.parent, step):
            return head.folder, read_manifest(head.folder)
    for folder in (checkpoints / tag(step), checkpoints / iteration_folder(step)):
        if not folder.is_dir():
            continue
        manifest = read_manifest(folder)  # raises if it is damaged
        # With skipped updates, DeepSpeed's count of steps, which names its folders, is ahead of the scheduler's.
        if (manifest.paradigm, manifest.path) != (path.paradigm, path.parent):
            is_of = f"of {manifest.path} ({manifest.paradigm}) at step {manifest.step}"
            raise CheckpointError(f"{folder}: {is_of}; allowed: of {path.parent} ({path.paradigm}) at step {step}")
    return None


def _fork(run: RunFolder, path: TrainingPath, source: Path, manifest: Manifest, key: bytes | None) -> None:
    parent = run.plan().path(str(path.parent), path.paradigm)
    if manifest.schedule_digest != parent.digest:
        raise CheckpointError(f"{source}: trained by another schedule than the plan's {parent.name!r}")
    target = run.path(path).checkpoints / source.name
    fork = fork_checkpoint(source, target, policy=Policy(), paradigm=path.paradigm, path=path.name, key=key)
    record_fork(run, path, fork.folder, fork.manifest)


def _finish_fork(run: RunFolder, path: TrainingPath) -> None:
    """Do what a fork still has to do where it was killed when its folder was whole already."""
    own = list(_heads(run.path(path).checkpoints))
    if len(own) == 1 and own[0].is_fork:
        folder, manifest = own[0].folder, read_manifest(own[0].folder)
        if (layout := layout_of(manifest)).latest(folder.parent) is None:
            layout.write_latest(folder.parent, folder.name)
        record_fork(run, path, folder, manifest)


def record_fork(run: RunFolder, path: TrainingPath, folder: Path, manifest: Manifest) -> None:
    """Append a fork, with its folder and its manifest, to the run's ledger: one and the same record every time."""
    record = BranchRecord(
        manifest=manifest.digest,
        folder=folder_name(folder, run.out),
        paradigm=path.paradigm,
        path=path.name,
        parent_path=str(path.parent),
        fork_step=path.start_step,
        parent=str(manifest.forked_from),
        policy=manifest.policy.changes(),
    )
    run_ledger(run.out).append(record)
