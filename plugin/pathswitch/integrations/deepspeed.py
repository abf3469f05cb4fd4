"""Patches of ``DeepSpeedEngine`` that a configuration alone cannot express; each replaces one method, once.

They act only in engines whose scheduler follows a plan.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from pathswitch.errors import PathSwitchError
from pathswitch.integrations.checkpoints import EngineCheckpoints
from pathswitch.integrations.loading import load
from pathswitch.integrations.path_state import FollowsPlan

logger = logging.getLogger("pathswitch")

Wrapper = Callable[..., Any]


def patch_engine() -> None:
    """Patch DeepSpeedEngine; idempotent.

    Raises:
        PathSwitchError: this DeepSpeed lacks a method that is to be patched; none is patched then.
    """
    patches: dict[str, Wrapper] = {
        "get_lr": _get_lr,
        "_configure_checkpointing": _configure_checkpointing,
        "save_checkpoint": _save_checkpoint,
        "load_checkpoint": _load_checkpoint,
    }
    for name in patches:
        if not callable(getattr(DeepSpeedEngine, name, None)):
            version = deepspeed.__version__
            raise PathSwitchError(
                f"deepspeed.runtime.engine.DeepSpeedEngine.{name} is not there: DeepSpeed {version} is not supported"
            )
    for name, replacement in patches.items():
        _patch(name, replacement)


def _patch(name: str, replacement: Wrapper) -> None:
    original = getattr(DeepSpeedEngine, name)
    if getattr(original, "pathswitch_patch", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(getattr(self, "lr_scheduler", None), FollowsPlan):
            return original(self, *args, **kwargs)
        named = inspect.signature(original).bind(self, *args, **kwargs).arguments
        named.pop("self")
        return replacement(original, self, **named)

    method.pathswitch_patch = True  # type: ignore[attr-defined]
    setattr(DeepSpeedEngine, name, method)
    logger.info("pathswitch: patched DeepSpeedEngine.%s", name)


def _get_lr(original: Wrapper, engine: Any) -> list[float]:
    """Return the LR of the last update: DeepSpeed logs after the scheduler's step, one update too late."""
    lrs: list[float] = engine.lr_scheduler.get_last_update_lr()
    return lrs


def _configure_checkpointing(original: Wrapper, engine: Any) -> None:
    """Read the configuration's section once DeepSpeed's own checkpoint writer is there."""
    original(engine)
    engine.pathswitch_checkpoints = EngineCheckpoints(engine)


def _save_checkpoint(original: Wrapper, engine: Any, **arguments: Any) -> Any:
    """Commit what is saved: DeepSpeed moves ``latest`` before the other ranks have written."""
    return engine.pathswitch_checkpoints.save(original, **arguments)


def _load_checkpoint(original: Wrapper, engine: Any, **arguments: Any) -> Any:
    """Verify what is loaded, and refuse what DeepSpeed turns into a silent start from scratch."""
    result = load(engine.pathswitch_checkpoints, original, **arguments)
    engine.lr_scheduler.check_position()
    return result
