"""Where a scheduler stands on its path: the state that a checkpoint keeps, and what it allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from pathswitch.errors import ScheduleError
from pathswitch.schedule.paths import Field
from pathswitch.versions import Path, Plan

if TYPE_CHECKING:  # pydantic would slow down every `import torch`
    from pathswitch.checkpoint import Manifest, PathSwitchSection

STATE_FORMAT = 1


class FollowsPlan:
    """Base of the schedulers whose LR is a path's: an engine of DeepSpeed with one has durable checkpoints."""

    plan: Plan
    path: Path
    section: PathSwitchSection | None = None
    """What stands for the section "pathswitch" where the ds_config has none."""

    def data_settings(self) -> dict[str, Any] | None:
        """Return the arguments that the samples follow from, where the training script's are known."""
        return None

    def check_manifest(self, manifest: Manifest) -> None:
        """Refuse to go on from a checkpoint whose data_settings are not this job's."""


def forks_from(plan: Plan, path: Path) -> dict[str, int]:
    """Return the steps where other paths start from a checkpoint of this one, by their names."""
    paths = plan.paths(path.paradigm)
    return {other.name: other.start_step for other in paths if other.parent == path.name and other.start_step > 0}


def path_state(path: Path, step: int) -> dict[str, Any]:
    """Return the counter, the path, the fields that determine its LR, and their digest."""
    return {
        "format": STATE_FORMAT,
        "step": step,
        "paradigm": path.paradigm,
        "path": path.name,
        "schedule": dict(path.fields),
        "digest": path.digest,
    }


def is_path_state(state: object) -> bool:
    """Return whether a checkpoint's scheduler state is one of ours."""
    return isinstance(state, Mapping) and "schedule" in state and "step" in state


def step_of_state(plan: Plan, path: Path, state: Mapping[str, Any]) -> int:
    """Return the counter of a checkpoint of the same path (resume) or, at the fork step, of its parent (fork).

    Raises:
        ScheduleError: the state belongs to another path or another schedule, or to no step where this path forks.
    """
    if state.get("format") != STATE_FORMAT:
        raise ScheduleError(f"scheduler state format: given {state.get('format')!r}; allowed: {STATE_FORMAT}")
    saved, step = (state["paradigm"], state["path"]), int(state["step"])
    if saved == (path.paradigm, path.name):
        _require_same_fields(path, path, state["schedule"])
    elif path.parent is not None and saved == (path.paradigm, path.parent):
        _require_same_fields(path, plan.path(path.parent, path.paradigm), state["schedule"])
        if step != path.start_step:
            raise ScheduleError(
                f"path {path.name!r} forks from {path.parent!r} at step {path.start_step}, "
                f"but the checkpoint stands at step {step}"
            )
    else:
        allowed = f"{path.name!r}" + (f" or its parent {path.parent!r}" if path.parent else "")
        raise ScheduleError(
            f"path {path.name!r} ({path.paradigm}): the checkpoint belongs to path {saved[1]!r} ({saved[0]}); "
            f"allowed: {allowed} ({path.paradigm})"
        )
    return step


def check_position(path: Path, step: int) -> None:
    """Raise ScheduleError unless a counter lies between a path's first and last step."""
    if step < path.start_step:
        parent = f"a checkpoint of {path.parent!r}" if path.parent else "the beginning"
        raise ScheduleError(
            f"path {path.name!r} starts from {parent} at step {path.start_step}, but the counter stands at {step}: "
            "was a checkpoint loaded, with its scheduler state?"
        )
    if is_past_end(path, step - 1):
        raise ScheduleError(end_message(path, step))


def is_past_end(path: Path, step: int) -> bool:
    """Return whether the update number ``step`` lies behind the path's last one."""
    return not path.open_ended and step >= path.end_step


def end_message(path: Path, step: int) -> str:
    """Say that a path was asked to go on to ``step``."""
    return (
        f"path {path.name!r} ends at step {path.end_step} by its plan, and was asked to go on to step "
        f"{step}: stop the training there, or give the version more steps in the plan"
    )


def _require_same_fields(path: Path, expected_path: Path, saved: Mapping[str, Field]) -> None:
    expected = expected_path.fields
    names = [*expected, *(name for name in saved if name not in expected)]
    differing = [name for name in names if saved.get(name) != expected.get(name)]
    if differing:
        lines = "; ".join(f"{name}: checkpoint {saved.get(name)!r}, plan {expected.get(name)!r}" for name in differing)
        raise ScheduleError(
            f"path {expected_path.name!r} ({path.paradigm}): the checkpoint was trained by another schedule: {lines}"
        )


def describe_state(state: object) -> str:
    """Return what a state is that is not ours."""
    if isinstance(state, Mapping):
        return f"keys {', '.join(map(str, cast(Mapping[str, Any], state)))}"
    return type(state).__name__
