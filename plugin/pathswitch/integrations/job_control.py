"""What all ranks of a job agree on at the end of a step, whether it is asked to stop, and the file of its progress.

A signal reaches some ranks and not others, and none of them in the same step: the ranks take the largest of what each
has seen, and act on that together.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from pathswitch.atomic import temp_path
from pathswitch.errors import ConfigError
from pathswitch.integrations import loader_workers, stop_signals

logger = logging.getLogger("pathswitch")

STOP_FILE_VARIABLE, PROGRESS_FILE_VARIABLE = "PATHSWITCH_STOP_FILE", "PATHSWITCH_PROGRESS_FILE"
STOP_FILE_SECONDS, PROGRESS_SECONDS = 1.0, 5.0
STOP_FILE_SEEN = 1_000  # beyond every signal's number


def is_asked_for() -> bool:
    """Return whether the environment says how this job will be asked to stop."""
    return any(os.environ.get(name) for name in (STOP_FILE_VARIABLE, stop_signals.SIGNALS_VARIABLE))


class JobControl:
    """The stop signals, the stop file and the progress file of one rank.

    Args:
        signals: names of the signals to note, beside those that PATHSWITCH_STOP_SIGNALS names.
        device: where the values of all ranks are reduced.
        foreign: names of signals that the training framework handles itself.

    Raises:
        ConfigError: PATHSWITCH_STOP_SIGNALS names what is no signal.
    """

    def __init__(self, signals: Iterable[str], device: torch.device, *, foreign: Iterable[str] = ()) -> None:
        self._flags = torch.zeros(2, dtype=torch.int32, device=device)
        self._is_first = dist.get_rank() == 0
        self._stop_file = _path(STOP_FILE_VARIABLE) if self._is_first else None
        self._progress_file = _path(PROGRESS_FILE_VARIABLE) if self._is_first else None
        self._next_look = self._next_report = 0.0
        self._mark: tuple[float, int, int] | None = None
        for name in stop_signals.install({*signals, *_signals_of_environment()} - set(foreign)):
            self.say(f"{name}: the script's handler is replaced: this signal asks the job to save and end")
        loader_workers.protect()

    def agree(self, opinion: bool = False) -> tuple[str | None, bool]:
        """Return, the same on all ranks, what asked any of them to stop, and whether any of them is of an opinion."""
        self._flags[0] = STOP_FILE_SEEN if self._sees_stop_file() else stop_signals.received()
        self._flags[1] = opinion
        dist.all_reduce(self._flags, op=dist.ReduceOp.MAX)
        seen, shared = self._flags.tolist()
        if seen >= STOP_FILE_SEEN:
            return f"stop file {os.environ.get(STOP_FILE_VARIABLE)}", bool(shared)
        return signal.Signals(seen).name if seen else None, bool(shared)

    def report(self, step: int, lr: float, samples: int, *, last: bool = False) -> None:
        """Write the progress file, on the first rank, every few seconds, and for the last time.

        Args:
            step: updates behind the job.
            lr: the LR of the last update.
            samples: samples seen.
            last: whether the job ends now.
        """
        if self._progress_file is None or (time.monotonic() < self._next_report and not last):
            return
        now, mark = time.monotonic(), self._mark
        if mark is None or step > mark[1]:
            self._mark = (now, step, samples)
        if mark is None or step <= mark[1]:
            return  # nothing to measure yet
        self._next_report = now + PROGRESS_SECONDS
        seconds = now - mark[0]
        progress = {
            "step": step,
            "lr": lr,
            "seconds_per_step": seconds / (step - mark[1]),
            "samples_per_s": (samples - mark[2]) / seconds,
            "time": time.time(),
        }
        _replace(self._progress_file, json.dumps(progress) + "\n")

    def say(self, message: str) -> None:
        """Print a line on the first rank."""
        if self._is_first:
            print(f"pathswitch: {message}", flush=True)

    def end(self, message: str) -> NoReturn:
        """Say why, wait for all ranks, and end this process with exit code 0."""
        self.say(message)
        stop_signals.ignore()
        dist.barrier()
        raise SystemExit(0)

    def _sees_stop_file(self) -> bool:
        if self._stop_file is None or time.monotonic() < self._next_look:
            return False
        self._next_look = time.monotonic() + STOP_FILE_SECONDS
        return os.path.exists(self._stop_file)


def _path(variable: str) -> Path | None:
    return Path(name) if (name := os.environ.get(variable)) else None


def _signals_of_environment() -> tuple[str, ...]:
    names = stop_signals.names_of(os.environ.get(stop_signals.SIGNALS_VARIABLE, ""))
    for name in names:
        if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
            where = f"environment variable {stop_signals.SIGNALS_VARIABLE}"
            raise ConfigError(where, given=name, allowed="names of signals with commas, as SIGTERM,SIGUSR2")
    return names


def _replace(path: Path, text: str) -> None:
    """Write a file whole; not to the disk at once: a step would wait for that, and nobody needs an old progress."""
    temp = temp_path(path)
    try:
        temp.write_text(text)
        os.replace(temp, path)
    except OSError as error:
        logger.warning("pathswitch: %s: the progress cannot be written: %s", path, error.strerror)
        temp.unlink(missing_ok=True)
