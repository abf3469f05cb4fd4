"""Megatron's OptimizerParamScheduler, with the LR of the plan; weight decay stays Megatron's.

Megatron changes the LR after an update for the next one. The clock here is the data: the LR of an iteration follows
from the samples consumed before it. An iteration that Megatron skips has consumed its samples, so that a branch ends
with its version's data whatever happened on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pathswitch.checkpoint import Manifest
from pathswitch.errors import ConfigError, ScheduleError
from pathswitch.integrations.megatron_settings import STATE_KEY
from pathswitch.integrations.path_state import (
    FollowsPlan,
    check_position,
    describe_state,
    end_message,
    is_past_end,
    path_state,
    step_of_state,
)
from pathswitch.schedule import BranchPath, MainPath, Schedule
from pathswitch.versions import Path, Plan
from pathswitch_megatron.arguments import check_same_settings
from pathswitch_megatron.batches import BatchSchedule

# Values of a checkpoint that Megatron compares with the arguments; the plan decides on these.
LR_VALUES = {
    "learning rate",
    "minimum learning rate",
    "warmup iterations",
    "warmup tokens",
    "decay tokens",
    "total number of iterations",
    "learning rate decay style",
}
WEIGHT_DECAY_STEPS = "total number of weight decay iterations"


def follow_plan(
    scheduler: Any,
    plan: Plan,
    path: Path,
    batches: BatchSchedule,
    consumed_samples: Callable[[], int] | None = None,
) -> None:
    """Let a scheduler of Megatron's take its LR from one path of a plan, from the beginning.

    A param group whose max_lr differs from the plan's follows the path scaled to its own; its min_lr is not used.

    Args:
        scheduler: an OptimizerParamScheduler, of Megatron core, Megatron-DeepSpeed or a subclass.
        plan: the plan.
        path: the path to follow.
        batches: how samples and steps correspond.
        consumed_samples: returns the samples consumed before the current iteration; without it those count that the
            scheduler was stepped by.

    Raises:
        ConfigError: Megatron's --lr is not the plan's max_lr.
    """
    if scheduler.max_lr != plan.main.max_lr:
        raise ConfigError("--lr", given=scheduler.max_lr, allowed=f"{plan.main.max_lr!r}, the plan's max_lr")
    scheduler.__class__ = _following(type(scheduler))
    scheduler.begin(plan, path, batches, consumed_samples)


class PlannedParamScheduler(FollowsPlan):
    """What follow_plan puts in front of a scheduler's own class.

    Attributes:
        vouched_step: the step of a checkpoint that holds no state of ours, where its manifest tells it.
        settings_source: returns the arguments that the samples follow from.
    """

    optimizer: Any
    max_lr: float
    num_steps: int
    """Samples, in Megatron's count."""

    def begin(self, plan: Plan, path: Path, batches: BatchSchedule, consumed_samples: Callable[[], int] | None) -> None:
        """Take the plan's LR from its first step on."""
        self.plan, self.path = plan, path
        self.vouched_step: int | None = None
        self.settings_source: Callable[[], dict[str, Any]] | None = None
        self._batches, self._consumed_samples = batches, consumed_samples
        self._schedules: dict[float, Schedule] = {plan.main.max_lr: path.lr}
        self._setting = False
        self._step = 0
        self._last_update_step = 0
        self._write()

    @property
    def last_epoch(self) -> int:
        """Steps done; the name is torch's."""
        return self._step

    def get_lr(self, param_group: dict[str, Any] | None = None) -> float:
        """Return the LR of the next update for a param group; Megatron-DeepSpeed asks without one."""
        return self._lr(param_group, self._step)

    def _lr(self, param_group: dict[str, Any] | None, step: int) -> float:
        max_lr = self.max_lr if param_group is None else param_group.get("max_lr", self.max_lr)
        if (schedule := self._schedules.get(max_lr)) is None:
            schedule = self._schedules[max_lr] = _scaled_schedule(self.path, max_lr)
        return schedule(step)

    def step(self, increment: int, *args: Any, **kwargs: Any) -> None:
        """Count an update of ``increment`` samples and set the LR and the weight decay of the next."""
        if not self._setting:  # Megatron steps to set values too, and to add up what a checkpoint says
            self._step = self._batches.steps_after(self._samples() + increment)
        super().step(increment, *args, **kwargs)  # type: ignore[misc]

    def before_update(self) -> None:
        """Write the LR of the coming update, whatever was skipped or loaded since ``step``.

        Raises:
            ScheduleError: the path has ended, or has not begun.
        """
        self.catch_up()
        if is_past_end(self.path, self._step):
            raise ScheduleError(end_message(self.path, self._step + 1))
        check_position(self.path, self._step)
        self._last_update_step = self._step

    def catch_up(self) -> None:
        """Go to the step that the samples consumed tell, and write its LR: Megatron skips ``step`` with an update."""
        self._step = self._batches.steps_after(self._samples())
        self._write()

    def get_last_update_lr(self) -> list[float]:
        """Return the LRs that the last update used."""
        groups = self.optimizer.param_groups
        return [self._lr(group, self._last_update_step) * group.get("lr_mult", 1.0) for group in groups]

    def data_settings(self) -> dict[str, Any] | None:
        """Return the arguments that the samples of every step follow from, None where they are not known."""
        return None if self.settings_source is None else self.settings_source()

    def check_manifest(self, manifest: Manifest) -> None:
        """Refuse to go on from a checkpoint whose arguments would make other samples, or another vocabulary.

        Raises:
            CheckpointError: naming each difference.
        """
        if manifest.settings is not None and self.settings_source is not None:
            check_same_settings(self.plan, self.path, manifest.step, manifest.settings, self.settings_source())

    def check_position(self) -> None:
        """Raise ScheduleError unless the counter lies between this path's first and last step."""
        check_position(self.path, self._step)

    def check_samples(self) -> None:
        """Raise ScheduleError unless the samples consumed are those of the counter's step."""
        samples, expected = self._samples(), self._batches.samples_after(self._step)
        if samples != expected:
            raise ScheduleError(
                f"step {self._step} of path {self.path.name!r} has {expected} samples behind it with the batch sizes "
                f"of this job, but the checkpoint has consumed {samples}: was the global batch size changed?"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return Megatron's state, and ours as one string: some checkpoint formats flatten dictionaries."""
        state: dict[str, Any] = super().state_dict()  # type: ignore[misc]
        return {**state, STATE_KEY: json.dumps(path_state(self.path, self._step))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the place of a checkpoint of the same path (resume) or, at the fork step, of its parent (fork).

        Raises:
            ScheduleError: the checkpoint belongs to another path or schedule, or stands where this path cannot go on.
        """
        step = self._step_of(state_dict)
        check_position(self.path, step)
        self._setting, self.num_steps = True, 0  # Megatron adds the checkpoint's samples to those that it finds
        try:
            super().load_state_dict(state_dict)  # type: ignore[misc]
        finally:
            self._setting = False
        self._step = self._last_update_step = step
        self._write()

    def _step_of(self, state: dict[str, Any]) -> int:
        if STATE_KEY in state:
            return step_of_state(self.plan, self.path, json.loads(state[STATE_KEY]))
        if self.vouched_step is None:
            raise ScheduleError(
                f"the checkpoint holds the state of another scheduler ({describe_state(state)}); `pathswitch adopt` "
                "says at which step of which path it stands"
            )
        return self.vouched_step

    def _check_and_set(self, cls_value: Any, sd_value: Any, name: str) -> Any:
        """Let the plan decide about the LR, and Megatron about the weight decay."""
        constant = getattr(self, "wd_incr_style", None) == "constant"
        if name in LR_VALUES or (name == WEIGHT_DECAY_STEPS and constant):
            return cls_value
        return super()._check_and_set(cls_value, sd_value, name)  # type: ignore[misc]

    def _samples(self) -> int:
        return self.num_steps if self._consumed_samples is None else self._consumed_samples()

    def _write(self) -> None:
        """Let Megatron write the LR and the weight decay of the counter's step into the param groups."""
        self._setting = True
        super().step(0)  # type: ignore[misc]
        self._setting = False


def _following(scheduler_class: type[Any]) -> type[Any]:
    if issubclass(scheduler_class, PlannedParamScheduler):
        return scheduler_class
    return type(f"PathSwitch{scheduler_class.__name__}", (PlannedParamScheduler, scheduler_class), {})


def _scaled_schedule(path: Path, max_lr: float) -> Schedule:
    assert isinstance(path.lr_path, MainPath | BranchPath)
    return path.lr_path.scaled_to(max_lr).schedule()
