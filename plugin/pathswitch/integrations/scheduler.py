"""PathSwitchLR: the plan's LR, exactly, in every optimizer update, under DeepSpeed, plain torch and Hugging Face.

The optimizer's own state carries LRs of its own: DeepSpeed loads it after the scheduler's, and ZeRO then trains a
branch's first update at its parent's LR. Hence two rules: the LR is a function of one counter and the plan, and it is
written into the param groups again right before each update.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

from pathswitch.errors import ConfigError, ScheduleError
from pathswitch.integrations.path_state import (
    FollowsPlan,
    check_position,
    describe_state,
    end_message,
    is_past_end,
    is_path_state,
    path_state,
    step_of_state,
)
from pathswitch.versions import MAIN, Paradigm, Path, Plan

PATH_VARIABLE = "PATHSWITCH_PATH"


class PathSwitchLR(FollowsPlan, LRScheduler):
    """Sets the LR of every update to the plan's LR for one path, times the param group's own multiple.

    Where param groups have LRs of their own, a group's multiple is its LR over the optimizer's default LR (best set to
    max_lr) when the scheduler is made; where all have the same LR it is 1. ``step()`` is called after each optimizer
    update. The state is one counter, the number of updates done, with the fields of the schedule and their digest.

    Args:
        optimizer: a torch optimizer, or a wrapper that holds one in ``.optimizer`` (ZeRO, fp16, Accelerate).
        plan: a plan file (relative to the working directory); without it ``inline`` holds the plan.
        path: ``main``, or a version's name; the environment variable PATHSWITCH_PATH overrides it.
        paradigm: ``path_switching``, or the baseline that a path belongs to.
        initial_step: updates already done, for loading a checkpoint that another scheduler, or none, wrote.
        inline: the keys of a plan's [schedule], and ``versions`` with name, steps and their own decay.

    Raises:
        ConfigError: a parameter is unknown or out of range, or the plan has no such path.
    """

    _last_lr: list[float]  # type: ignore[assignment]
    _step_count = 0  # Accelerate adds to it while it accumulates gradients

    def __init__(
        self,
        optimizer: Any,
        plan: str | None = None,
        path: str = MAIN,
        paradigm: Paradigm = "path_switching",
        initial_step: int | None = None,
        **inline: object,
    ) -> None:
        self.optimizer = _torch_optimizer(optimizer)
        self.plan = _resolve_plan(plan, inline)
        self.path = _select_path(self.plan, path, paradigm)
        self._foreign_step = _check_initial_step(initial_step)
        self._multiples = _lr_multiples(self.optimizer, self.plan.main.max_lr)
        self._updates = 0
        self._updated_since_step = False
        self._set_step(0)
        self._last_update_lrs = self._last_lr
        self._hook()
        if "deepspeed.runtime.engine" in sys.modules:
            from pathswitch.integrations.deepspeed import patch_engine

            patch_engine()

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """Optimizer updates done; the name is torch's."""
        return self._updates

    @property
    def base_lrs(self) -> list[float]:  # type: ignore[override]
        """The maximum LR of every param group."""
        return [multiple * self.plan.main.max_lr for multiple in self._multiples]

    def step(self, epoch: int | None = None) -> None:
        """Count one optimizer update and set the LR of the next.

        Called without an update since the last call (a gradient scaler skipped the update, or Accelerate steps the
        scheduler once per process), it does not count.

        Raises:
            ScheduleError: a step number is given.
        """
        if epoch is not None:
            raise ScheduleError(f"PathSwitchLR.step() takes no step number, given {epoch!r}: it counts updates itself")
        if not self._updated_since_step:
            warnings.warn(
                "PathSwitchLR.step() without an optimizer update since the last call does not count; the LR of a step "
                "is in `pathswitch lr` and scheduler.path.lr(step)",
                stacklevel=2,
            )
            return
        self._set_step(self._updates + 1)
        self._updated_since_step = False

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return the LR of the next update for every param group, computed from the plan."""
        lr = self.path.lr(self._updates)
        return [multiple * lr for multiple in self._multiples]

    def get_last_lr(self) -> list[float]:  # type: ignore[override]
        """Return the LRs that stand in the param groups: those of the next update."""
        return list(self._last_lr)

    def get_last_update_lr(self) -> list[float]:
        """Return the LRs that the last update used (before the first update: those it will use)."""
        return list(self._last_update_lrs)

    def state_dict(self) -> dict[str, Any]:
        """Return the counter, the path, the fields that determine its LR, and their digest."""
        return path_state(self.path, self._updates)

    def load_state_dict(self, state_dict: Mapping[str, Any] | None) -> None:
        """Take the counter of a checkpoint of the same path (resume) or, at the fork step, of its parent (fork).

        Raises:
            ScheduleError: the checkpoint has no state of PathSwitchLR, belongs to another path or another schedule,
                or stands at a step where this path cannot begin or go on.
        """
        if state_dict is None or not is_path_state(state_dict):
            step = self._step_of_foreign_state(state_dict)
        else:
            step = step_of_state(self.plan, self.path, state_dict)
        check_position(self.path, step)
        self._set_step(step)
        self._updated_since_step = False
        self._last_update_lrs = self._last_lr

    def check_position(self) -> None:
        """Raise ScheduleError unless the counter lies between this path's first and last step."""
        check_position(self.path, self._updates)

    def _step_of_foreign_state(self, state: object) -> int:
        if self._foreign_step is not None:
            return self._foreign_step
        found = "no scheduler state" if state is None else f"the state of another scheduler ({describe_state(state)})"
        raise ScheduleError(
            f"the checkpoint holds {found}; PathSwitchLR needs its own, or the parameter initial_step: "
            "the number of optimizer updates that the checkpoint has behind it"
        )

    def _set_step(self, step: int) -> None:
        """Write the LRs of the update number ``step`` into the groups, then move the counter: all or nothing."""
        lr = self.path.lr(step)
        lrs = [multiple * lr for multiple in self._multiples]
        self._groups = list(self.optimizer.param_groups)
        self._write(lrs)
        self._last_lr = lrs
        self._updates = step

    def _write(self, lrs: list[float]) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(lrs):
            lrs = [lrs[self._position(group)] for group in groups]
        for group, lr in zip(groups, lrs, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _position(self, group: dict[str, Any]) -> int:
        # ZeRO 1 and 2 show the optimizer one group at a time during a step. A mark in the group would not do to find
        # its place: loading a universal checkpoint, ZeRO 3 copies all keys of group 0 into every group.
        for position, known in enumerate(self._groups[: len(self._multiples)]):
            if known is group:
                return position
        raise ScheduleError(
            f"the optimizer has a param group that it did not have when PathSwitchLR was made (with "
            f"{len(self._multiples)} groups): add param groups before"
        )

    def _hook(self) -> None:
        """Hook into the optimizer, in place of an earlier PathSwitchLR of the same optimizer."""
        for handle in getattr(self.optimizer, "_pathswitch_hooks", ()):
            handle.remove()
        self.optimizer._pathswitch_hooks = (  # type: ignore[attr-defined]
            self.optimizer.register_step_pre_hook(self._before_update),
            self.optimizer.register_load_state_dict_post_hook(self._after_optimizer_load),
        )

    def _before_update(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Write the LR of this update into the groups, whatever a checkpoint has put there since ``step()``."""
        step = self._updates
        if is_past_end(self.path, step):
            raise ScheduleError(end_message(self.path, step + 1))
        if step < self.path.start_step:
            check_position(self.path, step)
        self._write(self._last_lr)
        self._last_update_lrs = self._last_lr
        self._updated_since_step = True

    def _after_optimizer_load(self, optimizer: Optimizer) -> None:
        """Put our LRs back: loading has replaced every group by the checkpoint's."""
        self._set_step(self._updates)


def _torch_optimizer(optimizer: Any) -> Optimizer:
    """Return the innermost torch optimizer: ZeRO's and fp16's wrappers are not optimizers themselves."""
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        kind = type(optimizer).__name__
        raise ConfigError("PathSwitchLR optimizer", given=kind, allowed="a torch.optim.Optimizer, or a wrapper of one")
    return inner


def _resolve_plan(plan: object, inline: Mapping[str, object]) -> Plan:
    # Imported here: pydantic would slow down every `import torch` of this environment.
    from pathswitch.config import build_plan, load_plan_file, plan_from_params

    if plan is None:
        return plan_from_params(inline)
    if inline:
        allowed = "a plan file or inline parameters, not both"
        raise ConfigError("PathSwitchLR parameters", given=f"plan and {', '.join(inline)}", allowed=allowed)
    if not isinstance(plan, str | os.PathLike):
        raise ConfigError("PathSwitchLR plan", given=plan, allowed="the name of a plan file")
    return build_plan(load_plan_file(os.path.abspath(plan)), str(plan))


def _select_path(plan: Plan, path: object, paradigm: object) -> Path:
    variable = os.environ.get(PATH_VARIABLE)
    name = variable or path
    for where, given in (("path", name), ("paradigm", paradigm)):
        if not isinstance(given, str):
            raise ConfigError(f"PathSwitchLR {where}", given=given, allowed="a name")
    try:
        return plan.path(cast(str, name), cast(Paradigm, paradigm))
    except ConfigError as error:
        from_variable = variable and error.where == "path"
        where = f"environment variable {PATH_VARIABLE}" if from_variable else f"PathSwitchLR {error.where}"
        raise ConfigError(where, given=error.given, allowed=error.allowed) from None


def _check_initial_step(initial_step: object) -> int | None:
    if initial_step is None or (type(initial_step) is int and initial_step >= 0):
        return initial_step
    raise ConfigError("PathSwitchLR initial_step", given=initial_step, allowed="a whole number >= 0")


def _lr_multiples(optimizer: Optimizer, max_lr: float) -> list[float]:
    """Return each group's LR over the optimizer's default LR; ``initial_lr`` is torch's memory of a group's own LR."""
    own_lrs = [float(group.setdefault("initial_lr", float(group["lr"]))) for group in optimizer.param_groups]
    if len(set(own_lrs)) == 1:
        return [1.0] * len(own_lrs)
    default_lr = float(optimizer.defaults["lr"])
    if default_lr <= 0 or default_lr not in (max_lr, *own_lrs):
        # AdamW([{..., "lr": a}, {..., "lr": b}]) leaves torch's 1e-3 as default: no share of that is meant.
        raise ConfigError(
            "optimizer lr",
            given=f"default {default_lr!r} beside param groups with {', '.join(map(repr, own_lrs))}",
            allowed=f"max_lr ({max_lr!r}), or the LR of one of the groups: groups train at their share of it",
        )
    return [own_lr / default_lr for own_lr in own_lrs]
