"""Durable checkpoints of Megatron's: what it saves is committed, what it loads is verified.

Megatron writes into a hidden folder, since the names that it asks for are answered so while a save is pending. When it
is done, at once or after an asynchronous save, all ranks commit together, and only then is the newest one named.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from pathswitch.checkpoint import (
    MEGATRON,
    MEGATRON_PACKAGE,
    Manifest,
    Parallelism,
    begin_save,
    committed_checkpoints,
    iteration_folder,
    iteration_of,
    shard_names,
    staging_folder,
)
from pathswitch.checkpoint.retention import prune
from pathswitch.errors import CheckpointError, LedgerError
from pathswitch.integrations.collective import on_first_rank
from pathswitch.integrations.committing import commit_together, git_commit, record_checkpoint, versions
from pathswitch.integrations.source import Source
from pathswitch.versions.ledger import folder_name, run_ledger
from pathswitch.versions.records import PrunedRecord
from pathswitch_megatron.job import Job
from pathswitch_megatron.scheduler import PlannedParamScheduler

logger = logging.getLogger("pathswitch")

WRITERS_RANK = re.compile(r"__(\d+)_\d+\.distcp")


@dataclass(frozen=True)
class Position:
    """Where a job stands when it saves, and how it is cut."""

    iteration: int
    samples_seen: int
    seq_length: int
    parallelism: Parallelism
    dtype: str


@dataclass(frozen=True)
class Save:
    """A save that has begun and is not yet committed."""

    folder: Path
    manifest: Manifest
    """As it was when the save began, without its files."""


class IterationCheckpoints:
    """Saves and loads of one job's folders ``iter_*``, on all ranks together.

    Attributes:
        parent: digest of the manifest loaded or saved last.
    """

    def __init__(self, job: Job, megatron_version: str) -> None:
        self.job = job
        self.parent: str | None = None
        self._megatron_version = megatron_version
        self._pending: dict[Path, Save] = {}

    def begin(self, save_dir: Path, scheduler: PlannedParamScheduler, position: Position) -> Save:
        """Prepare the hidden folder that the checkpoint is to be written into."""
        folder = save_dir.absolute() / iteration_folder(position.iteration)

        def prepare() -> None:
            begin_save(folder)
            _own_tracker(folder.parent).unlink(missing_ok=True)

        on_first_rank(prepare)
        save = Save(folder, self._manifest(folder, scheduler, position))
        self._pending[folder] = save
        return save

    def forget(self, save: Save) -> None:
        """Give a save up; its hidden folder is removed by the next one of this iteration."""
        self._pending.pop(save.folder, None)

    def place_of(self, path: str) -> str:
        """Return where Megatron has to write a file or folder of a checkpoint that is being saved."""
        given = Path(path).absolute()
        for folder in self._pending:
            if given == folder or folder in given.parents:
                return str(staging_folder(folder) / given.relative_to(folder))
        return path

    def place_of_tracker(self, path: str) -> str:
        """Return where Megatron has to note its newest checkpoint while one is being saved; we note it at the end."""
        folder = Path(path).absolute().parent
        return str(_own_tracker(folder)) if any(f.parent == folder for f in self._pending) else path

    def commit(self, save: Save, retain_interval: int | None = None) -> None:
        """Make a finished save a checkpoint.

        Args:
            save: what ``begin`` returned; Megatron has written all of it, on all ranks.
            retain_interval: Megatron's --save-retain-interval in iterations: the checkpoint before goes if its
                iteration is not a multiple of it and no branch forks there.

        Raises:
            CheckpointError: on every rank, if any rank could not write; what was saved before is as it was.
        """
        staging = staging_folder(save.folder)
        self._pending.pop(save.folder)
        manifest = save.manifest.changed(parent=self.parent)

        def committed(manifest: Manifest) -> None:
            before = MEGATRON.latest(save.folder.parent)
            MEGATRON.write_latest(save.folder.parent, save.folder.name)
            _own_tracker(save.folder.parent).unlink(missing_ok=True)
            record_checkpoint(self.job.run, save.folder, manifest)
            if retain_interval is not None and before not in (None, save.folder.name):
                self._retain(save.folder.with_name(str(before)), retain_interval)

        self.parent = commit_together(
            save.folder,
            _share_of(dist.get_rank(), staging),
            [],
            lambda files: manifest.changed(files=files),
            key=self.job.key,
            committed=committed,
        )

    def choose(self, load_dir: Path, iteration: int | None) -> tuple[Path, Manifest | None] | None:
        """Return the verified checkpoint to load, None to train from the beginning; see ``Source.choose``.

        Raises:
            CheckpointError: on every rank: it is damaged, uncommitted or missing, or not this path's.
        """
        job = self.job
        tag = None if iteration is None else iteration_folder(iteration)
        source = Source(load_dir.absolute(), MEGATRON, job.path, job.settings, job.key)
        chosen = source.choose(tag)
        if chosen is None:
            return None
        folder, manifest = chosen
        if manifest is not None and not source.belongs(manifest):
            path = job.path
            fork = f", or of {path.parent!r} at step {path.start_step}, where it forks" if path.parent else ""
            raise CheckpointError(
                f"{folder}: a checkpoint of {manifest.path!r} ({manifest.paradigm}) at step {manifest.step}; path "
                f"{path.name!r} can go on from its own{fork}"
            )
        return folder, manifest

    def is_newest(self, folder: Path) -> bool:
        """Return whether Megatron's own file names this checkpoint."""
        return MEGATRON.latest(folder.parent) == folder.name

    def _manifest(self, folder: Path, scheduler: PlannedParamScheduler, position: Position) -> Manifest:
        path, step = self.job.path, scheduler.last_epoch
        return Manifest(
            tag=folder.name,
            paradigm=path.paradigm,
            path=path.name,
            step=step,
            global_steps=position.iteration,
            samples_seen=position.samples_seen,
            tokens_seen=position.samples_seen * position.seq_length,
            next_lr=path.lr(step),
            schedule_digest=path.digest,
            plan_digest=self.job.plan.digest,
            data_digests=None,
            parallelism=position.parallelism,
            dtype=position.dtype,
            versions={**versions(), MEGATRON_PACKAGE: self._megatron_version},
            git_commit=git_commit(),
            parent=None,
            settings=scheduler.data_settings(),
            files={},
        )

    def _retain(self, folder: Path, interval: int) -> None:
        iteration = iteration_of(folder.name)
        forks = self.job.forks.values()
        known = dict(committed_checkpoints(folder.parent, self.job.key))
        if iteration is None or iteration % interval == 0 or folder not in known or known[folder].step in forks:
            return
        run = self.job.run

        def record(pruned: Path, manifest: Manifest) -> None:
            run_ledger(run).append(PrunedRecord(manifest.digest, folder_name(pruned, run)))

        try:
            prune(folder, known[folder].digest, record)
        except (OSError, LedgerError) as error:  # the new checkpoint is committed: no reason to end the training
            logger.warning("pathswitch: %s was not removed: %s", folder, error)


def _own_tracker(checkpoints: Path) -> Path:
    return checkpoints / f".{MEGATRON.latest_file}.saving"


def _share_of(rank: int, staging: Path) -> Iterable[Path]:
    """Yield the files that a rank vouches for: those that it wrote, and its share of those whose names do not tell."""
    for index, name in enumerate(sorted(shard_names(staging))):
        match = WRITERS_RANK.fullmatch(name)
        if (int(match[1]) if match else index) % dist.get_world_size() == rank:
            yield staging / name
