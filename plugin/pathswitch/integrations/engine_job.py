"""A DeepSpeed job that saves and ends by itself: where branches fork, at its path's end, and when it is asked to stop.

All of it happens behind the last micro-step of a step, when every rank has tried the same update.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

from pathswitch.integrations.checkpoints import EngineCheckpoints
from pathswitch.integrations.committing import require_own_folder
from pathswitch.integrations.job_control import JobControl
from pathswitch.integrations.path_state import forks_from

T = TypeVar("T")


class EngineJob:
    """What one rank of a job does at the end of each step.

    Attributes:
        control: the stop signals, the stop file and the progress file.
        before_save: what the trainer does at the end of each step before anything is saved, None for nothing.
    """

    def __init__(self, checkpoints: EngineCheckpoints, control: JobControl) -> None:
        assert checkpoints.section.job is not None
        self._checkpoints, self._engine, self._settings = checkpoints, checkpoints.engine, checkpoints.section.job
        scheduler = self._engine.lr_scheduler
        self._path, self._forks = scheduler.path, forks_from(scheduler.plan, scheduler.path)
        # Without versions the main path has no end yet.
        self._last_step: int | None = self._path.end_step if scheduler.plan.versions else None
        self._save_dir = Path(self._settings.folder(self._path.name))
        self._stop_reason: str | None = None
        self._script_saves = self._is_saving = self._has_warned = False
        self.before_save: Callable[[], None] | None = None
        self.control = control
        require_own_folder(self._save_dir, self._path, checkpoints.key, "ds_config pathswitch.job.save_dir")

    def around(self, call: Callable[[], T]) -> T:
        """Run a call of the engine's that may end a step, and do what is due behind the step."""
        engine, scheduler = self._engine, self._engine.lr_scheduler
        if self._settings.exit_at_end and self._is_at_end():
            self._end("has no step left")
        tries, updates = engine.global_steps, scheduler.last_epoch
        result = call()
        if engine.global_steps != tries:
            self._end_step(has_updated=scheduler.last_epoch != updates)
        return result

    def after_save(self, save_dir: str, save_latest: bool) -> None:
        """End the job if it was waiting for this save of the script's own."""
        if self._is_saving:
            return
        self._warn_of_another_folder(Path(save_dir))
        if not save_latest or not self._script_saves:
            return
        at_end = self._settings.exit_at_end and self._is_at_end()
        if at_end or self._stop_reason is not None:
            why = "has reached its end" if at_end else f"asked to stop ({self._stop_reason})"
            self._end(why, f"saved by the script in {save_dir}")

    def end_if_asked(self, doing: str) -> None:
        """End the job if any rank was asked to stop while there is nothing to save."""
        reason, _ = self.control.agree()
        if reason is not None:
            self._end(f"asked to stop ({reason}) while {doing}")

    def _is_at_end(self) -> bool:
        return self._last_step is not None and self._engine.lr_scheduler.last_epoch >= self._last_step

    def _end_step(self, has_updated: bool) -> None:
        """Save and end where that is due; an update that was skipped is no step, and can only be asked to stop."""
        step = self._engine.lr_scheduler.last_epoch
        if self.before_save is not None:
            self.before_save()
        self._report()
        if self._stop_reason is not None:
            return  # until the script saves
        reason, script_saves = self.control.agree(self._checkpoints.script_state)
        if script_saves:
            self._leave_to_the_script(reason)
            return
        self._script_saves = False
        at_end = has_updated and step == self._last_step
        if not (reason or at_end or (has_updated and step in self._forks.values())):
            return
        saved = f"saved {self._save()}"
        if at_end and self._settings.exit_at_end:
            self._end("has reached its end", saved)
        if reason:
            self._end(f"asked to stop ({reason})", saved)

    def _save(self) -> Path:
        """Save under DeepSpeed's own tag."""
        state = {} if self._checkpoints.client_state is None else self._checkpoints.client_state()
        self._is_saving = True
        try:
            self._engine.save_checkpoint(str(self._save_dir), client_state=state)
        finally:
            self._is_saving = False
        return self._save_dir / f"global_step{self._engine.global_steps}"

    def _leave_to_the_script(self, reason: str | None) -> None:
        """Let the script make all saves: what it keeps in its client state is not known here."""
        if not self._script_saves:
            self._script_saves = True
            due = [f"at step {step}, where {name} forks" for name, step in self._forks.items()]
            due += [f"at step {self._last_step}, where the path ends"] if self._last_step is not None else []
            self.control.say(
                f"path {self._path.name!r}: the script saves a client state of its own, so every save is left to it: "
                f"{'; '.join(due)}; asked to stop, the job ends behind the script's next save_checkpoint"
            )
        self._stop_reason = reason
        if reason is not None:
            self.control.say(
                f"path {self._path.name!r} asked to stop ({reason}): ends behind the script's next save_checkpoint"
            )

    def _warn_of_another_folder(self, save_dir: Path) -> None:
        if not self._has_warned and save_dir.absolute() != self._save_dir.absolute():
            self._has_warned = True
            self.control.say(
                f"path {self._path.name!r}: the script saves into {save_dir}, the job itself into {self._save_dir}: "
                "started again, the script has to load from there"
            )

    def _report(self, *, last: bool = False) -> None:
        engine, step = self._engine, self._engine.lr_scheduler.last_epoch
        self.control.report(step, self._path.lr(max(step - 1, 0)), int(engine.global_samples), last=last)

    def _end(self, why: str, saved: str = "nothing to save") -> NoReturn:
        if self._engine.checkpoint_engine.is_decoupled():  # it goes on writing behind a save, until it is asked
            self._engine._commit_decoupled_checkpoint()
        self._report(last=True)
        self.control.end(f"path {self._path.name!r} {why}: {saved} at step {self._engine.lr_scheduler.last_epoch}")
