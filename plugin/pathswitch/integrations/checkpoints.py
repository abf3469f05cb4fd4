"""Durable checkpoints of one DeepSpeed engine: what it saves is committed, what it loads is verified."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pathswitch.checkpoint import (
    FileEntry,
    Manifest,
    Parallelism,
    Policy,
    begin_save,
    commit,
    discard,
    hash_file,
    read_key,
    read_section,
    shard_names,
    staging_folder,
    write_latest,
)
from pathswitch.errors import CheckpointError, ConfigError, LedgerError
from pathswitch.integrations.collective import describe_os_error, gather, on_first_rank
from pathswitch.integrations.random_state import random_state_name, save_random_state
from pathswitch.versions.ledger import folder_name, run_ledger
from pathswitch.versions.records import CheckpointRecord

logger = logging.getLogger("pathswitch")

GIT_SECONDS = 5


@dataclass
class _Save:
    """A save that has begun and is not yet committed."""

    folder: Path
    hidden_tag: str
    write_latest: bool
    client_state: dict[str, Any]
    written: list[Path] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


class EngineCheckpoints:
    """Saves for one engine, and what it has to remember between loads and saves.

    Attributes:
        settings: the ds_config's section "pathswitch".
        parent: digest of the manifest loaded or saved last.
        policy: the policy of the fork that this job trains, kept in its own checkpoints.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.section = read_section(engine._config._param_dict)
        self.settings = self.section.checkpoint
        self.key = read_key(self.settings.signing_key_file)
        if self.key is not None and self.settings.verify != "full":
            allowed = "full: a signature vouches for digests, which the other modes do not compare"
            raise ConfigError("ds_config pathswitch.checkpoint.verify", given=self.settings.verify, allowed=allowed)
        if engine.use_node_local_storage():
            allowed = "false: ranks of other nodes must be able to verify and fork a checkpoint"
            raise ConfigError("ds_config checkpoint.use_node_local_storage", given=True, allowed=allowed)
        self.parent: str | None = None
        self.policy = Policy()
        self._save: _Save | None = None
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

        Raises:
            CheckpointError: on every rank, if any rank could not write; what was saved before is as it was.
        """
        engine = self.engine
        self._watch(engine.checkpoint_engine)
        if self._save is not None:  # a decoupled writer commits with the next update, or here
            engine._commit_decoupled_checkpoint()
        tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
        folder = Path(save_dir, tag)
        on_first_rank(lambda: str(begin_save(folder)))
        hidden_tag = os.path.relpath(staging_folder(folder), save_dir)
        self._save = _Save(folder, hidden_tag, save_latest, client_state or {})
        try:
            self._save_random_state(staging_folder(folder))
            return original(engine, save_dir, hidden_tag, client_state or {}, False, **options)
        except BaseException:
            self._save = None
            raise

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
            self._save.failures.append(f"rank {dist.get_rank()}: {path}: {_reason(error)}")

    def _save_random_state(self, staging: Path) -> None:
        """Write this rank's random state now: a decoupled writer commits when the next update has drawn from it."""
        path = staging / random_state_name(dist.get_rank())
        assert self._save is not None
        self._save.written.append(path)
        staging.mkdir(exist_ok=True)  # asks the server, where a network file system has not heard of the folder yet
        self._holding_back(path, lambda: save_random_state(path))

    def _commit(self, save: _Save) -> None:
        """Hash what each rank wrote, in parallel; then rank 0 commits."""
        staging = staging_folder(save.folder)
        dist.barrier()
        own, failure = self._own_entries(save, staging)
        reports = gather((own, save.failures + ([failure] if failure else [])))
        failures = [line for _, lines in reports for line in lines]
        if failures:
            message = on_first_rank(lambda: _not_saved(save.folder, failures))
            on_first_rank(lambda: discard(staging))
            raise CheckpointError(message)
        entries = {name: entry for files, _ in reversed(reports) for name, entry in files.items()}
        try:
            self.parent = on_first_rank(lambda: self._publish(save, entries))
        except CheckpointError as error:
            reasons = [str(error)]
            raise CheckpointError(on_first_rank(lambda: _not_saved(save.folder, reasons))) from None

    def _own_entries(self, save: _Save, staging: Path) -> tuple[dict[str, FileEntry], str | None]:
        """Return the entries of the files that this rank wrote, durable by now, or why there are none."""
        rank = dist.get_rank()
        try:
            written = [path for path in save.written if path.is_file()]
            return {p.relative_to(staging).as_posix(): hash_file(p, rank=rank, sync=True) for p in written}, None
        except OSError as error:
            return {}, f"rank {rank}: {_reason(error)}"

    def _publish(self, save: _Save, entries: dict[str, FileEntry]) -> str:
        staging = staging_folder(save.folder)
        # Whatever was written past DeepSpeed's writer, tensors offloaded to NVMe for one.
        rest = {name: hash_file(staging / name, sync=True) for name in sorted(shard_names(staging) - entries.keys())}
        manifest = self._manifest(save, dict(sorted({**entries, **rest}.items())))
        commit(save.folder, manifest, self.key)
        if save.write_latest:
            write_latest(save.folder.parent, save.folder.name)
        self._record(save.folder, manifest)
        return manifest.digest

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
            versions=_versions(),
            git_commit=_git_commit(),
            parent=self.parent,
            policy=self.policy,
            files=files,
        )

    def _record(self, folder: Path, manifest: Manifest) -> None:
        """Append the checkpoint to the run's ledger, if there is a run."""
        if self.section.run is None:
            return
        run = Path(self.section.run)
        record = CheckpointRecord(
            manifest=manifest.digest,
            folder=folder_name(folder, run),
            paradigm=manifest.paradigm,
            path=manifest.path,
            step=manifest.step,
            samples_seen=manifest.samples_seen,
            tokens_seen=manifest.tokens_seen,
            next_lr=manifest.next_lr,
            parent=manifest.parent,
        )
        try:
            run_ledger(run).append(record)
        except LedgerError as error:  # the checkpoint is committed: no reason to end the training
            logger.warning("pathswitch: %s is saved, but not recorded: %s", folder, error)


def parallelism(engine: Any) -> Parallelism:
    """Return how this engine cuts its shards."""
    return Parallelism(
        zero_stage=int(engine.zero_optimization_stage()),
        world_size=dist.get_world_size(),
        data_parallel_size=int(engine.seq_dp_world_size),
        tensor_parallel_size=int(engine.mp_world_size),
        pipeline_parallel_size=int(getattr(engine, "num_stages", 1)),
    )


def _reason(error: Exception) -> str:
    return describe_os_error(error) if isinstance(error, OSError) else str(error).partition("\n")[0]


def _not_saved(folder: Path, reasons: list[str]) -> str:
    # torch's writer says what it could not do, but not why: a full disk is for the reader to see.
    free = shutil.disk_usage(folder.parent).free
    return (
        f"{folder} was not saved: {'; '.join(reasons)}. What was saved before is as it was; {free} bytes are free there"
    )


@cache
def _versions() -> dict[str, str]:
    packages = {name: package_version(name) for name in ("pathswitch", "torch", "deepspeed")}
    return {**packages, "python": platform.python_version()}


@cache
def _git_commit() -> str | None:
    """Return the commit of the training script's tree, with "+" if files of it were changed since."""
    script = Path(sys.argv[0] or ".").resolve()
    folder = script.parent if script.is_file() else Path.cwd()

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
        return result.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or not a repository
