"""The ledger: a folder of immutable records, each a file named by its digest; the folder is all there is.

A record is written under a temporary name, synced and renamed, so that any number of jobs on any number of nodes may
write at the same time, and die at any moment, without a lock. A file is one line of JSON: the record's canonical form
with ``written_at`` put behind its last field. The name is the SHA-256 of the canonical form, without the time: what two
writers have in common is one record, and a clock changes nothing but what is shown.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from pathswitch.atomic import sync_folder, write_bytes_atomic
from pathswitch.errors import LedgerError
from pathswitch.versions.records import FORMAT, KINDS, Record, canonical, from_fields

SUFFIX = ".json"
_TIME = ',"written_at":"%Y-%m-%dT%H:%M:%SZ"}\n'
_TIME_LENGTH = len(datetime(2000, 1, 1).strftime(_TIME))
_TIME_PATTERN = re.compile(rb',"written_at":"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)"\}\n')
_JSON = json.JSONDecoder()
_READ_SIZE = 1 << 12  # a buffer that is allocated 100,000 times; nearly all records are far shorter


class StoredRecord(NamedTuple):
    """A record as the ledger holds it."""

    digest: str
    record: Record
    written_at: str
    """UTC, by the clock of whoever wrote it first; for information alone."""


@dataclass(frozen=True)
class DamagedFile:
    """A file in the ledger that is no record, or no longer one."""

    file: Path
    reason: str


@dataclass(frozen=True)
class LedgerContent:
    """Everything in a ledger, in the order of the digests: a ledger itself knows no before and after."""

    records: tuple[StoredRecord, ...]
    damaged: tuple[DamagedFile, ...]


@dataclass(frozen=True)
class Ledger:
    """The records in one folder."""

    folder: Path

    def append(self, record: Record) -> str:
        """Write a record, unless it is there, and return its digest; once this returns, the record survives a crash.

        Raises:
            LedgerError: the folder cannot be written.
        """
        content = canonical(record)
        digest = hashlib.sha256(content).hexdigest()
        file = self.folder / f"{digest}{SUFFIX}"
        try:
            self._make_folder()
            if _is_whole(file, digest):
                sync_folder(self.folder)  # whoever wrote it may not have come that far
            else:
                # Another writer of the same record may be faster still: then its file is replaced by an equal one.
                write_bytes_atomic(file, content[:-1] + datetime.now(UTC).strftime(_TIME).encode("ascii"))
        except OSError as error:
            raise LedgerError(f"{self.folder}: a record cannot be written ({error.strerror})") from error
        return digest

    def read(self) -> LedgerContent:
        """Return all records, and by name every file that is none; what a killed writer left behind is ignored.

        Raises:
            LedgerError: a whole record is of a kind or a format that this release does not know.
        """
        records: list[StoredRecord] = []
        damaged: list[DamagedFile] = []
        with _collector_paused():
            for name, data in self._files():
                try:
                    records.append(self._parse(name, data))
                except ValueError:
                    # A short read, or a file that was replaced at this moment, is not damage: look again, slowly.
                    try:
                        records.append(self._parse(name, (self.folder / name).read_bytes()))
                    except (ValueError, OSError) as error:
                        damaged.append(DamagedFile(self.folder / name, str(error)))
        return LedgerContent(tuple(records), tuple(damaged))

    def _files(self) -> Iterator[tuple[str, bytes]]:
        """Yield the names and contents of all files but temporary ones, sorted; a missing folder has none."""
        try:
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return
        try:
            # Hidden files are the file system's own, such as those that NFS keeps for a reader of a replaced file.
            names = [name for name in os.listdir(folder) if not name.startswith(".") and not name.endswith(".tmp")]
            for name in sorted(names):
                yield name, _read_once(name, folder)
        finally:
            os.close(folder)

    def _parse(self, name: str, data: bytes) -> StoredRecord:
        digest, (content, written_at) = name.removesuffix(SUFFIX), _split(data)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError("its content does not match its name")
        fields, _ = _JSON.raw_decode(content.decode("ascii"))
        if not isinstance(fields, dict) or not {"format", "kind"} <= fields.keys():
            raise ValueError("it has no format and no kind")
        version, kind = fields.pop("format"), fields.pop("kind")
        if version != FORMAT or kind not in KINDS:
            raise LedgerError(
                f"{self.folder / name}: given a record of format {version!r} and kind {kind!r}; this release of "
                f"pathswitch reads format {FORMAT} with the kinds {', '.join(KINDS)}: a newer one has written here"
            )
        return StoredRecord(digest, from_fields(kind, fields), written_at)

    def _make_folder(self) -> None:
        if not self.folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            sync_folder(self.folder.parent)


def _split(data: bytes) -> tuple[bytes, str]:
    """Return a file's canonical form, which the digest is taken of, and its time.

    Raises:
        ValueError: the file does not end as records do.
    """
    time = _TIME_PATTERN.fullmatch(data, max(0, len(data) - _TIME_LENGTH))
    if time is None:
        raise ValueError("it does not end as records do")
    return data[: time.start()] + b"}", time[1].decode("ascii")


def _is_whole(file: Path, digest: str) -> bool:
    try:
        content, _ = _split(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return hashlib.sha256(content).hexdigest() == digest


def _read_once(name: str, folder: int) -> bytes:
    """Return the beginning of a file, which for nearly all records is the whole; nothing where it cannot be read."""
    try:
        file = os.open(name, os.O_RDONLY, dir_fd=folder)
    except OSError:
        return b""
    try:
        return os.read(file, _READ_SIZE)
    except OSError:
        return b""
    finally:
        os.close(file)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Spare the garbage collector from walking over ever more records, none of which is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def run_ledger(run: Path) -> Ledger:
    """Return the ledger of a run folder."""
    return Ledger(run / "ledger")


def folder_name(folder: Path, run: Path) -> str:
    """Return a folder as records name it: relative to the run folder where it lies inside, else absolute."""
    folder, run = folder.resolve(), run.resolve()
    return folder.relative_to(run).as_posix() if folder.is_relative_to(run) else folder.as_posix()
