"""A rank that reads from a DataLoader while its whole process group gets the signals: ``METHOD [HOW]``.

HOW is ``control`` to note the signals without protecting the workers.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any

from torch.utils.data import DataLoader, Dataset

from pathswitch.integrations import stop_signals


class Slow(Dataset[int]):
    """Numbers that take a while, so that the workers are at work when the signals come."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


def main() -> None:
    method, control = sys.argv[1], "control" in sys.argv
    if control:
        signal.signal(signal.SIGTERM, lambda *_: None)
    iterator: Any = iter(DataLoader(Slow(), num_workers=2, multiprocessing_context=method))
    numbers = []
    for batch in iterator:
        numbers += batch.tolist()
        if len(numbers) == 3:
            for name in ("TERM",) if control else ("TERM", "USR2"):
                # Not from this process: its workers would take it for theirs.
                subprocess.run(["kill", f"-{name}", "--", f"-{os.getpgid(0)}"], check=False)
    noted = stop_signals.received() == signal.SIGTERM
    print("read", numbers == list(range(24)), "noted", noted, flush=True)
    workers = [*iterator._workers]
    print("ended", [worker.exitcode for worker in workers], flush=True)
    again: Any = iter(DataLoader(Slow(), num_workers=1, multiprocessing_context=method))
    next(again)
    again._workers[0].terminate()
    again._workers[0].join(30)
    print("terminated", again._workers[0].exitcode, flush=True)
    left: Any = iter(DataLoader(Slow(), num_workers=1, multiprocessing_context=method, persistent_workers=True))
    next(left)
    print("workers", *(worker.pid for worker in left._workers), flush=True)  # left to the end of the interpreter


if __name__ == "__main__":
    main()
