"""Progress of a run: a bar per path on a terminal, a plain line every few seconds in a log."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from pathswitch.versions import Path as TrainingPath

LINE_SECONDS = 5.0


class PathProgress:
    """Follows one path's metrics file; ``tick()`` shows what is new in it."""

    def __init__(
        self, console: Console, path: TrainingPath, metrics: Path, *, first_step: int, tokens_per_step: int
    ) -> None:
        self._console, self._metrics = console, metrics
        self._label = f"{path.paradigm}/{path.name}"
        self._closing = "saving" if path.release is None else "saving, evaluating on all test text, exporting"
        self._first_step, self._end_step, self._tokens_per_step = first_step, path.end_step, tokens_per_step
        self._inode, self._offset = _inode_and_size(metrics)
        self._last_line = time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> PathProgress:
        """Show the bar, or say that the ranks are starting."""
        if self._console.is_terminal:
            columns = (TextColumn("{task.description:<24}"), BarColumn(None), MofNCompleteColumn())
            details = (TextColumn("{task.fields[details]}"), TimeRemainingColumn(compact=True))
            self._bar = Progress(*columns, *details, console=self._console, expand=True)
            steps = self._end_step - self._first_step
            self._task = self._bar.add_task(self._label, total=steps, details="starting")
            self._bar.start()
        else:
            self._console.print(f"{self._label}: starting at step {self._first_step} of {self._end_step}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the finished bar standing."""
        self.tick()
        if self._bar is not None:
            self._bar.update(self._task, details="done" if error is None else "stopped")
            self._bar.stop()

    def tick(self) -> None:
        """Show the newest update if there is one."""
        record = self._newest_record()
        if record is None:
            return
        done, speed = int(record["step"]) + 1, self._tokens_per_step / float(record["seconds"])
        details = f"loss {record['loss']:.3f}  lr {record['lr']:.2e}  {speed:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done - self._first_step, details=details)
        elif time.monotonic() - self._last_line >= LINE_SECONDS or done == self._end_step:
            self._last_line = time.monotonic()
            self._console.print(f"{self._label}: step {done} of {self._end_step}  {details}", highlight=False)
        if done == self._end_step:
            self._say_closing()

    def _say_closing(self) -> None:
        """Say what goes on behind the last update: no step is shown any more."""
        if self._bar is not None:
            self._bar.update(self._task, details=self._closing)
        else:
            self._console.print(f"{self._label}: {self._closing}", highlight=False)

    def _newest_record(self) -> dict[str, Any] | None:
        """Return the last whole line that has appeared since the last look."""
        if not self._metrics.is_file():
            return None
        with self._metrics.open("rb") as file:
            # A resumed path replaces the file by one without the updates that it does again.
            inode = os.fstat(file.fileno()).st_ino
            start = self._offset if inode == self._inode else 0
            file.seek(start)
            new = file.read()
        self._inode = inode
        whole, newline, _ = new.rpartition(b"\n")
        self._offset = start + len(whole) + len(newline)
        lines = whole.splitlines()
        record: dict[str, Any] | None = json.loads(lines[-1]) if lines else None
        return record


def _inode_and_size(file: Path) -> tuple[int, int]:
    """Return what tells a file from its replacement, and its size in bytes; zeros where there is none."""
    if not file.is_file():
        return 0, 0
    status = file.stat()
    return status.st_ino, status.st_size
