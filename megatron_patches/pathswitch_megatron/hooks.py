"""What each replaced function of Megatron does beside, or in place of, its own work."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from pathswitch.checkpoint import Manifest, Parallelism, PathSwitchSection, iteration_of
from pathswitch.errors import CheckpointError, ConfigError
from pathswitch.integrations import stop_signals
from pathswitch.integrations.committing import require_own_folder
from pathswitch.integrations.job_control import JobControl, is_asked_for
from pathswitch.integrations.megatron_settings import data_settings
from pathswitch_megatron.arguments import check_arguments
from pathswitch_megatron.batches import BatchSchedule, batches_of, constant_batches
from pathswitch_megatron.checkpoints import IterationCheckpoints, Position, Save
from pathswitch_megatron.job import Job
from pathswitch_megatron.scheduler import PlannedParamScheduler, follow_plan
from pathswitch_megatron.upstream import Replacement, is_first_process

Call = Callable[[], Any]
Arguments = Mapping[str, Any]


class _Hooks:
    """The replacements that Megatron-LM and Megatron-DeepSpeed share.

    Args:
        job: what to train.
        training: Megatron's module of the training loop.
        calculator: returns Megatron's calculator of micro-batches, None where there is none to ask.
    """

    def __init__(self, job: Job, training: ModuleType, calculator: Callable[[], Any]) -> None:
        self.job = job
        self._training, self._calculator = training, calculator
        self._control: JobControl | None = None

    @property
    def args(self) -> Any:
        """Megatron's arguments."""
        return self._training.get_args()

    def get_optimizer_param_scheduler(self, original: Call, arguments: Arguments) -> Any:
        """Let the scheduler follow the plan; by now all arguments are known, and no step is done."""
        args, path = self.args, self.job.path
        check_arguments(args)
        self._control = control_of(args)
        if args.load is None and path.start_step > 0:
            allowed = f"a folder with a checkpoint of {path.parent!r} at step {path.start_step}, or with its fork"
            raise ConfigError("--load", given=None, allowed=f"{allowed}: path {path.name!r} starts from it")
        if args.save is not None:
            require_own_folder(Path(args.save), path, self.job.key, "--save")
        scheduler = original()
        follow_plan(scheduler, self.job.plan, path, self._batches(), lambda: int(self.args.consumed_train_samples))
        scheduler.settings_source = lambda: data_settings(self.args)
        return scheduler

    def train_step(self, original: Call, arguments: Arguments) -> Any:
        """Set the LR of this very update before it."""
        if isinstance(scheduler := arguments["opt_param_scheduler"], PlannedParamScheduler):
            scheduler.before_update()
        return original()

    def _end_iteration(self, iteration: int, step: int, consumed_samples: int) -> bool:
        """Report the progress, and return on all ranks whether any of them was asked to stop.

        Where the job ends anyway, it goes on to Megatron's own last save and evaluation.
        """
        if self._control is None:
            return False
        last_lr = self.job.path.lr(max(step - 1, 0))
        self._control.report(step, last_lr, consumed_samples)
        reason, _ = self._control.agree()
        if reason is None or iteration >= self.args.train_iters:
            return False
        into = f"saves into {self.args.save}" if self.args.save else "saves nothing without --save"
        self._control.say(f"path {self.job.path.name!r} asked to stop ({reason}): {into} at step {step}, and ends")
        self._control.report(step, last_lr, consumed_samples, last=True)
        return True

    def _batches(self) -> BatchSchedule:
        args, planned = self.args, self.job.global_batch_size
        if planned is not None and planned != args.global_batch_size:
            allowed = f"{planned}, the plan's [megatron] global_batch_size"
            raise ConfigError("--global-batch-size", given=args.global_batch_size, allowed=allowed)
        return batches_of(args, self._calculator())


class MegatronLMHooks(_Hooks):
    """The replacements in Megatron-LM."""

    def __init__(self, job: Job, training: ModuleType, calculator: Callable[[], Any], megatron_version: str) -> None:
        super().__init__(job, training, calculator)
        if "state_digest" in job.settings.model_fields_set:
            allowed = "no such key for Megatron-LM, whose optimizer state is not compared; for Megatron-DeepSpeed it is"
            raise ConfigError("[megatron.checkpoint] state_digest", given=job.settings.state_digest, allowed=allowed)
        self.checkpoints = IterationCheckpoints(job, megatron_version)
        self._saving: Save | None = None

    def replacements(self) -> dict[str, Replacement]:
        """Return the replacements by the names of Megatron's functions."""
        return {
            "get_optimizer_param_scheduler": self.get_optimizer_param_scheduler,
            "train_step": self.train_step,
            "checkpoint_and_decide_exit": self.checkpoint_and_decide_exit,
            "load_checkpoint": self.load_checkpoint,
            "save_checkpoint": self.save_checkpoint,
            "get_checkpoint_name": lambda original, _: self.checkpoints.place_of(original()),
            "get_checkpoint_tracker_filename": lambda original, _: self.checkpoints.place_of_tracker(original()),
            "schedule_async_save": self.schedule_async_save,
        }

    def checkpoint_and_decide_exit(self, original: Call, arguments: Arguments) -> Any:
        """Save where a branch forks, and end a branch at its end, whatever the intervals are."""
        args, job, scheduler = self.args, self.job, arguments["opt_param_scheduler"]
        scheduler.catch_up()
        step = scheduler.last_epoch
        changes, iteration = {}, arguments["iteration"]
        if step in job.forks.values():
            changes["save_interval"] = iteration
        has_ended = not job.path.open_ended and step >= job.path.end_step and iteration < args.train_iters
        if self._end_iteration(iteration, step, int(args.consumed_train_samples)) or has_ended:
            changes["exit_interval"] = iteration
        with _changed(args, changes):
            return original()

    def load_checkpoint(self, original: Call, arguments: Arguments) -> Any:
        """Verify what is loaded, and refuse what this path cannot go on from."""
        args, scheduler = self.args, arguments["opt_param_scheduler"]
        if arguments.get("load_arg", "load") != "load" or not isinstance(scheduler, PlannedParamScheduler):
            return original()
        chosen = self.checkpoints.choose(Path(args.load), getattr(args, "ckpt_step", None))
        if chosen is None:
            if getattr(args, "exit_on_missing_checkpoint", False):
                raise CheckpointError(
                    f"--load {args.load}: holds no checkpoint, and --exit-on-missing-checkpoint is given"
                )
            return original()
        folder, manifest = chosen
        if manifest is not None:
            self._check(folder, manifest, scheduler)
            self._end_if_done(folder, manifest)
        with _changed(args, {"ckpt_step": iteration_of(folder.name)}):
            result = original()
        scheduler.check_position()
        scheduler.check_samples()
        self.checkpoints.parent = None if manifest is None else manifest.digest
        return result

    def _check(self, folder: Path, manifest: Manifest, scheduler: PlannedParamScheduler) -> None:
        args = self.args
        scheduler.check_manifest(manifest)
        tracker_names_it = self.checkpoints.is_newest(folder)
        if args.ckpt_format == "torch" and args.use_distributed_optimizer and not tracker_names_it:
            allowed = "the newest one in --load: Megatron reads the optimizer's shards of the newest; fork it first"
            raise ConfigError("--ckpt-step with --ckpt-format torch", given=folder.name, allowed=allowed)
        scheduler.vouched_step = manifest.step

    def _end_if_done(self, folder: Path, manifest: Manifest) -> None:
        """End a job whose branch is at its end already: Megatron would find no samples left, and fail."""
        path = self.job.path
        if manifest.path == path.name and not path.open_ended and manifest.step >= path.end_step:
            if is_first_process():
                print(f"pathswitch: path {path.name!r} is trained to its end: {folder}", flush=True)
            sys.exit(0)

    def save_checkpoint(self, original: Call, arguments: Arguments) -> Any:
        """Commit what Megatron saves, at once or when its asynchronous writer is done."""
        scheduler = arguments["opt_param_scheduler"]
        other = arguments.get("non_persistent_ckpt") or arguments.get("release")
        if other or not isinstance(scheduler, PlannedParamScheduler):
            return original()
        args = self.args
        scheduler.catch_up()
        save = self._saving = self.checkpoints.begin(Path(args.save), scheduler, self._position(arguments["iteration"]))
        try:
            result = original()
        except BaseException:
            self.checkpoints.forget(save)
            raise
        if self._saving is not None:
            self._commit(save)
        return result

    def schedule_async_save(self, original: Call, arguments: Arguments) -> Any:
        """Commit after the last of what Megatron does when its asynchronous writer is done."""
        if (save := self._saving) is not None:
            arguments["async_request"].add_finalize_fn(lambda: self._commit(save))
            self._saving = None
        # The writer is a process of its own, which a signal to the whole job must not end.
        with stop_signals.blocked("spawn" if getattr(self.args, "use_persistent_ckpt_worker", False) else "fork"):
            return original()

    def _commit(self, save: Save) -> None:
        self._saving = None
        self.checkpoints.commit(save, getattr(self.args, "save_retain_interval", None))

    def _position(self, iteration: int) -> Position:
        args = self.args
        parallelism = Parallelism(
            zero_stage=int(args.use_distributed_optimizer),
            world_size=args.world_size,
            data_parallel_size=args.data_parallel_size,
            tensor_parallel_size=args.tensor_model_parallel_size,
            pipeline_parallel_size=args.pipeline_model_parallel_size,
        )
        dtype = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        return Position(iteration, int(args.consumed_train_samples), args.seq_length, parallelism, dtype)


class MegatronDeepSpeedHooks(_Hooks):
    """The replacements in Megatron-DeepSpeed, whose checkpoints are DeepSpeed's own."""

    def replacements(self) -> dict[str, Replacement]:
        """Return the replacements by the names of Megatron's functions."""
        return {
            "get_optimizer_param_scheduler": self.get_optimizer_param_scheduler,
            "train_step": self.train_step,
            "load_checkpoint": self.load_checkpoint,
            "save_checkpoint": self.save_checkpoint,
        }

    def get_optimizer_param_scheduler(self, original: Call, arguments: Arguments) -> Any:
        """Let the scheduler follow the plan, and make the loop save at forks and stop at a branch's end."""
        args, path = self.args, self.job.path
        if not args.deepspeed:
            raise ConfigError("--deepspeed", given=False, allowed="True: DeepSpeed's engine commits the checkpoints")
        self._check_intervals()
        from pathswitch.integrations.deepspeed import patch_engine

        patch_engine()
        scheduler = super().get_optimizer_param_scheduler(original, arguments)
        run, settings = str(self.job.run), self.job.settings
        scheduler.section = PathSwitchSection(run=run, seq_len=args.seq_length, checkpoint=settings)
        if not path.open_ended and args.exit_interval is None:
            args.exit_interval = path.end_step
        return scheduler

    def train_step(self, original: Call, arguments: Arguments) -> Any:
        """Set the LR of this very update before it, and let the loop save and exit behind it if asked to stop."""
        result, args = super().train_step(original, arguments), self.args
        if isinstance(scheduler := arguments["opt_param_scheduler"], PlannedParamScheduler):
            iteration, samples = args.curr_iteration + 1, int(args.consumed_train_samples) + args.global_batch_size
            if self._end_iteration(iteration, scheduler.last_epoch, samples):
                args.exit_interval = iteration
        return result

    def load_checkpoint(self, original: Call, arguments: Arguments) -> Any:
        """Compare the place in the data, which Megatron reads behind DeepSpeed's load, with the scheduler's."""
        result = original()
        if isinstance(scheduler := arguments["opt_param_scheduler"], PlannedParamScheduler):
            scheduler.check_position()
            scheduler.check_samples()
        return result

    def save_checkpoint(self, original: Call, arguments: Arguments) -> Any:
        """Save the step that the data stands at, also where the last update was skipped."""
        if isinstance(scheduler := arguments["opt_param_scheduler"], PlannedParamScheduler):
            scheduler.catch_up()
        return original()

    def _check_intervals(self) -> None:
        args, path = self.args, self.job.path
        for name, step in self.job.forks.items():
            if args.save and (not args.save_interval or step % args.save_interval):
                allowed = f"a divisor of {step}, where {name} forks"
                raise ConfigError("--save-interval", given=args.save_interval, allowed=allowed)
        if not path.open_ended and args.exit_interval is not None and path.end_step % args.exit_interval:
            allowed = f"none, or a divisor of {path.end_step}, where {path.name} ends"
            raise ConfigError("--exit-interval", given=args.exit_interval, allowed=allowed)


class MegatronBridgeHooks:
    """The replacement in Megatron-Bridge: the LR; its checkpoints stay its own."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def replacements(self) -> dict[str, Replacement]:
        """Return the replacements by the names of Bridge's functions."""
        return {"_get_scheduler": self.get_scheduler}

    def get_scheduler(self, original: Call, arguments: Arguments) -> Any:
        """Let the scheduler follow the plan; its clock is the samples that it is stepped by."""
        if self.job.global_batch_size is None:
            allowed = "the samples of a step: Megatron-Bridge does not tell them where it makes the scheduler"
            raise ConfigError("[megatron] global_batch_size", given=None, allowed=allowed)
        stop_signals.release()  # nobody here would act on them
        scheduler = original()
        follow_plan(scheduler, self.job.plan, self.job.path, constant_batches(self.job.global_batch_size))
        return scheduler


def control_of(args: Any) -> JobControl | None:
    """Return what asks this job to stop, None where the environment says nothing of it.

    A signal that Megatron handles itself stays Megatron's.
    """
    if not is_asked_for():
        return None
    handles = getattr(args, "exit_signal_handler", False)
    own = [signal.Signals(getattr(args, "exit_signal", signal.SIGTERM)).name] if handles else []
    return JobControl((), torch.device("cuda" if dist.get_backend() == "nccl" else "cpu"), foreign=own)


@contextmanager
def _changed(args: Any, changes: Mapping[str, Any]) -> Iterator[None]:
    """Change some of Megatron's arguments for the time of a call."""
    before = {name: getattr(args, name, None) for name in changes}
    vars(args).update(changes)
    try:
        yield
    finally:
        vars(args).update(before)
