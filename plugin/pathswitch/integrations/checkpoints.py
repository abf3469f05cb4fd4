"""Durable checkpoints of one DeepSpeed engine: what it saves is committed, what it loads is verified."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pathswitch.checkpoint import (
    DEEPSPEED,
    MANIFEST_FILE,
    FileEntry,
    Manifest,
    Parallelism,
    PathSwitchSection,
    Policy,
    StreamDigest,
    begin_save,
    read_section,
    staging_folder,
)
from pathswitch.errors import ConfigError
from pathswitch.integrations.collective import gather, on_first_rank
from pathswitch.integrations.committing import commit_together, git_commit, reason, record_checkpoint, versions
from pathswitch.integrations.random_state import random_state_digest, random_state_name, save_random_state
from pathswitch.integrations.state_digest import state_digest

# Keys that DeepSpeed itself puts beside a script's client state, and others that begin with "ds_".
DEEPSPEEDS_OWN = {
    "module",
    "buffer_names",
    "optimizer",
    "param_shapes",
    "frozen_param_shapes",
    "frozen_param_fragments",
}
DEEPSPEEDS_OWN |= {"shared_params", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"}
DEEPSPEEDS_OWN |= {"skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "num_experts"}
DEEPSPEEDS_OWN |= {"checkpoint_parallel_dimensions", "universal_checkpoint_info", "autoep_layers", "folding"}


@dataclass
class _Save:
    """A save: what it saves, and what has become of it."""

    folder: Path
    hidden_tag: str
    write_latest: bool
    client_state: dict[str, Any]
    global_steps: int
    random_state: bytes
    state_digest: dict[str, StreamDigest] | None = None
    written: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class EngineCheckpoints:
    """Saves for one engine, and what it has to remember between loads and saves.

    Attributes:
        settings: the ds_config's section "pathswitch".
        parent: digest of the manifest loaded or saved last.
        policy: the policy of the fork that this job trains, kept in its own checkpoints.
        client_state: returns what the job's own saves keep for the trainer, which sets this.
        script_state: whether the training script has a client state, which is not known here.
    """

    def __init__(self, engine: Any, section: PathSwitchSection) -> None:
        self.engine, self.section = engine, section
        self.settings = self.section.checkpoint
        self.key = self.settings.signing_key("ds_config pathswitch.checkpoint.")
        if engine.use_node_local_storage():
            allowed = "false: ranks of other nodes must be able to verify and fork a checkpoint"
            raise ConfigError("ds_config checkpoint.use_node_local_storage", given=True, allowed=allowed)
        self.parent: str | None = None
        self.policy = Policy()
        self.client_state: Callable[[], dict[str, Any]] | None = None
        self.script_state = False
        self._save: _Save | None = None
        self._committed_save: _Save | None = None
        self._watched_writer: Any = None
        copy_script = engine._copy_recovery_script
        engine._copy_recovery_script = lambda save_dir: self._holding_back(save_dir, lambda: copy_script(save_dir))

    def save(
        self,
        original: Callable[..., Any],
        save_dir: str,
        tag: str | None = None,
        client_state: dict[str, Any] | None = None,
        save_latest: bool = True,
        **options: Any,
    ) -> Any:
        """Let DeepSpeed write into a hidden folder, which becomes the checkpoint when all ranks are done.

        A save that would be the one committed just before, as where job and script save the same step, is done already.

        Raises:
            CheckpointError: on every rank, if any rank could not write; what was saved before is as it was.
        """
        engine = self.engine
        self._watch(engine.checkpoint_engine)
        if self._save is not None:  # a decoupled writer commits with the next update, or here
            engine._commit_decoupled_checkpoint()
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        folder, state = Path(save_dir, tag), client_state or {}
        if self.client_state is None:
            self.script_state = bool(state)
        hidden_tag = os.path.relpath(staging_folder(folder), save_dir)
        save = _Save(folder, hidden_tag, save_latest, state, int(engine.global_steps), random_state_digest())
        if not any(options.values()) and self._is_committed(save):
            return True
        if self.settings.state_digest:
            save.state_digest = state_digest(engine)
        on_first_rank(lambda: str(begin_save(folder)))
        self._save = save
        try:
            self._save_random_state(staging_folder(folder))
            return original(engine, save_dir, hidden_tag, state, False, **options)
        except BaseException:
            self._save = None
            raise

    def note_loaded(self, client_state: dict[str, Any] | None) -> None:
        """Note whether the script has loaded a client state of its own."""
        if self.client_state is None and client_state is not None:
            self.script_state = any(key not in DEEPSPEEDS_OWN and key[:3] != "ds_" for key in client_state)

    def _is_committed(self, save: _Save) -> bool:
        """Return whether the last save has saved all this, on every rank, and is still there."""
        last = self._committed_save
        if last is None or _identity(last) != _identity(save):
            return False
        try:
            same = bool(last.client_state == save.client_state)
        except (RuntimeError, ValueError):  # tensors and arrays of more than one number
            same = False
        unchanged = same and last.random_state == save.random_state and (save.folder / MANIFEST_FILE).is_file()
        return all(gather(unchanged))

    def _watch(self, writer: Any) -> None:
        """Note which files DeepSpeed's writer writes on this rank, hold errors back, and act on its commit.

        A rank that raised at once would leave the others waiting for it in DeepSpeed's next barrier.
        """
        if writer is self._watched_writer:
            return
        self._watched_writer, write, finish = writer, writer.save, writer.commit

        def watched_save(state_dict: Any, path: Any) -> None:
            if self._save is None:
                write(state_dict, path)
            else:
                self._save.written.append(Path(path))
                self._holding_back(path, lambda: write(state_dict, path))

        def watched_commit(info: Any) -> Any:
            result = finish(info)
            # DeepSpeed 0.18 gives the bare tag here.
            if self._save is not None and getattr(info, "tag", info) == self._save.hidden_tag:
                pending, self._save = self._save, None
                self._commit(pending)
            return result

        writer.save, writer.commit = watched_save, watched_commit
        if writer.is_decoupled():
            atexit.register(self._close, writer)

    def _close(self, writer: Any) -> None:
        """Commit the last save of a decoupled writer and end its process, which would keep this one from ending."""
        if hasattr(sys, "last_value"):
            self._save = None  # this rank has failed: the others will not meet it in a commit
        writer.cleanup()

    def _holding_back(self, path: Any, action: Callable[[], object]) -> None:
        """Run a part of a save; its error is told to all ranks when the save is to be committed."""
        try:
            action()
        except Exception as error:
            if self._save is None:
                raise
            self._save.failures.append(f"rank {dist.get_rank()}: {path}: {reason(error)}")

    def _save_random_state(self, staging: Path) -> None:
        """Write this rank's random state now: a decoupled writer commits when the next update has drawn from it."""
        path = staging / random_state_name(dist.get_rank())
        assert self._save is not None
        self._save.written.append(path)
        staging.mkdir(exist_ok=True)  # asks the server, where a network file system has not heard of the folder yet
        self._holding_back(path, lambda: save_random_state(path))

    def _commit(self, save: _Save) -> None:
        self.parent = commit_together(
            save.folder,
            save.written,
            save.failures,
            lambda files: self._manifest(save, files),
            key=self.key,
            committed=lambda manifest: self._committed(save, manifest),
        )
        # A script may change the objects in a state of its own, so that they would be compared with themselves.
        known = not save.client_state or self.client_state is not None
        self._committed_save = save if known else None

    def _committed(self, save: _Save, manifest: Manifest) -> None:
        if save.write_latest:
            DEEPSPEED.write_latest(save.folder.parent, save.folder.name)
        if self.section.run is not None:
            record_checkpoint(Path(self.section.run), save.folder, manifest)

    def _manifest(self, save: _Save, files: dict[str, FileEntry]) -> Manifest:
        engine, scheduler = self.engine, self.engine.lr_scheduler
        step, samples = scheduler.last_epoch, int(engine.global_samples)
        return Manifest(
            tag=save.folder.name,
            paradigm=scheduler.path.paradigm,
            path=scheduler.path.name,
            step=step,
            global_steps=int(engine.global_steps),
            samples_seen=samples,
            tokens_seen=None if self.section.seq_len is None else samples * self.section.seq_len,
            next_lr=scheduler.path.lr(step),
            schedule_digest=scheduler.path.digest,
            plan_digest=scheduler.plan.digest,
            data_digests=save.client_state.get("pathswitch_data"),
            parallelism=parallelism(engine),
            dtype="bf16" if engine.bfloat16_enabled() else "fp16" if engine.fp16_enabled() else "fp32",
            versions=versions("deepspeed"),
            git_commit=git_commit(),
            parent=self.parent,
            policy=self.policy,
            settings=scheduler.data_settings(),
            state_digest=save.state_digest,
            files=files,
        )


def _identity(save: _Save) -> tuple[Path, bool, int]:
    return save.folder.absolute(), save.write_latest, save.global_steps


def read_engine_section(engine: Any) -> PathSwitchSection:
    """Return the ds_config's section, or what the scheduler has in its place.

    Raises:
        ConfigError: there are both, or a key or value is not allowed.
    """
    ds_config, given = engine._config._param_dict, engine.lr_scheduler.section
    if given is None:
        return read_section(ds_config)
    if "pathswitch" in ds_config:
        allowed = "no such section: under Megatron, the plan's [megatron] says how checkpoints are treated"
        raise ConfigError("ds_config pathswitch", given=ds_config["pathswitch"], allowed=allowed)
    assert isinstance(given, PathSwitchSection)
    return given


def parallelism(engine: Any) -> Parallelism:
    """Return how this engine cuts its shards."""
    return Parallelism(
        zero_stage=int(engine.zero_optimization_stage()),
        world_size=dist.get_world_size(),
        data_parallel_size=int(engine.seq_dp_world_size),
        tensor_parallel_size=int(engine.mp_world_size),
        pipeline_parallel_size=int(getattr(engine, "num_stages", 1)),
    )
