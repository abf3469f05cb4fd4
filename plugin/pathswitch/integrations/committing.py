"""A commit of all ranks together: each hashes what it wrote, then rank 0 publishes the manifest and records it."""

from __future__ import annotations

import logging
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path

import torch.distributed as dist

from pathswitch.checkpoint import (
    FileEntry,
    Manifest,
    commit,
    committed_checkpoints,
    discard,
    hash_file,
    shard_names,
    staging_folder,
)
from pathswitch.errors import CheckpointError, LedgerError
from pathswitch.integrations.collective import describe_os_error, gather, on_first_rank
from pathswitch.versions import Path as TrainingPath
from pathswitch.versions.ledger import folder_name, run_ledger
from pathswitch.versions.records import CheckpointRecord

logger = logging.getLogger("pathswitch")

GIT_SECONDS = 5


def commit_together(
    folder: Path,
    written: Iterable[Path],
    failures: list[str],
    manifest_of: Callable[[dict[str, FileEntry]], Manifest],
    *,
    key: bytes | None,
    committed: Callable[[Manifest], None],
) -> str:
    """Make the staging folder of ``folder`` the checkpoint, on every rank, and return its manifest's digest.

    Args:
        folder: the checkpoint's folder.
        written: the files in the staging folder that this rank wrote.
        failures: what went wrong on this rank while it wrote.
        manifest_of: makes the manifest of the files' entries; runs on rank 0.
        key: signs the manifest.
        committed: what rank 0 does once the checkpoint is there: name it, record it.

    Raises:
        CheckpointError: on every rank, if any rank could not write; what was saved before is as it was.
    """
    staging = staging_folder(folder)
    dist.barrier()
    own, failure = _own_entries(written, staging)
    reports = gather((own, failures + ([failure] if failure else [])))
    all_failures = [line for _, lines in reports for line in lines]
    if all_failures:
        message = on_first_rank(lambda: _not_saved(folder, all_failures))
        on_first_rank(lambda: discard(staging))
        raise CheckpointError(message)
    entries = {name: entry for files, _ in reversed(reports) for name, entry in files.items()}

    def publish() -> str:
        # Whatever was written past the framework's writer, tensors offloaded to NVMe for one.
        rest = {name: hash_file(staging / name, sync=True) for name in sorted(shard_names(staging) - entries.keys())}
        manifest = manifest_of(dict(sorted({**entries, **rest}.items())))
        commit(folder, manifest, key)
        committed(manifest)
        return manifest.digest

    try:
        return on_first_rank(publish)
    except CheckpointError as error:
        reasons = [str(error)]
        raise CheckpointError(on_first_rank(lambda: _not_saved(folder, reasons))) from None


def _own_entries(written: Iterable[Path], staging: Path) -> tuple[dict[str, FileEntry], str | None]:
    """Return the entries of the files that this rank wrote, durable by now, or why there are none."""
    rank = dist.get_rank()
    try:
        files = [path for path in written if path.is_file()]
        return {p.relative_to(staging).as_posix(): hash_file(p, rank=rank, sync=True) for p in files}, None
    except OSError as error:
        return {}, f"rank {rank}: {reason(error)}"


def require_own_folder(save_dir: Path, path: TrainingPath, key: bytes | None, where: str) -> None:
    """Refuse a folder that holds checkpoints of another path: the newest would hide them.

    Raises:
        CheckpointError: on every rank.
    """

    def check() -> None:
        for folder, manifest in committed_checkpoints(save_dir.absolute(), key):
            if (manifest.paradigm, manifest.path) != (path.paradigm, path.name):
                raise CheckpointError(
                    f"{where} {save_dir}: holds {folder.name} of path {manifest.path!r}; path {path.name!r} needs a "
                    "folder of its own"
                )

    on_first_rank(check)


def record_checkpoint(run: Path, folder: Path, manifest: Manifest) -> None:
    """Append a committed checkpoint to the run's ledger."""
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


def reason(error: Exception) -> str:
    """Return an error in one line."""
    return describe_os_error(error) if isinstance(error, OSError) else str(error).partition("\n")[0]


def _not_saved(folder: Path, reasons: list[str]) -> str:
    # torch's writer says what it could not do, but not why: a full disk is for the reader to see.
    free = shutil.disk_usage(folder.parent).free
    return (
        f"{folder} was not saved: {'; '.join(reasons)}. What was saved before is as it was; {free} bytes are free there"
    )


@cache
def versions(*frameworks: str) -> dict[str, str]:
    """Return the versions of pathswitch, torch, the given packages and python."""
    packages = {name: package_version(name) for name in ("pathswitch", "torch", *frameworks)}
    return {**packages, "python": platform.python_version()}


@cache
def git_commit() -> str | None:
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
