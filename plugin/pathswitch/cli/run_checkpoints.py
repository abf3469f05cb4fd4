"""Where a run has its checkpoints: in the folders of the embedded trainer, and wherever its ledger says."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import cast

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pathswitch.checkpoint.fork import CompareMode
from pathswitch.errors import ConfigError
from pathswitch.launch.agent_lock import holder
from pathswitch.run_folder import PathFolder
from pathswitch.versions import PARADIGMS
from pathswitch.versions.ledger import run_ledger
from pathswitch.versions.records import BranchRecord, CheckpointRecord, Record

LINE_SECONDS = 5.0


def trained_paths(run: Path) -> list[tuple[str, str, PathFolder]]:
    """Return (paradigm, path, files) of every path that has a folder for checkpoints in the run folder."""
    found = [(paradigm, folder.parent) for paradigm in PARADIGMS for folder in (run / paradigm).glob("*/checkpoints")]
    return [(paradigm, folder.name, PathFolder(folder)) for paradigm, folder in sorted(found)]


def records_of(run: Path) -> list[Record]:
    """Return all records of a run; none where it has no ledger."""
    return [stored.record for stored in run_ledger(run).read().records]


def recorded_checkpoints(run: Path, records: list[Record]) -> dict[Path, set[str]]:
    """Return the folders in which the ledger places checkpoints, with the digests of their manifests."""
    folders: dict[Path, set[str]] = {}
    for record in records:
        if isinstance(record, CheckpointRecord | BranchRecord):
            folders.setdefault(run.resolve() / record.folder, set()).add(record.manifest)
    return folders


@contextmanager
def path_lock(files: PathFolder, *, shared: bool) -> Iterator[bool | None]:
    """Hold the lock of a path's training job: True if it is held now, False if a job holds it, None without a lock.

    Jobs of a user's own script train without a lock, unless `pathswitch submit` has started them: None says nothing.
    """
    if holder(files) is not None:
        yield False
        return
    try:
        file = (files.folder / "lock").open("rb")
    except FileNotFoundError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def compare_mode(option: str, mode: str, key: bytes | None) -> CompareMode:
    """Return the checked mode of verification that ``option`` gives.

    Raises:
        ConfigError: the mode is unknown, or it compares no digests for a signing key to vouch for.
    """
    if mode not in ("full", "sizes"):
        raise ConfigError(option, given=mode, allowed="full, sizes")
    if key is not None and mode != "full":
        raise ConfigError(option, given=mode, allowed="full: a signature vouches for digests, which sizes do not tell")
    return cast(CompareMode, mode)


class ByteProgress:
    """Shows on stderr how many bytes are done: bars on a terminal, a plain line every few seconds in a log."""

    def __init__(self) -> None:
        self._console, self._last_line = Console(stderr=True), time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(compact=True))
        self._bars = Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal)

    def __enter__(self) -> ByteProgress:
        """Begin to show."""
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bars away: what is printed afterwards tells the result."""
        self._bars.stop()

    def ticker(self, label: str, total: int) -> Callable[[int], None]:
        """Return a function that takes the bytes done since its last call; its bar appears with the first."""
        task: TaskID | None = None
        done = 0

        def tick(size: int) -> None:
            nonlocal task, done
            done += size
            if task is None:
                task = self._bars.add_task(label, total=total)
            self._bars.update(task, completed=done)
            if not self._console.is_terminal and time.monotonic() - self._last_line >= LINE_SECONDS:
                self._last_line = time.monotonic()
                self._console.print(f"{label}: {decimal(done)} of {decimal(total)}", highlight=False)

        return tick


def say(console: Console, line: str) -> None:
    """Print one line as it is: folders are neither wrapped nor coloured."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)
