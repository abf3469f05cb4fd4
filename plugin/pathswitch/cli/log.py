"""What ``pathswitch log`` prints: the checkpoints, forks, releases and evaluations that a run folder's ledger holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console

from pathswitch.checkpoint import checkpoint_state
from pathswitch.cli.run_checkpoints import path_lock
from pathswitch.errors import RunError
from pathswitch.report.lineage import draw, to_json
from pathswitch.run_folder import PathFolder
from pathswitch.versions.ledger import run_ledger
from pathswitch.versions.lineage import FolderState, lineages


def log_command(run: Path, as_json: bool, console: Console) -> int:
    """Print the lineage of a run folder and return the exit code: 1 if files in its ledger are damaged.

    Raises:
        RunError: the folder has no ledger.
    """
    ledger = run_ledger(run)
    if not ledger.folder.is_dir():
        raise RunError(f"RUN: given {str(run)!r}, where no records were written: {ledger.folder} is not a folder")
    content = ledger.read()

    def state_of(checkpoint: str, manifest: str) -> FolderState:
        return checkpoint_state(run / checkpoint, manifest)

    found = lineages(
        (stored.record for stored in content.records),
        state_of,
        is_running=lambda paradigm, path: is_training(PathFolder(run / paradigm / path)),
    )
    if as_json:
        print(json.dumps(to_json(found), indent=1))
    elif found:
        console.print(draw(found), soft_wrap=True, end="")
    else:
        console.print("No checkpoint has been recorded yet.")
    for damaged in content.damaged:
        print(f"pathswitch: damaged ledger file: {damaged.file}: {damaged.reason}", file=sys.stderr)
    return 1 if content.damaged else 0


def is_training(path: PathFolder) -> bool:
    """Return whether a live process holds the lock of a path; it is neither created nor written to."""
    with path_lock(path, shared=True) as held:
        return held is False
