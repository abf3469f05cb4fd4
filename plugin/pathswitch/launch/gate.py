"""The gate before a branch: it opens when the parent's checkpoint at the fork step is committed and verified.

Opening is forking: the checkpoint's files become the branch's first checkpoint, verified on the way. So the branch's
command is the same at its first start and at every later one, and its parent may prune the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathswitch.checkpoint import Manifest, Policy, committed_checkpoints, iteration_folder, read_manifest
from pathswitch.checkpoint.fork import Fork, fork_checkpoint
from pathswitch.config import build_plan
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


def is_open(run: RunFolder, path: TrainingPath) -> bool:
    """Return whether a path starts from scratch, or has a checkpoint of its own to go on from."""
    return path.start_step == 0 or durable_step(run.path(path), path.name) is not None


def durable_step(files: PathFolder, path: str) -> int | None:
    """Return the updates behind a path's newest committed checkpoint, None where it has none."""
    committed = committed_checkpoints(files.checkpoints)
    return max((manifest.step for _, manifest in committed if manifest.path == path), default=None)


def open_gate(run: RunFolder, path: TrainingPath, key: bytes | None, attempt: str) -> Gate:
    """Open a path's gate if its parent's checkpoint is there, verify it, and record what came of it.

    Args:
        run: the run.
        path: the path that wants to start.
        key: signs manifests, and must have signed the parent's.
        attempt: who asks, for the record.
    """
    if is_open(run, path):
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
    for folder, manifest in committed_checkpoints(checkpoints):
        if (manifest.paradigm, manifest.path, manifest.step) == (path.paradigm, path.parent, step):
            return folder, manifest
    for folder in (checkpoints / tag(step), checkpoints / iteration_folder(step)):
        if folder.is_dir():
            manifest = read_manifest(folder)  # raises if it is damaged
            is_of = f"of {manifest.path} ({manifest.paradigm}) at step {manifest.step}"
            raise CheckpointError(f"{folder}: {is_of}; allowed: of {path.parent} ({path.paradigm}) at step {step}")
    return None


def _fork(run: RunFolder, path: TrainingPath, source: Path, manifest: Manifest, key: bytes | None) -> None:
    parent = build_plan(run.plan_file()).path(str(path.parent), path.paradigm)
    if manifest.schedule_digest != parent.digest:
        raise CheckpointError(f"{source}: trained by another schedule than the plan's {parent.name!r}")
    target = run.path(path).checkpoints / source.name
    fork = fork_checkpoint(source, target, policy=Policy(), paradigm=path.paradigm, path=path.name, key=key)
    record_fork(run, path, fork, manifest)


def record_fork(run: RunFolder, path: TrainingPath, fork: Fork, parent: Manifest) -> None:
    """Append a fork of the checkpoint with the manifest ``parent`` to the run's ledger: one and the same record."""
    record = BranchRecord(
        manifest=fork.manifest.digest,
        folder=folder_name(fork.folder, run.out),
        paradigm=path.paradigm,
        path=path.name,
        parent_path=str(path.parent),
        fork_step=path.start_step,
        parent=parent.digest,
        policy=fork.manifest.policy.changes(),
    )
    run_ledger(run.out).append(record)
