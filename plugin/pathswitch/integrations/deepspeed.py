"""Patches of DeepSpeed's engines that a configuration alone cannot express; each replaces one method, once.

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
from deepspeed.runtime.pipe.engine import PipelineEngine

from pathswitch.errors import PathSwitchError
from pathswitch.integrations import stop_signals
from pathswitch.integrations.checkpoints import EngineCheckpoints, read_engine_section
from pathswitch.integrations.engine_job import EngineJob
from pathswitch.integrations.job_control import JobControl
from pathswitch.integrations.loading import load
from pathswitch.integrations.path_state import FollowsPlan

logger = logging.getLogger("pathswitch")

Wrapper = Callable[..., Any]


def patch_engine() -> None:
    """Patch DeepSpeedEngine and PipelineEngine; idempotent.

    Raises:
        PathSwitchError: this DeepSpeed lacks a method that is to be patched; none is patched then.
    """
    patches: list[tuple[type[Any], str, Wrapper]] = [
        (DeepSpeedEngine, "get_lr", _get_lr),
        (DeepSpeedEngine, "_configure_checkpointing", _configure_checkpointing),
        (DeepSpeedEngine, "save_checkpoint", _save_checkpoint),
        (DeepSpeedEngine, "load_checkpoint", _load_checkpoint),
        (DeepSpeedEngine, "step", _around_step),
        (PipelineEngine, "train_batch", _around_step),
    ]
    for engine_class, name, _ in patches:
        if not callable(getattr(engine_class, name, None)):
            place, version = f"{engine_class.__module__}.{engine_class.__qualname__}", deepspeed.__version__
            raise PathSwitchError(f"{place}.{name} is not there: DeepSpeed {version} is not supported")
    for engine_class, name, replacement in patches:
        _patch(engine_class, name, replacement)


def _patch(engine_class: type[Any], name: str, replacement: Wrapper) -> None:
    original = getattr(engine_class, name)
    if getattr(original, "pathswitch_patch", False):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(getattr(self, "lr_scheduler", None), FollowsPlan):
            return original(self, *args, **kwargs)
        return replacement(original, self, *args, **kwargs)

    method.pathswitch_patch = True  # type: ignore[attr-defined]
    setattr(engine_class, name, method)
    logger.info("pathswitch: patched %s.%s", engine_class.__name__, name)


def _named(original: Wrapper, engine: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return a call's arguments by name."""
    arguments = inspect.signature(original).bind(engine, *args, **kwargs).arguments
    arguments.pop("self")
    return arguments


def _get_lr(original: Wrapper, engine: Any) -> list[float]:
    """Return the LR of the last update: DeepSpeed logs after the scheduler's step, one update too late."""
    lrs: list[float] = engine.lr_scheduler.get_last_update_lr()
    return lrs


def _configure_checkpointing(original: Wrapper, engine: Any) -> None:
    """Read the configuration's section, and let DeepSpeed make its checkpoint writer."""
    section = read_engine_section(engine)
    control = None if section.job is None else JobControl(section.job.signals, engine.device)
    # With a section of the scheduler's, the framework around DeepSpeed acts on them.
    unheard = control is None and engine.lr_scheduler.section is None
    if unheard and stop_signals.release() and engine.global_rank == 0:
        logger.warning("pathswitch: the ds_config has no section pathswitch.job: signals end this job as ever")
    with stop_signals.blocked("spawn" if _has_decoupled_writer(engine) else "fork"):
        original(engine)
    checkpoints = engine.pathswitch_checkpoints = EngineCheckpoints(engine, section)
    engine.pathswitch_job = None if control is None else EngineJob(checkpoints, control)


def _save_checkpoint(original: Wrapper, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Commit what is saved: DeepSpeed moves ``latest`` before the other ranks have written."""
    arguments = _named(original, engine, *args, **kwargs)
    result = engine.pathswitch_checkpoints.save(original, **arguments)
    if engine.pathswitch_job is not None:
        engine.pathswitch_job.after_save(arguments["save_dir"], arguments.get("save_latest", True))
    return result


def _load_checkpoint(original: Wrapper, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Verify what is loaded, and refuse what DeepSpeed turns into a silent start from scratch."""
    arguments = _named(original, engine, *args, **kwargs)
    result = load(engine.pathswitch_checkpoints, original, **arguments)
    engine.lr_scheduler.check_position()
    if not arguments.get("load_module_only", False):
        engine.pathswitch_checkpoints.note_loaded(result[1])
    return result


def _around_step(original: Wrapper, engine: Any, *args: Any, **kwargs: Any) -> Any:
    """Save and end behind a step where that is due, in a job that asks for it."""
    if engine.pathswitch_job is None:
        return original(engine, *args, **kwargs)
    return engine.pathswitch_job.around(lambda: original(engine, *args, **kwargs))


def _has_decoupled_writer(engine: Any) -> bool:
    """Return whether a process of its own will write the checkpoints."""
    writer = engine._config._param_dict.get("checkpoint", {}).get("writer") or {}
    return bool(writer.get("decoupled", False))
