"""Patches of ``DeepSpeedEngine`` that a configuration alone cannot express; each replaces one method, once, and logs it.

They act only in engines whose scheduler is PathSwitchLR.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine

from pathswitch.errors import PathSwitchError, RunError
from pathswitch.integrations.scheduler import PathSwitchLR

logger = logging.getLogger("pathswitch")

Wrapper = Callable[..., Any]


def patch_engine() -> None:
    """Patch DeepSpeedEngine; idempotent.

    Raises:
        PathSwitchError: this DeepSpeed has no such method.
    """
    _patch("get_lr", _get_lr)
    _patch("load_checkpoint", _load_checkpoint)


def _patch(name: str, replacement: Wrapper) -> None:
    original = getattr(DeepSpeedEngine, name, None)
    if original is None:
        raise PathSwitchError(
            f"deepspeed.runtime.engine.DeepSpeedEngine.{name} is not there: DeepSpeed is not supported"
        )
    if getattr(original, "pathswitch_patch", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.lr_scheduler, PathSwitchLR):
            return original(self, *args, **kwargs)
        return replacement(original, self, *args, **kwargs)

    method.pathswitch_patch = True  # type: ignore[attr-defined]
    setattr(DeepSpeedEngine, name, method)
    logger.info("pathswitch: patched DeepSpeedEngine.%s", name)


def _get_lr(original: Wrapper, engine: Any) -> list[float]:
    """Return the LR of the last update: DeepSpeed logs after the scheduler's step, one update too late."""
    lrs: list[float] = engine.lr_scheduler.get_last_update_lr()
    return lrs


def _load_checkpoint(original: Wrapper, engine: Any, load_dir: str, tag: str | None = None, **kwargs: Any) -> Any:
    """Refuse what DeepSpeed turns into a silent start from scratch: no `latest` beside checkpoints, or none at all."""
    if tag is None and not engine.load_universal_checkpoint():
        _require_latest(Path(load_dir), engine.lr_scheduler)
    result = original(engine, load_dir, tag, **kwargs)
    engine.lr_scheduler.check_position()
    return result


def _require_latest(load_dir: Path, scheduler: PathSwitchLR) -> None:
    latest = load_dir / "latest"
    if latest.is_file() and latest.read_text().strip():
        return
    tags = sorted(file.parent.name for file in load_dir.glob("*/*model_states.pt"))
    found = "empty" if latest.is_file() else "missing"
    if tags:
        names = ", ".join(dict.fromkeys(tags))
        raise RunError(
            f"{os.fspath(latest)} is {found}, but the folder holds checkpoints ({names}): DeepSpeed would silently train "
            "from scratch. Load one by its tag, or write its name into this file"
        )
    path = scheduler.path
    if path.parent is not None:
        raise RunError(
            f"{os.fspath(latest)} is {found} and the folder holds no checkpoint: path {path.name!r} starts from a "
            f"checkpoint of {path.parent!r} at step {path.start_step}"
        )
