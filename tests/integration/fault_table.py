"""The table of faults: what a fork, a resume and a release do about each, under every ZeRO stage.

python tests/integration/fault_table.py        trains, damages, loads, and prints the table
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import ds_ranks
from rich.console import Console
from rich.table import Table
from small_disks import NO_DISKS, small_disks

ACTIONS = ("fork", "resume", "release", "save")
Cell = Any  # a dictionary; None where the fault could not be made
Faults = dict[str, dict[str, dict[str, list[Cell]]]]


def measure(folder: Path) -> Faults:
    """Return, per stage, fault and action, what each of the two ranks saw."""
    (out := folder / "out").mkdir()
    with small_disks(folder / "disks") as disks:
        job = ds_ranks.run("worker_faults.py", str(out), folder=folder, extra=disks, timeout_seconds=400)
    assert job.returncode == 0, job.output[-4000:]
    ranks = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return {
        stage: {
            fault: {action: [rank[stage][fault][action] for rank in ranks] for action in actions}
            for fault, actions in faults.items()
        }
        for stage, faults in ranks[0].items()
    }


def verdict(cells: list[Cell]) -> str:
    """Say what happened, in a word or two; on every rank the same, or it is not a verdict."""
    first = cells[0]
    if first is None:
        return NO_DISKS
    if "untouched" not in first:
        return (
            f"goes on from {first['step']}" if not any(cell["error"] or cell["damaged"] for cell in cells) else "FAILED"
        )
    if any(cell["error"] != first["error"] for cell in cells):
        return "RANKS DIFFER"
    if not first["error"].startswith("CheckpointError: "):
        return "NOT REFUSED"
    if not all(cell["untouched"] for cell in cells):
        return "STATE CHANGED"
    if "previous" not in first:
        return "refused"
    if any(cell["previous"] for cell in cells) or first["damaged afterwards"]:
        return "refused, NO WAY ON"
    return f"refused, goes on from {first['step']}"


def table(faults: Faults) -> Table:
    """Return one row per fault and action, one column per ZeRO stage."""
    result = Table("fault", "met by", *(f"ZeRO {stage}" for stage in faults))
    for fault in faults["0"]:
        for action in ACTIONS:
            if action in faults["0"][fault]:
                result.add_row(fault, action, *(verdict(faults[stage][fault][action]) for stage in faults))
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        Console(width=140).print(table(measure(Path(temporary))))
