"""Forks: a branch's first checkpoint, made of its parent's own files; no byte is copied where the file system can.

A reflink shares the parent's blocks, a hard link the file itself. The link is safe since a save never opens a file of
an older checkpoint: it writes a hidden folder and renames it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathswitch.atomic import sync_folder, write_bytes_atomic
from pathswitch.checkpoint.commit import discard
from pathswitch.checkpoint.files import MANIFEST_FILE, FileEntry, hash_file
from pathswitch.checkpoint.layout import layout_of
from pathswitch.checkpoint.manifest import SHORT_DIGEST, Manifest, Policy, read_manifest
from pathswitch.checkpoint.verify import Finding, checkpoint_folders, describe_findings, verify_checkpoint
from pathswitch.errors import CheckpointError

Method = Literal["reflink", "hard link", "copy"]
CompareMode = Literal["full", "sizes"]
Tick = Callable[[int], None]

FICLONE = 0x40049409  # linux/fs.h
COPY_CHUNK = 8 << 20
# The file system, or this pair of files, cannot do it: not supported, another device, no permission to link a file of
# another owner, too many links. Everything else (no space, no permission) is an error.
_UNABLE = {
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EINVAL,
    errno.EXDEV,
    errno.EPERM,
    errno.EMLINK,
}


@dataclass(frozen=True)
class Fork:
    """A branch's first checkpoint."""

    folder: Path
    manifest: Manifest
    created: bool
    """False where the same fork was there already."""
    method: Method | None
    """How most of its files came; None where it was there already."""


def fork_checkpoint(
    source: Path,
    target: Path,
    *,
    policy: Policy,
    paradigm: str,
    path: str,
    key: bytes | None = None,
    verify: CompareMode = "full",
    verifying: Tick = lambda _: None,
    copying: Tick = lambda _: None,
) -> Fork:
    """Make the folder ``target`` the first checkpoint of a branch, out of the committed checkpoint ``source``.

    Killed at any moment it leaves at most a hidden folder, and can be run again; of two that run at once, the first
    wins, and the second agrees with it or fails.

    Args:
        source: the parent path's checkpoint folder at the fork step.
        target: the branch's checkpoint folder, ``<the branch's checkpoints>/<tag>``.
        policy: what changes beside the LR; it is applied when the branch's job loads the fork.
        paradigm: that of the branch, which must be the source's.
        path: the branch's name.
        key: signs the fork's manifest, and must have signed the source's.
        verify: what is compared in the source before: digests, or sizes alone.
        verifying: gets the bytes of each file verified.
        copying: gets the bytes copied, where files have to be copied.

    Raises:
        CheckpointError: the source is damaged or was never committed, the branch has other checkpoints, or the target
            cannot be written.
    """
    parent = read_manifest(source, key)
    if parent.paradigm != paradigm:
        raise CheckpointError(f"{source}: of paradigm {parent.paradigm}; allowed: {paradigm}, the branch's own")
    manifest = _forked(parent, target.name, path, policy)
    _require_first(target, path)
    try:
        if target.exists():
            return _existing(source, target, manifest, key)
        verify_checkpoint(source, verify, key, verifying)
        temp = target.with_name(f".{target.name}.forking-{uuid.uuid4().hex}")
        try:
            method = _fill(source, temp, manifest, key, copying)
            if read_manifest(source, key).digest != parent.digest:
                raise CheckpointError(f"{source}: replaced by another save while it was being forked; fork it again")
            if not _rename(temp, target):
                return _existing(source, target, manifest, key)
        finally:
            discard(temp)
        sync_folder(target.parent)
        layout_of(manifest).write_latest(target.parent, target.name)
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be forked from {source}: {_describe(error)}") from None
    return Fork(target, manifest, True, method)


def _forked(parent: Manifest, tag: str, path: str, policy: Policy) -> Manifest:
    return parent.changed(tag=tag, path=path, parent=parent.digest, forked_from=parent.digest, policy=policy)


def _require_first(target: Path, path: str) -> None:
    """Refuse a folder that holds other checkpoints: ``latest`` would leave them for the fork."""
    others = sorted(folder.name for folder in checkpoint_folders(target.parent) if folder != target)
    if others:
        raise CheckpointError(
            f"{target.parent}: holds other checkpoints ({', '.join(others)}): a fork is the first one of {path!r}; "
            "remove them to begin the branch anew, or fork into another folder"
        )


def _existing(source: Path, target: Path, manifest: Manifest, key: bytes | None) -> Fork:
    """Return the fork that was there first.

    Raises:
        CheckpointError: it is not the same.
    """
    existing = read_manifest(target, key)
    if (existing.path, existing.forked_from, existing.policy) != (manifest.path, manifest.forked_from, manifest.policy):
        raise CheckpointError(
            f"{target}: given a fork of {_origin(manifest)} ({source}); there is already {_origin(existing)}. Remove "
            "that one, or fork into another folder"
        )
    if (layout := layout_of(existing)).latest(target.parent) is None:
        layout.write_latest(target.parent, target.name)
    return Fork(target, existing, False, None)


def _origin(manifest: Manifest) -> str:
    if manifest.forked_from is None:
        return f"checkpoint {manifest.digest[:SHORT_DIGEST]} of {manifest.path!r}, which is not a fork"
    changes = ", ".join(f"{name} = {value}" for name, value in manifest.policy.changes().items()) or "no changes"
    return f"checkpoint {manifest.forked_from[:SHORT_DIGEST]} for {manifest.path!r} with {changes}"


def _fill(source: Path, temp: Path, manifest: Manifest, key: bytes | None, copying: Tick) -> Method:
    """Put the manifest and all its files into ``temp``, durably."""
    temp.mkdir(parents=True)
    methods: list[Method] = ["reflink", "hard link", "copy"]
    for name, entry in manifest.files.items():
        (temp / name).parent.mkdir(parents=True, exist_ok=True)
        # What one file of a folder cannot do, the next will not do either. Linux links a symbolic link itself: resolve.
        while not _put(methods[0], (source / name).resolve(), temp / name, entry, copying):
            methods.pop(0)
    for folder in {(temp / name).parent for name in manifest.files}:
        sync_folder(folder)
    write_bytes_atomic(temp / MANIFEST_FILE, manifest.encode(key))
    return methods[0]


def _put(method: Method, source: Path, target: Path, entry: FileEntry, copying: Tick) -> bool:
    """Make ``target`` the same file content as ``source``; return False where this method is not to be had."""
    if method == "copy":
        _copy(source, target, entry, copying)
        return True
    try:
        if method == "reflink":
            _reflink(source, target)
        else:
            os.link(source, target)
    except OSError as error:
        if error.errno not in _UNABLE:
            raise
        return False
    return True


def _reflink(source: Path, target: Path) -> None:
    try:
        with source.open("rb") as original, target.open("xb") as clone:
            fcntl.ioctl(clone.fileno(), FICLONE, original.fileno())
            os.fsync(clone.fileno())
    except OSError:
        target.unlink(missing_ok=True)
        raise


def _copy(source: Path, target: Path, entry: FileEntry, copying: Tick) -> None:
    buffer = memoryview(bytearray(COPY_CHUNK))
    with source.open("rb", buffering=0) as original, target.open("xb", buffering=0) as copy:
        while size := original.readinto(buffer):
            written = 0
            while written < size:
                written += copy.write(buffer[written:size])
            copying(size)
    found = hash_file(target, sync=True)
    if found.blake3 != entry.blake3:
        finding = Finding(target.name, f"blake3 {entry.blake3}", f"blake3 {found.blake3}, copied from {source}")
        raise CheckpointError(describe_findings(target.parent, [finding]))


def _rename(temp: Path, target: Path) -> bool:
    """Commit; return False where another fork was faster."""
    try:
        os.rename(temp, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    return True


def _describe(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror}{where}"
