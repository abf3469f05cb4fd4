"""Measure how long a large ledger takes to list: ``python tests/bench/ledger_list.py [RECORDS]``.

Writes synthetic records, without syncing any, then prints the medians of reading them (with their digests verified),
of building the lineage from them, and of drawing it for the terminal and as JSON.
"""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from pathswitch.report.lineage import draw, to_json
from pathswitch.versions.ledger import Ledger
from pathswitch.versions.lineage import lineages
from pathswitch.versions.records import CheckpointRecord, Record, canonical

ROUNDS, BRANCHES, BRANCH_CHECKPOINTS = 5, 100, 100
WRITTEN_AT = b',"written_at":"2025-01-01T00:00:00Z"}\n'


def _manifest(path: str, step: int) -> str:
    return hashlib.sha256(f"{path} {step}".encode()).hexdigest()


def _checkpoint(path: str, step: int, parent: str | None) -> CheckpointRecord:
    return CheckpointRecord(
        manifest=_manifest(path, step),
        folder=f"path_switching/{path}/checkpoints/global_step{step}",
        paradigm="path_switching",
        path=path,
        step=step,
        samples_seen=step * 1024,
        tokens_seen=step * 1024 * 4096,
        next_lr=3e-4,
        parent=parent,
    )


def synthetic_records(count: int) -> list[Record]:
    """Return the checkpoints of a main path and of branches that leave it at even distances."""
    n_main = count - BRANCHES * BRANCH_CHECKPOINTS
    main = [_checkpoint("main", i, _manifest("main", i - 1) if i else None) for i in range(n_main)]
    records: list[Record] = [*main]
    for branch in range(BRANCHES):
        fork = main[(branch + 1) * (n_main - 1) // BRANCHES]
        parent = fork.manifest
        for i in range(1, BRANCH_CHECKPOINTS + 1):
            records.append(checkpoint := _checkpoint(f"v{branch}", fork.step + i, parent))
            parent = checkpoint.manifest
    return records


def write(folder: Path, records: list[Record]) -> None:
    """Write records as a ledger does, but for the syncing."""
    for record in records:
        content = canonical(record)
        (folder / f"{hashlib.sha256(content).hexdigest()}.json").write_bytes(content[:-1] + WRITTEN_AT)


def _seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(count: int) -> None:
    """Print the medians for a ledger of ``count`` records."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), synthetic_records(count))
        ledger = Ledger(Path(folder))
        content = ledger.read()
        assert len(content.records) == count and not content.damaged
        print(f"read {count} records: {_seconds(ledger.read):.2f} s")
    records = [stored.record for stored in content.records]

    def build() -> object:
        return lineages(records, state_of=lambda folder, manifest: "committed", is_running=lambda paradigm, path: False)

    print(f"build the lineage: {_seconds(build):.2f} s")
    found = lineages(records, state_of=lambda folder, manifest: "committed", is_running=lambda paradigm, path: False)
    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        seconds = _seconds(lambda console=console: console.print(draw(found), soft_wrap=True))
        print(f"draw it {'in colour' if terminal else 'without colour'}: {seconds:.2f} s")
    print(f"as JSON: {_seconds(lambda: json.dumps(to_json(found), indent=1)):.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 100_000)
