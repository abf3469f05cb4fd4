"""Entry point of the group ``torch.backends``: PyTorch calls ``register`` at the end of every ``import torch``.

DeepSpeed looks a scheduler's name up in ``torch.optim.lr_scheduler``; setting one attribute there is the whole
adoption, and training scripts stay untouched. TORCH_DEVICE_BACKEND_AUTOLOAD=0 switches PyTorch's loading of entry
points off; then ``import pathswitch.integrations`` in the script does the same.
"""

from __future__ import annotations

import sys
from functools import cache


@cache
def register() -> None:
    """Set ``torch.optim.lr_scheduler.PathSwitchLR``, once a process; never raises into ``import torch``."""
    try:
        from torch.optim import lr_scheduler

        from pathswitch.integrations.scheduler import PathSwitchLR

        lr_scheduler.PathSwitchLR = PathSwitchLR  # type: ignore[attr-defined]
    except Exception as error:  # an exception here would make `import torch` itself fail, in every program
        print(f"pathswitch: PathSwitchLR is not available: {error!r}", file=sys.stderr)
