"""The trainer's rank; in the first test set, rank 1 gets a signal."""

from __future__ import annotations

import gc
import os
import signal
import sys
from typing import Any

from pathswitch.trainer import loop
from pathswitch.trainer.__main__ import main

evaluate = loop.evaluate


def asked(*args: Any, **kwargs: Any) -> Any:
    assert gc.isenabled()  # it is off while modules come in
    if kwargs["rank"] == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return evaluate(*args, **kwargs)


loop.evaluate = asked

if __name__ == "__main__":
    sys.exit(main())
