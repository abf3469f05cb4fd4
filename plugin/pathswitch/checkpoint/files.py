"""The files of a checkpoint folder and their digests."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from blake3 import blake3
from pydantic import BaseModel, ConfigDict

MANIFEST_FILE = "pathswitch.json"


class FileEntry(BaseModel):
    """One file as its writer left it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    size: int
    """In bytes."""
    blake3: str
    rank: int
    """The rank that wrote it, which will verify it again where the ranks are the same."""


def digest_bytes(content: bytes) -> str:
    """Return the BLAKE3 digest in hex."""
    return blake3(content).hexdigest()


def hash_file(path: Path, *, rank: int = 0, sync: bool = False) -> FileEntry:
    """Return a file's size and digest, read through the page cache on all cores.

    Args:
        path: a regular file.
        rank: the rank that wrote it.
        sync: also make the content durable; the disk writes while the hash is computed.

    Raises:
        OSError: the file cannot be read.
    """
    hasher = blake3(max_threads=blake3.AUTO)
    with path.open("rb") as file, ThreadPoolExecutor(1) as pool:
        synced = pool.submit(os.fsync, file.fileno()) if sync else None
        size = os.fstat(file.fileno()).st_size
        if size:
            hasher.update_mmap(path)
        if synced is not None:
            synced.result()
    return FileEntry(size=size, blake3=hasher.hexdigest(), rank=rank)


def shard_names(folder: Path) -> set[str]:
    """Return the names, relative to the folder, of all files in it but its manifest and unfinished temporaries."""
    names = set()
    for directory, _, files in os.walk(folder):
        relative = Path(directory).relative_to(folder)
        names |= {(relative / name).as_posix() for name in files}
    return {name for name in names if name != MANIFEST_FILE and not name.endswith(".tmp")}


def is_shard(name: str) -> bool:
    """Return whether DeepSpeed might load a file of this name by itself: it finds its shards by pattern."""
    return name.endswith(".pt")


def regular_size(path: Path) -> int | None:
    """Return a regular file's size in bytes, None where there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None
