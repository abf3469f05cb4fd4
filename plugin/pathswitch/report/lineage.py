"""The lineage of a run, drawn as a graph for the terminal, and as JSON values."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from rich.segment import Segment, Segments
from rich.style import Style

from pathswitch.report.wording import LABELS, learning_rate, perplexity, tokens
from pathswitch.versions import MAIN
from pathswitch.versions.lineage import Lineage, LineagePath, Node
from pathswitch.versions.records import CheckpointRecord

JSON_FORMAT = 1
SHORT_DIGEST = 12
HEADS = ("manifest", "path", "step", "next LR", "tokens", "state")
_NUMBERS = ("step", "tokens")
_TITLE, _DIGEST, _MADE, _FAINT, _BAD = (
    Style(bold=True),
    Style(color="yellow"),
    Style(color="green"),
    Style(dim=True),
    Style(color="red"),
)
_STATE_STYLES = {"committed": None, "pruned": _FAINT}
_TITLES: Mapping[str, str] = {str(paradigm): label for paradigm, label in LABELS.items()}


@dataclass(frozen=True, slots=True)
class _Line:
    """One line: the graph's part and, unless it only joins two columns, a checkpoint."""

    graph: str
    cells: tuple[str, ...] = ()
    notes: str = ""


def draw(lineages: Sequence[Lineage]) -> Segments:
    """Draw each paradigm's paths with the newest checkpoint on top, the main path as the trunk.

    These are finished lines: print them with ``soft_wrap=True``.
    """
    return Segments([segment for lineage in lineages for segment in _paradigm(lineage)])


def to_json(lineages: Sequence[Lineage]) -> dict[str, Any]:
    """Return ``{"format": 1, "paradigms": [...]}`` with ``paradigm`` and ``paths`` in each entry, the main path first.

    Each path has ``path``, ``fork`` (``{"path", "step", "manifest"}`` of where it left another, or null), ``policy``
    (of a branch with a folder of its own, else null), ``running`` and ``checkpoints`` by step. Each checkpoint has
    ``manifest``, ``step``, ``state`` (committed, damaged, missing, pruned, replaced or unrecorded), ``folder``,
    ``parent`` (a manifest), ``next_lr``, ``samples_seen``, ``tokens_seen``, ``releases`` (``{"folder", "digest"}``) and
    ``evaluations`` (perplexity by test set). What is not known, or not finite, is null.
    """
    return {
        "format": JSON_FORMAT,
        "paradigms": [
            {"paradigm": lineage.paradigm, "paths": [_path_json(path) for path in lineage.paths]}
            for lineage in lineages
        ],
    }


def _path_json(path: LineagePath) -> dict[str, Any]:
    return {
        "path": path.name,
        "fork": asdict(path.fork) if path.fork else None,
        "policy": path.branch.policy if path.branch else None,
        "running": path.running,
        "checkpoints": [_node_json(node) for node in path.nodes],
    }


def _node_json(node: Node) -> dict[str, Any]:
    record = node.record
    checkpoint = record if isinstance(record, CheckpointRecord) else None
    return {
        "manifest": node.manifest,
        "step": node.step,
        "state": node.state,
        "folder": record.folder if record else None,
        "parent": record.parent if record else None,
        "next_lr": checkpoint.next_lr if checkpoint else None,
        "samples_seen": checkpoint.samples_seen if checkpoint else None,
        "tokens_seen": checkpoint.tokens_seen if checkpoint else None,
        "releases": [{"folder": release.folder, "digest": release.digest} for release in node.releases],
        "evaluations": [
            {name: value if isfinite(value) else None for name, value in evaluation.perplexity.items()}
            for evaluation in node.evaluations
        ],
    }


def _paradigm(lineage: Lineage) -> Iterator[Segment]:
    lines = list(_forest(lineage.paths))
    graph = max(len(line.graph) for line in lines)
    rows = [HEADS, *(line.cells for line in lines if line.cells)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield Segment(f"{_TITLES.get(lineage.paradigm, lineage.paradigm)}\n", _TITLE)
    yield Segment(f"{' ' * graph}{''.join(_aligned(HEADS, widths)).rstrip()}\n", _FAINT)
    for line in lines:
        if not line.cells:
            yield Segment(f"{line.graph.rstrip()}\n")
            continue
        digest, *middle, state = _aligned(line.cells, widths)
        yield Segment(line.graph.ljust(graph))
        yield Segment(digest, _DIGEST)
        yield Segment("".join(middle))
        yield Segment(state if line.notes else state.rstrip(), _STATE_STYLES.get(line.cells[-1], _BAD))
        yield Segment(f"{line.notes}\n", _MADE)
    yield Segment("\n")


def _aligned(cells: Iterable[str], widths: Iterable[int]) -> list[str]:
    """Pad the cells of one line to the widths of their columns."""
    columns = zip(HEADS, cells, widths, strict=True)
    return [f"{cell.rjust(width) if head in _NUMBERS else cell.ljust(width)}  " for head, cell, width in columns]


def _forest(paths: Sequence[LineagePath]) -> Iterator[_Line]:
    """Return the lines of all paths: each that began from scratch, or left one that is not here, stands by itself."""
    names = {path.name for path in paths}
    leaving: defaultdict[str, list[LineagePath]] = defaultdict(list)
    roots = []
    for path in paths:
        if path.fork is not None and path.fork.path in names:
            leaving[path.fork.path].append(path)
        else:
            roots.append(path)
    # Newest on top here as well, but the main path, which the others are read against, before them.
    for index, root in enumerate(sorted(reversed(roots), key=lambda path: path.name != MAIN)):
        if index:
            yield _Line("")
        yield from _tree(root, leaving, "")


def _tree(root: LineagePath, leaving: Mapping[str, Sequence[LineagePath]], indent: str) -> Iterator[_Line]:
    """Return the lines of a path, newest checkpoint first, and of all paths that left it."""
    line, here = _straight_line(root, leaving)
    above = False  # whether this column goes on further up
    for path in reversed(line):
        for index in reversed(range(len(path.nodes))):
            for child in here.get((path.name, index), ()):
                yield from _tree(child, leaving, indent + ("│ " if above else "  "))
                yield _Line(f"{indent}{'├─╯' if above else '╭─╯'} ")
                above = True
            yield _checkpoint_line(path, index, indent)
            above = True


def _straight_line(
    root: LineagePath, leaving: Mapping[str, Sequence[LineagePath]]
) -> tuple[list[LineagePath], dict[tuple[str, int], list[LineagePath]]]:
    """Return the paths that share a column, one going on where the other ends, and what leaves their checkpoints.

    The main path is open-ended: what leaves its newest checkpoint is a branch and not its continuation.
    """
    line, here = [root], {}
    for path in line:
        steps, children = [node.step for node in path.nodes], defaultdict(list)
        for child in leaving.get(path.name, ()):
            # At the checkpoint that was forked; where the ledger does not have it, at the last one before the fork.
            children[max(0, bisect_right(steps, _fork_step(child)) - 1)].append(child)
        at_end = children[len(path.nodes) - 1]
        if path.name != MAIN and len(at_end) == 1:
            line.append(at_end.pop())
        here.update({(path.name, index): of for index, of in children.items()})
    return line, here


def _fork_step(path: LineagePath) -> int:
    return path.fork.step if path.fork else 0


def _checkpoint_line(path: LineagePath, index: int, indent: str) -> _Line:
    node = path.nodes[index]
    checkpoint = node.record if isinstance(node.record, CheckpointRecord) else None
    size = checkpoint.tokens_seen if checkpoint else None
    cells = (
        node.manifest[:SHORT_DIGEST],
        path.name,
        f"{node.step}",
        learning_rate(checkpoint.next_lr) if checkpoint else "–",
        tokens(size) if size is not None else "–",
        node.state,
    )
    return _Line(f"{indent}● ", cells, ", ".join(_notes(path, index)))


def _notes(path: LineagePath, index: int) -> Iterator[str]:
    node = path.nodes[index]
    if index == len(path.nodes) - 1 and path.running:
        yield "running"
    if index == 0 and path.fork is not None:
        yield f"from {path.fork.path} {path.fork.step}"
    yield from (f"release {release.folder}" for release in node.releases)
    for evaluation in node.evaluations:
        yield f"perplexity {' '.join(f'{name} {perplexity(value)}' for name, value in evaluation.perplexity.items())}"
