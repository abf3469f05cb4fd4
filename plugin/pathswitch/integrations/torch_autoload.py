"""Entry point of the group ``torch.backends``: PyTorch calls ``register`` at the end of every ``import torch``.

DeepSpeed looks a scheduler's name up in ``torch.optim.lr_scheduler`` and an optimizer's in ``torch.optim``; a name in
each is the whole adoption, and training scripts stay untouched. TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches PyTorch's
loading of entry points off; then ``import pathswitch.integrations`` in the script does the same.

Signals that PATHSWITCH_STOP_SIGNALS names are noted from here on, before the slow imports and the making of an engine.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any


@cache
def register() -> None:
    """Set ``PathSwitchLR`` and ``PathSwitchAdamW``, once a process; never raises into ``import torch``."""
    if os.environ.get("PATHSWITCH_STOP_SIGNALS"):
        _note_signals()
    try:
        from torch.optim import lr_scheduler

        from pathswitch.integrations.scheduler import PathSwitchLR

        lr_scheduler.PathSwitchLR = PathSwitchLR  # type: ignore[attr-defined]
        _offer_optimizer()
    except Exception as error:  # an exception here would make `import torch` itself fail, in every program
        print(f"pathswitch: PathSwitchLR is not available: {error!r}", file=sys.stderr)


def _offer_optimizer() -> None:
    """Let ``torch.optim.PathSwitchAdamW`` be found: its kernels are imported when somebody asks for it."""
    from torch import optim

    before = vars(optim).get("__getattr__")

    def find(name: str) -> Any:
        if name == "PathSwitchAdamW":
            from pathswitch.integrations.adamw import PathSwitchAdamW

            optim.PathSwitchAdamW = PathSwitchAdamW  # type: ignore[attr-defined]
            return PathSwitchAdamW
        if before is not None:
            return before(name)
        raise AttributeError(f"module {optim.__name__!r} has no attribute {name!r}")

    vars(optim)["__getattr__"] = find


def _note_signals() -> None:
    try:
        from pathswitch.integrations import loader_workers, stop_signals

        if stop_signals.prepare_process():
            loader_workers.protect()
    except Exception as error:
        print(f"pathswitch: PATHSWITCH_STOP_SIGNALS is not followed: {error!r}", file=sys.stderr)
