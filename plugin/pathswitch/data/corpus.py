"""Text files to documents: .txt and .jsonl, plain or compressed, streamed, and refused when damaged."""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import zstandard

from pathswitch.errors import ConfigError, DataError

FORMATS = (".txt", ".jsonl")
COMPRESSIONS = (".gz", ".xz", ".zst")
_OPEN: dict[str, Callable[..., io.BufferedIOBase]] = {"": open, ".gz": gzip.GzipFile, ".xz": lzma.LZMAFile}
CHUNK_BYTES = 1 << 20

_SURROGATE = re.compile("[\ud800-\udfff]")
_ALLOWED = f"{' or '.join(FORMATS)}, plain or followed by {', '.join(COMPRESSIONS)}"
# What a damaged file raises: gzip and lzma raise EOFError for a file that ends too early.
_DAMAGE = (EOFError, OSError, zlib.error, lzma.LZMAError, zstandard.ZstdError)


def expand(patterns: Sequence[str], base: Path) -> list[Path]:
    """Return the files that match any of the globs (relative to ``base``), sorted, each file once.

    Raises:
        ConfigError: a pattern matches no file, or no pattern is given.
    """
    if not patterns:
        raise ConfigError("text files", given=(), allowed=f"at least one pattern, relative to {base}")
    found: set[Path] = set()
    for pattern in patterns:
        matches = (base / name for name in glob.glob(pattern, root_dir=base, recursive=True))
        files = [path for path in matches if path.is_file()]
        if not files:
            raise ConfigError(
                "text files", given=pattern, allowed=f"a pattern that matches at least one file in {base}"
            )
        found.update(files)
    return sorted(found)


def read_documents(paths: Iterable[Path], *, separator: str | None) -> Iterator[str]:
    """Yield the documents of the files in order, holding one document and 1 MiB of text in memory.

    A .txt file is one document, or one per piece between ``separator`` (for example ``"\\n\\n\\n"``); a .jsonl
    file holds one document per line, the string ``"text"`` of a JSON object. Text that is only whitespace is
    not a document. Every other character is kept as it is, line ends included.

    Raises:
        ConfigError: an empty ``separator``, or a file name with an ending other than the allowed ones.
        DataError: a file without a document, not UTF-8 (with the byte offset in the uncompressed text), damaged
            compression, or (with the line) a line that is not a JSON object with a string ``"text"``.
    """
    if separator == "":
        raise ConfigError("separator", given=separator, allowed='a text of at least one character, as "\\n\\n\\n"')
    for path in paths:
        suffix, compression = _format(path)
        chunks = _chunks(path, compression)
        documents = _txt(path, chunks, separator) if suffix == ".txt" else _jsonl(path, chunks)
        empty = True
        for document in documents:
            if document and not document.isspace():
                empty = False
                yield document
        if empty:
            raise DataError(f"{path}: holds no document; allowed: a file with some text in it")


def _format(path: Path) -> tuple[str, str]:
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    suffix = path.with_suffix("").suffix if compression else path.suffix
    if suffix not in FORMATS:
        raise ConfigError("text file", given=str(path), allowed=f"a name that ends in {_ALLOWED}")
    return suffix, compression


def _chunks(path: Path, compression: str) -> Iterator[bytes]:
    """Yield the uncompressed bytes of a file, about 1 MiB at a time."""
    try:
        if compression == ".zst":
            yield from _zstd_chunks(path)
            return
        with _OPEN[compression](path, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except _DAMAGE as error:
        what = f"damaged {compression} file" if compression else "cannot be read"
        raise DataError(f"{path}: {what}: {error}") from error


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    """Decompress frame by frame: zstandard's own file object ends without an error in a truncated frame."""
    frame = None
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES // 8):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                if chunk := frame.decompress(data):
                    yield chunk
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the file ends inside a compressed frame")


def _txt(path: Path, chunks: Iterator[bytes], separator: str | None) -> Iterator[str]:
    if separator is None:
        yield "".join(_decoded(path, chunks))
        return
    rest = ""
    for text in _decoded(path, chunks):
        *pieces, rest = (rest + text).split(separator)
        yield from pieces
    yield rest


def _decoded(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the next chunk's first byte
    for chunk, final in _with_last(chunks):
        held = len(decoder.getstate()[0])  # bytes of a character that began in the chunk before
        try:
            yield decoder.decode(chunk, final)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset - held + error.start, error.reason) from error
        offset += len(chunk)


def _with_last(chunks: Iterator[bytes]) -> Iterator[tuple[bytes, bool]]:
    for chunk in chunks:
        yield chunk, False
    yield b"", True


def _not_utf8(path: Path, offset: int, reason: str) -> DataError:
    return DataError(f"{path}: byte offset {offset} is not UTF-8 ({reason}); allowed: UTF-8 text")


def _jsonl(path: Path, chunks: Iterator[bytes]) -> Iterator[str]:
    offset = 0  # of the line's first byte
    for number, line in enumerate(_lines(chunks), start=1):
        try:
            text = _text_of(line)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, offset + error.start, error.reason) from error
        except ValueError as error:
            raise DataError(f'{path}:{number}: {error}; allowed: a JSON object with a string "text"') from error
        offset += len(line) + 1
        yield text


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut at line feeds only; a line may be larger than a chunk."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *more = chunk.split(b"\n")
        parts.append(first)
        for line in more:
            yield b"".join(parts)
            parts = [line]
    if last := b"".join(parts):
        yield last


def _text_of(line: bytes) -> str:
    """Return the document in one JSON line; a ValueError says what is wrong with the line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f'no string "text" (given: {keys or "an empty object"})')
    if _SURROGATE.search(text):
        raise ValueError("the text holds half of a surrogate pair, which no UTF-8 text can hold")
    return text
