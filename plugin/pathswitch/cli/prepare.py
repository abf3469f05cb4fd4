"""What has to be there before the embedded trainer's jobs start: the run folder, the tokenizer and the token files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from pathswitch.config import PlanFile, build_plan
from pathswitch.launch.paradigm import require_trainable
from pathswitch.run_folder import RunFolder
from pathswitch.versions import Paradigm

if TYPE_CHECKING:
    from pathswitch.data import Prepared


def prepare_run(
    plan_file: PlanFile, base: Path, out: Path, paradigm: Paradigm, console: Console | None = None
) -> RunFolder:
    """Open the run folder ``out`` for a plan, and prepare the data of one paradigm's paths.

    Raises:
        PathSwitchError: the plan cannot be trained, or contradicts what the folder holds.
    """
    from pathswitch.trainer.samples import path_stream

    require_trainable(plan_file)
    folder = RunFolder(out)
    folder.open(plan_file)
    prepared = prepare_data(plan_file, base, folder.data, console or Console())
    for path in build_plan(plan_file).paths(paradigm):
        path_stream(plan_file, path, prepared)  # raises unless every version has text enough for its steps
    return folder


def prepare_data(plan_file: PlanFile, base: Path, out: Path, console: Console) -> Prepared:
    """Turn the plan's text files, relative to ``base``, into a tokenizer and token files in ``out``."""
    from pathswitch.data import VersionText, prepare

    data = plan_file.data
    assert data is not None
    return prepare(
        [VersionText(version.name, version.train, version.test) for version in plan_file.versions],
        base=base,
        out=out,
        vocab_size=data.vocab_size,
        tokenizer_model=base / data.tokenizer if data.tokenizer else None,
        separator=data.separator,
        progress=lambda message: console.print(f"data: {message}", highlight=False),
    )
