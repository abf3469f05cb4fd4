"""Token files in Megatron's indexed format: ``<prefix>.bin`` holds the tokens, ``<prefix>.idx`` the documents.

Layout of ``.idx``, little-endian: magic (9 bytes), version (u64 = 1), dtype code (u8), sequence count n (u64), document
count + 1 (u64), n lengths in tokens (i32), n byte offsets into ``.bin`` (i64), document bounds in sequences (i64).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from pathswitch.atomic import publish, temp_path
from pathswitch.errors import ConfigError, DataError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPE_OF_CODE: dict[int, np.dtype[Any]] = {4: np.dtype("<i4"), 5: np.dtype("<i8"), 8: np.dtype("<u2")}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
# Megatron's own border between uint16 and int32.
_UINT16_BELOW = 65500


def _bin(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".bin")


def _idx(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Write one token file, one sequence per document; nothing appears under its name before a clean exit."""

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        """Prepare to write ``<prefix>.bin`` and ``<prefix>.idx``, as uint16 below 65,500 ids, else as int32.

        Raises:
            ConfigError: ``vocab_size`` outside 1 to 2**31.
        """
        if not 0 < vocab_size <= 2**31:
            raise ConfigError("vocab_size", given=vocab_size, allowed="1 to 2147483648")
        self._prefix = prefix
        self._vocab_size = vocab_size
        self._dtype = np.dtype("<u2" if vocab_size < _UINT16_BELOW else "<i4")
        self._lengths: list[int] = []

    def __enter__(self) -> IndexedWriter:
        self._temp_bin, self._temp_idx = temp_path(_bin(self._prefix)), temp_path(_idx(self._prefix))
        self._file = self._temp_bin.open("wb")
        return self

    def add_document(self, tokens: Sequence[int] | npt.NDArray[Any]) -> None:
        """Append one document of at least one token.

        Raises:
            DataError: no token, or one outside ``0 .. vocab_size - 1``.
        """
        array = np.asarray(tokens)
        where = f"{_bin(self._prefix)}: document {len(self._lengths)}"
        if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
            given = f"{array.dtype} of shape {array.shape}"
            raise DataError(f"{where}: given {given}; allowed: at least one integer, in one dimension")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self._vocab_size:
            bad = low if low < 0 else high
            raise DataError(f"{where}: given token {bad}; allowed: 0 to {self._vocab_size - 1}")
        self._file.write(array.astype(self._dtype).tobytes())
        self._lengths.append(array.size)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._file as file:
                file.flush()
                os.fsync(file.fileno())
            if kind is None:
                self._commit()
        finally:
            self._temp_bin.unlink(missing_ok=True)
            self._temp_idx.unlink(missing_ok=True)

    def _commit(self) -> None:
        count = len(self._lengths)
        lengths = np.array(self._lengths, dtype=np.int64)
        offsets = (np.cumsum(lengths) - lengths) * self._dtype.itemsize
        with self._temp_idx.open("wb") as file:
            file.write(_HEADER.pack(_MAGIC, _VERSION, _CODE_OF_DTYPE[self._dtype], count, count + 1))
            file.write(lengths.astype("<i4").tobytes())
            file.write(offsets.astype("<i8").tobytes())
            file.write(np.arange(count + 1, dtype="<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        # An index left from before must never stand beside new tokens; the new one comes last.
        _idx(self._prefix).unlink(missing_ok=True)
        publish(self._temp_bin, _bin(self._prefix))
        publish(self._temp_idx, _idx(self._prefix))


class IndexedTokens:
    """Read a token file, memory-mapped; ``tokens`` is one flat array over all documents in order."""

    tokens: npt.NDArray[Any]
    document_lengths: npt.NDArray[np.int64]

    def __init__(self, prefix: Path) -> None:
        """Map ``<prefix>.bin`` and check it against ``<prefix>.idx``.

        Raises:
            DataError: a file is missing, is not of this format, or has another size than the index says.
        """
        index, tokens = _idx(prefix), _bin(prefix)
        for path in (index, tokens):
            if not path.is_file():
                raise DataError(f"{path}: no such file; a token file is a pair .bin and .idx")
        dtype, lengths, offsets, bounds = _read_index(index)
        ends = np.cumsum(lengths)
        if not np.array_equal(offsets, (ends - lengths) * dtype.itemsize):
            raise DataError(f"{index}: the documents do not follow each other without gaps in {tokens.name}")
        total = int(ends[-1]) if lengths.size else 0
        _check_size(tokens, total * dtype.itemsize)
        # np.memmap refuses an empty file; the base class makes slices of the map cheap.
        self.tokens = np.memmap(tokens, dtype, "r").view(np.ndarray) if total else np.empty(0, dtype)
        self.document_lengths = np.diff(np.concatenate(([0], ends))[bounds])


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size
    if found != expected:
        raise DataError(f"{path}: {found} bytes found, {expected} expected; the file is truncated or not of this index")


def _read_index(
    path: Path,
) -> tuple[np.dtype[Any], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return dtype, sequence lengths in tokens, byte offsets, and document bounds in sequences."""
    data = path.read_bytes()
    if len(data) < _HEADER.size:
        raise DataError(f"{path}: {len(data)} bytes found, at least {_HEADER.size} expected")
    magic, version, code, sequences, documents = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise DataError(f"{path}: starts with {magic!r}; allowed: {_MAGIC!r} (Megatron's indexed format)")
    if version != _VERSION:
        raise DataError(f"{path}: format version {version}; allowed: {_VERSION}")
    if code not in _DTYPE_OF_CODE:
        known = ", ".join(f"{key} ({dtype.name})" for key, dtype in _DTYPE_OF_CODE.items())
        raise DataError(f"{path}: dtype code {code}; allowed: {known}")
    _check_size(path, _HEADER.size + 12 * sequences + 8 * documents)
    lengths = np.frombuffer(data, "<i4", sequences, _HEADER.size).astype(np.int64)
    offsets = np.frombuffer(data, "<i8", sequences, _HEADER.size + 4 * sequences)
    bounds = np.frombuffer(data, "<i8", documents, _HEADER.size + 12 * sequences)
    if not bounds.size or bounds[0] != 0 or bounds[-1] != sequences or (np.diff(bounds) < 0).any():
        raise DataError(f"{path}: the document bounds are not a rising list from 0 to {sequences} sequences")
    return _DTYPE_OF_CODE[code], lengths, offsets, bounds
