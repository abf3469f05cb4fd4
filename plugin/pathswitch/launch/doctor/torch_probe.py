"""Imports torch as a job does and says what it has, bit by bit: its process may hang or crash in between."""

from __future__ import annotations

import json
import sys
from typing import Any


def say(**facts: Any) -> None:
    """Print some facts as one line of JSON."""
    print("pathswitch-doctor " + json.dumps(facts), flush=True)


def probe() -> None:
    """Say what torch is, whether its plug-ins are loaded, and which GPUs it sees."""
    import torch
    from torch.optim import lr_scheduler

    scheduler = getattr(lr_scheduler, "PathSwitchLR", None)
    module = sys.modules[scheduler.__module__] if scheduler is not None else None
    say(torch=torch.__version__, file=torch.__file__, scheduler=getattr(module, "__file__", None))
    say(cuda=torch.version.cuda, hip=torch.version.hip)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    say(devices=[torch.cuda.get_device_name(device) for device in range(count)])
    if count:
        say(bf16=all(torch.cuda.get_device_capability(device)[0] >= 8 for device in range(count)))
        say(nccl=".".join(map(str, torch.cuda.nccl.version())))  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    probe()
