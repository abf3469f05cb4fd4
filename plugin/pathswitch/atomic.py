"""Files that are either whole or absent, also after a crash and on a shared file system."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def temp_path(path: Path) -> Path:
    """Name a fresh temporary file beside ``path``; every such name starts with ``<name>.`` and ends with ``.tmp``."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")


def publish(temp: Path, path: Path) -> None:
    """Make the already synced file ``temp`` appear as ``path``, replacing an older one, and sync the folder."""
    os.replace(temp, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_stamp(path: Path) -> tuple[int, ...]:
    """Return what is another once a file has been replaced or written to: device, inode, time and size.

    Raises:
        OSError: there is no such file.
    """
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old content or the new, never a part."""
    temp = temp_path(path)
    try:
        with temp.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` so that a reader sees the old content or the new, never a part."""
    write_bytes_atomic(path, text.encode("utf-8"))
