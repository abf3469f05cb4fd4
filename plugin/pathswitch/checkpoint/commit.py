"""Committing a checkpoint: written in a hidden folder, renamed when it is whole.

A folder ``<tag>`` therefore never holds a part of a checkpoint, and no save ever opens a file of an older one, which
may be hard-linked into a branch. Killed at any moment, a save leaves at most hidden folders, that the next one removes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pathswitch.atomic import sync_folder, write_bytes_atomic
from pathswitch.checkpoint.files import MANIFEST_FILE, is_shard
from pathswitch.checkpoint.manifest import Manifest


def staging_folder(folder: Path) -> Path:
    """Return where the checkpoint ``folder`` is written before it is committed."""
    return folder.with_name(f".{folder.name}.saving")


def _replaced_folder(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def begin_save(folder: Path) -> Path:
    """Return an empty staging folder for the checkpoint ``folder``; what a killed save left there is gone."""
    staging = staging_folder(folder)
    discard(staging)
    staging.mkdir(parents=True)
    return staging


def discard(staging: Path) -> None:
    """Remove a folder if it is there."""
    if staging.is_dir():
        shutil.rmtree(staging)


def commit(folder: Path, manifest: Manifest, key: bytes | None = None) -> None:
    """Make the staging folder the checkpoint ``folder``; its files, already durable, are those of the manifest.

    An older checkpoint of the same name is put aside first and removed at the end. What lies beside its shards and is
    not a checkpoint's (a note, a tokenizer) is in the new one too.
    """
    staging, replaced = staging_folder(folder), _replaced_folder(folder)
    for directory in {(staging / name).parent for name in manifest.files}:
        sync_folder(directory)
    if folder.exists():
        _link_notes(folder, staging)
    write_bytes_atomic(staging / MANIFEST_FILE, manifest.encode(key))
    if folder.exists():
        discard(replaced)
        os.rename(folder, replaced)
    os.rename(staging, folder)
    sync_folder(folder.parent)
    discard(replaced)


def _link_notes(folder: Path, staging: Path) -> None:
    for entry in folder.iterdir():
        if is_shard(entry.name) or entry.name == MANIFEST_FILE or (staging / entry.name).exists():
            continue
        if entry.is_dir():
            shutil.copytree(entry, staging / entry.name, copy_function=os.link)
        else:
            os.link(entry, staging / entry.name)


def recover_replaced(folder: Path) -> None:
    """Put back what a save of the same tag had put aside when it was killed between its two renames."""
    replaced = _replaced_folder(folder)
    if not folder.exists() and replaced.is_dir():
        os.rename(replaced, folder)
        sync_folder(folder.parent)
