"""Retention: which checkpoints of a run can go, and how one goes so that a kill leaves neither a part nor a secret."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathswitch.atomic import sync_folder
from pathswitch.checkpoint.commit import discard
from pathswitch.checkpoint.files import MANIFEST_FILE
from pathswitch.checkpoint.manifest import Manifest, read_manifest
from pathswitch.errors import CheckpointError

PRUNING = ".pruning"


@dataclass(frozen=True)
class PlannedPath:
    """A path of the plan, as far as retention has to know it."""

    paradigm: str
    name: str
    parent: str | None
    start_step: int
    end_step: int
    complete: bool
    """Trained to its end and released; its last checkpoint is what the release was made of."""


@dataclass(frozen=True)
class Stored:
    """A committed checkpoint in its place."""

    folder: Path
    paradigm: str
    path: str
    step: int
    digest: str
    latest_file: str | None
    """The framework's own file beside it, if it names this one as the newest."""


@dataclass(frozen=True)
class Decision:
    """What becomes of one checkpoint, and why."""

    checkpoint: Stored
    keep: bool
    reason: str


def decide(
    paths: Iterable[PlannedPath], checkpoints: Iterable[Stored], keep_last: int, pinned: Mapping[str, str]
) -> list[Decision]:
    """Decide on every committed checkpoint of a run, in the order of paradigm, path and step.

    Each folder counts for itself: two jobs may train copies of one path, and each resumes from its own.

    Args:
        paths: all paths of the plan, of every paradigm.
        checkpoints: the committed ones.
        keep_last: how many of the newest in each folder stay as resume points, at least 1.
        pinned: manifest digest -> why this checkpoint stays whatever the plan says.
    """
    planned = {(path.paradigm, path.name): path for path in paths}
    groups: defaultdict[tuple[str, str, Path], list[Stored]] = defaultdict(list)
    for checkpoint in checkpoints:
        groups[checkpoint.paradigm, checkpoint.path, checkpoint.folder.parent].append(checkpoint)
    decisions = []
    for (paradigm, name, _), group in sorted(groups.items()):
        group.sort(key=lambda checkpoint: (checkpoint.step, checkpoint.folder))
        reasons = dict(_reasons(planned, paradigm, name, group, keep_last, pinned))
        decisions += [Decision(c, c.folder in reasons, reasons.get(c.folder, "no path needs it")) for c in group]
    return decisions


def _reasons(
    planned: Mapping[tuple[str, str], PlannedPath],
    paradigm: str,
    name: str,
    group: Sequence[Stored],
    keep_last: int,
    pinned: Mapping[str, str],
) -> Iterator[tuple[Path, str]]:
    """Yield which of a path's checkpoints in one folder stay, ordered by step, and why; the last reason tells most."""
    path = planned.get((paradigm, name))
    if path is None:
        yield from ((checkpoint.folder, "its path is not in the plan") for checkpoint in group)
        return
    yield from ((c.folder, f"`{c.latest_file}` names it") for c in group if c.latest_file is not None)
    yield from ((c.folder, "resume point") for c in group[-keep_last:])
    if path.complete:
        yield from ((c.folder, f"{name} ended there") for c in group if c.step == path.end_step)
    for branch in planned.values():
        if branch.paradigm == paradigm and branch.parent == name:
            yield from _fork_points(branch, group)
    yield from ((c.folder, pinned[c.digest]) for c in group if c.digest in pinned)


def _fork_points(branch: PlannedPath, group: Sequence[Stored]) -> Iterator[tuple[Path, str]]:
    before = [checkpoint for checkpoint in group if checkpoint.step <= branch.start_step]
    exact = [checkpoint for checkpoint in before if checkpoint.step == branch.start_step]
    if exact:
        state = "forked" if branch.complete else "forks"
        yield from ((checkpoint.folder, f"{branch.name} {state} from it") for checkpoint in exact)
    elif before and not branch.complete:
        # The parent may have to be trained up to the fork step once more: from here it is nearest.
        yield before[-1].folder, f"nearest before step {branch.start_step}, where {branch.name} forks"


def pruned_folder(folder: Path) -> Path:
    """Return where a checkpoint waits while it is removed."""
    return folder.with_name(f".{folder.name}{PRUNING}")


def prune(folder: Path, digest: str, record: Callable[[Path, Manifest], None]) -> None:
    """Remove a committed checkpoint: it vanishes as a whole, and is recorded once its shards are gone.

    Nothing happens if the folder holds another checkpoint by now, or none: a job saves, or another process prunes.

    Raises:
        OSError: the folder cannot be renamed or emptied; the next run goes on.
    """
    hidden = pruned_folder(folder)
    if hidden.is_dir():  # of an earlier checkpoint of the same name
        finish_pruning(hidden, record)
    try:
        if read_manifest(folder).digest != digest:
            return
        os.rename(folder, hidden)
    except (CheckpointError, FileNotFoundError):
        return
    sync_folder(folder.parent)
    finish_pruning(hidden, record)


def unfinished_prunings(checkpoints: Path) -> list[Path]:
    """Return what a killed process was removing from a folder of checkpoints."""
    return sorted(folder for folder in checkpoints.glob(f".*{PRUNING}") if folder.is_dir())


def finish_pruning(hidden: Path, record: Callable[[Path, Manifest], None]) -> None:
    """Delete the shards, record the checkpoint as pruned, and only then delete the manifest that identifies it.

    Args:
        hidden: the renamed checkpoint.
        record: gets the folder as it was called before, and the manifest.

    Raises:
        OSError: a file cannot be deleted.
    """
    for directory, _, files in os.walk(hidden, topdown=False):
        for name in files:
            if Path(directory, name) != hidden / MANIFEST_FILE:
                Path(directory, name).unlink(missing_ok=True)
    sync_folder(hidden)
    if (hidden / MANIFEST_FILE).is_file():
        folder = hidden.with_name(hidden.name.removeprefix(".").removesuffix(PRUNING))
        record(folder, read_manifest(hidden))
    discard(hidden)


def freed_bytes(folders: Iterable[Path]) -> int:
    """Return how many bytes go with these folders: a file goes with the last of its hard links.

    Blocks that reflinks share with files elsewhere are counted, since the file system does not say which they are.
    """
    sizes: dict[tuple[int, int], tuple[int, int]] = {}
    links: Counter[tuple[int, int]] = Counter()
    for folder in folders:
        for directory, _, files in os.walk(folder):
            for name in files:
                try:
                    status = os.lstat(Path(directory, name))
                except FileNotFoundError:
                    continue  # another process removes it
                inode = status.st_dev, status.st_ino
                links[inode] += 1
                sizes[inode] = status.st_size, status.st_nlink
    return sum(size for inode, (size, total) in sizes.items() if links[inode] >= total)


def hidden_leftovers(checkpoints: Path) -> list[Path]:
    """Return what killed saves, forks and conversions left in a folder of checkpoints, if no process works there."""
    if not checkpoints.is_dir():
        return []
    return sorted(entry for entry in checkpoints.iterdir() if entry.is_dir() and _is_leftover(entry))


def _is_leftover(entry: Path) -> bool:
    if not entry.name.startswith(".") or entry.is_symlink():
        return False
    if entry.name.endswith(".replaced"):
        # Without its successor it is the only checkpoint of its tag, which the next load puts back.
        successor = entry.with_name(entry.name.removeprefix(".").removesuffix(".replaced"))
        return (successor / MANIFEST_FILE).is_file()
    return entry.name.endswith(".saving") or ".forking-" in entry.name or ".universal-" in entry.name
