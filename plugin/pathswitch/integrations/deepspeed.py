"""Patches of ``DeepSpeedEngine`` that a configuration alone cannot express; each replaces one method, once.

They act only in engines whose scheduler is PathSwitchLR.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.runtime.engine import DeepSpeedEngine

from pathswitch.errors import PathSwitchError, RunError
from pathswitch.integrations.scheduler import PathSwitchLR

logger = logging.getLogger("pathswitch")

Wrapper = Callable[..., Any]


def patch_engine() -> None:
    """Patch DeepSpeedEngine; idempotent.

    Raises:
        PathSwitchError: this DeepSpeed lacks a method that is to be patched; none is patched then.
    """
    patches: dict[str, Wrapper] = {"get_lr": _get_lr, "load_checkpoint": _load_checkpoint}
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
        if not isinstance(getattr(self, "lr_scheduler", None), PathSwitchLR):
            return original(self, *args, **kwargs)
        return replacement(original, self, *args, **kwargs)

    method.pathswitch_patch = True  # type: ignore[attr-defined]
    setattr(DeepSpeedEngine, name, method)
    logger.info("pathswitch: patched DeepSpeedEngine.%s", name)


def _get_lr(original: Wrapper, engine: Any) -> list[float]:
    """Return the LR of the last update: DeepSpeed logs after the scheduler's step, one update too late."""
    lrs: list[float] = engine.lr_scheduler.get_last_update_lr()
    return lrs


def _load_checkpoint(
    original: Wrapper, engine: Any, load_dir: str, tag: str | None = None, *args: Any, **kwargs: Any
) -> Any:
    """Refuse what DeepSpeed turns into a silent start from scratch: no `latest` beside checkpoints, or none at all."""
    if tag is None and not engine.load_universal_checkpoint():
        _require_latest(Path(load_dir), engine.lr_scheduler)
    result = original(engine, load_dir, tag, *args, **kwargs)
    engine.lr_scheduler.check_position()
    return result


def _require_latest(load_dir: Path, scheduler: PathSwitchLR) -> None:
    latest, path = load_dir / "latest", scheduler.path
    if latest.is_file() and latest.read_text().strip():
        return
    found = f"{os.fspath(latest)} is {'empty' if latest.is_file() else 'missing'}"
    tags = sorted({file.parent.name for file in load_dir.glob("*/*model_states.pt")})
    if tags:
        raise RunError(
            f"{found}, but the folder holds checkpoints ({', '.join(tags)}): DeepSpeed would silently train from "
            "scratch. Load one by its tag, or write its name into this file"
        )
    if path.start_step > 0:
        raise RunError(
            f"{found} and the folder holds no checkpoint: path {path.name!r} starts from a checkpoint of "
            f"{path.parent!r} at step {path.start_step}"
        )
    if latest.is_file():
        raise RunError(f"{found} and the folder holds no checkpoint: remove the file to train from the beginning")
