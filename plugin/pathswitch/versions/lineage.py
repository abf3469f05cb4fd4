"""From a ledger's records to what they tell: each paradigm's paths, where they forked, and what became of them.

Everything is ordered by step. Records carry no order of their own, and clocks of different nodes cannot be compared.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Literal

from pathswitch.versions.plan import MAIN, PARADIGMS
from pathswitch.versions.records import (
    BranchRecord,
    CheckpointRecord,
    EvaluationRecord,
    PrunedRecord,
    Record,
    ReleaseRecord,
)

FolderState = Literal["committed", "damaged", "missing", "replaced"]
State = Literal["committed", "damaged", "missing", "replaced", "pruned", "unrecorded"]
StateOf = Callable[[str, str], FolderState]
"""What a folder, written as in the records, holds of the checkpoint with this manifest."""
IsRunning = Callable[[str, str], bool]
"""Whether a job trains this path of this paradigm now: (paradigm, path)."""
Saved = CheckpointRecord | BranchRecord
Derived = ReleaseRecord | EvaluationRecord

# Of the checkpoints of one step, all that are there are shown; where none is, the first by this order.
_PRESENT: tuple[State, ...] = ("committed", "damaged")
_ABSENT: tuple[State, ...] = ("pruned", "missing", "replaced", "unrecorded")


@dataclass(frozen=True, slots=True)
class Node:
    """A checkpoint of a path, with what was made of it."""

    manifest: str
    step: int
    state: State
    """``unrecorded``: released or evaluated, while the ledger has no record of the checkpoint itself."""
    record: Saved | None
    releases: tuple[ReleaseRecord, ...]
    evaluations: tuple[EvaluationRecord, ...]


@dataclass(frozen=True)
class Fork:
    """Where a path left another one."""

    path: str
    step: int
    manifest: str


@dataclass(frozen=True)
class LineagePath:
    """One path, with its checkpoints by step; there is at least one."""

    name: str
    fork: Fork | None
    """None for a path that began from scratch, or whose origin is not known."""
    branch: BranchRecord | None
    """None for a path that was not forked into a folder of its own."""
    running: bool
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class Lineage:
    """All paths of a paradigm: the main path, then the others by where they left and how far they came."""

    paradigm: str
    paths: tuple[LineagePath, ...]


@dataclass(frozen=True)
class _Records:
    """The records of one path."""

    saved: list[Saved]
    derived: list[Derived]


def lineages(records: Iterable[Record], state_of: StateOf, is_running: IsRunning) -> tuple[Lineage, ...]:
    """Return one lineage for each paradigm that the records name; the order of the records makes no difference."""
    pruned: set[tuple[str, str]] = set()
    records_of: defaultdict[str, defaultdict[str, _Records]] = defaultdict(
        lambda: defaultdict(lambda: _Records([], []))
    )
    for record in records:
        if isinstance(record, Saved):
            records_of[record.paradigm][record.path].saved.append(record)
        elif isinstance(record, Derived):
            records_of[record.paradigm][record.path].derived.append(record)
        elif isinstance(record, PrunedRecord):
            pruned.add((record.folder, record.manifest))

    def state(folder: str, manifest: str) -> State:
        found = state_of(folder, manifest)
        return "pruned" if found == "missing" and (folder, manifest) in pruned else found

    return tuple(
        _lineage(paradigm, records_of[paradigm], state, is_running)
        for paradigm in sorted(records_of, key=_paradigm_order)
    )


def _paradigm_order(name: str) -> tuple[int, str]:
    names: tuple[str, ...] = PARADIGMS
    return (names.index(name) if name in names else len(names)), name


def _lineage(
    paradigm: str,
    records_of: Mapping[str, _Records],
    state: Callable[[str, str], State],
    is_running: IsRunning,
) -> Lineage:
    nodes = {path: _nodes(records, state) for path, records in records_of.items()}
    branches = {path: _branch(records, nodes[path]) for path, records in records_of.items()}
    owners = _owners(records_of.values())
    forks = {path: _fork(path, branches[path], nodes[path], owners) for path in sorted(records_of)}
    _cut_circles(forks)
    paths = [
        LineagePath(path, forks[path], branches[path], is_running(paradigm, path), nodes[path]) for path in records_of
    ]
    return Lineage(paradigm, tuple(sorted(paths, key=_path_order)))


def _path_order(path: LineagePath) -> tuple[bool, int, int, str]:
    return path.name != MAIN, path.fork.step if path.fork else -1, path.nodes[-1].step, path.name


def _nodes(records: _Records, state: Callable[[str, str], State]) -> tuple[Node, ...]:
    """Return the checkpoints of one path by step, without those that later ones have replaced."""
    derived: defaultdict[str, list[Derived]] = defaultdict(list)
    for item in records.derived:
        derived[item.checkpoint].append(item)

    def node(manifest: str, step: int, state: State, record: Saved | None) -> Node:
        of = derived.get(manifest)
        return Node(manifest, step, state, record, *(_split(of) if of else ((), ())))

    saved = _distinct(records.saved)
    nodes = [node(r.manifest, _step(r), state(r.folder, r.manifest), r) for r in saved]
    # What the ledger knows must not be left out because one of its records is lost.
    lost = derived.keys() - {r.manifest for r in saved}
    nodes += [node(manifest, min(item.step for item in derived[manifest]), "unrecorded", None) for manifest in lost]
    referenced = {r.parent for r in saved}
    nodes.sort(key=attrgetter("step", "manifest"))
    return tuple(
        shown for _, same in groupby(nodes, key=attrgetter("step")) for shown in _current(list(same), referenced)
    )


def _step(record: Saved) -> int:
    return record.step if isinstance(record, CheckpointRecord) else record.fork_step


def _distinct(records: Iterable[Saved]) -> list[Saved]:
    """Return one record for each checkpoint, where it was recorded again with another parent or as a fork."""
    found: dict[tuple[str, str], Saved] = {}
    for record in records:
        known = found.setdefault((record.folder, record.manifest), record)
        if known is not record:
            found[record.folder, record.manifest] = max(known, record, key=lambda r: (r.kind, r.parent or ""))
    return list(found.values())


def _split(derived: list[Derived]) -> tuple[tuple[ReleaseRecord, ...], tuple[EvaluationRecord, ...]]:
    releases = [item for item in derived if isinstance(item, ReleaseRecord)]
    evaluations = [item for item in derived if isinstance(item, EvaluationRecord)]
    return (
        tuple(sorted(releases, key=lambda release: (release.folder, release.digest))),
        tuple(sorted(evaluations, key=lambda evaluation: repr(sorted(evaluation.perplexity.items())))),
    )


def _current(nodes: list[Node], referenced: set[str | None]) -> list[Node]:
    """Return which of the checkpoints of one step to show: a path that was resumed may have saved it several times."""
    present = [node for node in nodes if node.state in _PRESENT]
    absent = min(
        (node for node in nodes if node.state in _ABSENT),
        # The one that the path went on from is nearer to what it is now than one that led nowhere.
        key=lambda node: (_ABSENT.index(node.state), node.manifest not in referenced, node.manifest),
        default=None,
    )
    return present if present or absent is None else [absent]


def _branch(records: _Records, nodes: Iterable[Node]) -> BranchRecord | None:
    """Return the record of the fork; of a branch that was forked several times, of the fork that is there."""
    there = {(node.record.folder, node.manifest) for node in nodes if node.record and node.state in _PRESENT}
    branches = [record for record in records.saved if isinstance(record, BranchRecord)]
    return max(
        branches,
        key=lambda branch: ((branch.folder, branch.manifest) in there, branch.fork_step, branch.manifest),
        default=None,
    )


def _owners(all_records: Iterable[_Records]) -> dict[str, Saved]:
    """Return whose checkpoint a manifest is; a fork may have the manifest of what it was forked from."""
    owners: dict[str, Saved] = {}
    for records in all_records:
        for record in records.saved:
            known = owners.setdefault(record.manifest, record)
            if known is not record:
                owners[record.manifest] = min(known, record, key=lambda r: (r.kind == "branch", r.path != MAIN, r.path))
    return owners


def _fork(path: str, branch: BranchRecord | None, nodes: Iterable[Node], owners: Mapping[str, Saved]) -> Fork | None:
    """Return where a path left another one: as its branch record says, or the checkpoint that its first one follows."""
    if path == MAIN:
        return None
    if branch is not None:
        return Fork(branch.parent_path, branch.fork_step, branch.parent)
    for node in nodes:
        parent = node.record.parent if node.record else None
        owner = owners.get(parent) if parent else None
        if owner is not None and owner.path != path:
            return Fork(owner.path, _step(owner), owner.manifest)
    return None


def _cut_circles(forks: dict[str, Fork | None]) -> None:
    """Make a tree of forks that records of several trainings of the same paths may have closed to a circle."""
    for path in forks:
        seen, at = {path}, forks[path]
        while at is not None and at.path not in seen:
            seen.add(at.path)
            at = forks.get(at.path)
        if at is not None and at.path == path:
            forks[path] = None
