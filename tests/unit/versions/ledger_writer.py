"""Append records to a ledger and note each one that was appended: ``ledger_writer.py LEDGER LOG WRITER COUNT``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from pathswitch.versions.ledger import Ledger
from pathswitch.versions.records import CheckpointRecord


def record(writer: int, step: int) -> CheckpointRecord:
    return CheckpointRecord(
        manifest=f"{writer:032x}{step:032x}",
        folder=f"path_switching/w{writer}/checkpoints/global_step{step}",
        paradigm="path_switching",
        path=f"w{writer}",
        step=step,
        samples_seen=step * 16,
        tokens_seen=step * 2048,
        next_lr=1e-3 / (step + 1),
        parent=f"{writer:032x}{step - 1:032x}" if step else None,
    )


def main(ledger: Ledger, log: Path, writer: int, count: int) -> None:
    done = log.read_bytes().count(b"\n") if log.is_file() else 0
    with log.open("ab", buffering=0) as file:
        # The last one that it noted is written again, as by a job that cannot know whether it had come that far.
        for step in range(max(0, done - 1), count):
            file.write(f"{ledger.append(record(writer, step))}\n".encode())


def slow_syncs() -> None:
    """Take time in the midst of a write: so much that whoever is to kill this process at a certain step is in time."""
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        time.sleep(0.00025)
        sync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]


if __name__ == "__main__":
    slow_syncs()
    main(Ledger(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
