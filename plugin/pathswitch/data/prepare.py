"""Text of every version to a tokenizer and token files on disk, once; and back from disk for the training ranks.

In place of text, a plan may name token files that Megatron's tools have made: ``PREFIX.bin``, with ``PREFIX.idx``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from pathswitch.atomic import write_bytes_atomic, write_text_atomic
from pathswitch.data.corpus import expand, read_documents
from pathswitch.data.indexed import IndexedTokens, IndexedWriter
from pathswitch.data.tokenizer import Tokenizer, train_tokenizer
from pathswitch.errors import ConfigError, DataError

FORMAT = 1
SPLITS = ("train", "test")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_BATCH_CHARACTERS = 1 << 20
_TOKENS = ".bin"


@dataclass(frozen=True)
class VersionText:
    """Where one version's text, or its token files, lie: globs relative to the plan's folder."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]


@dataclass(frozen=True)
class StreamRecord:
    """What one token file was made from, and what it holds."""

    files: dict[str, str]
    """SHA-256 of every source file, by its path relative to the plan's folder."""
    documents: int
    tokens: int
    """Including one end-of-sequence token per document of text; those of token files as they are."""
    bytes: int
    """UTF-8 bytes of the documents' text; of token files, of the text that the tokenizer decodes them to."""


@dataclass(frozen=True)
class DataRecord:
    """The content of ``data.json``; a version stands in it only when its token files are complete."""

    tokenizer: str
    """SHA-256 of ``tokenizer.model``."""
    tokenizer_text: str | None
    """Name of the version whose training text the tokenizer was trained on; None when the model was given."""
    separator: str | None
    versions: dict[str, dict[str, StreamRecord]]


@dataclass(frozen=True)
class _Job:
    """The arguments of one call of `prepare`, apart from the versions."""

    base: Path
    out: Path
    vocab_size: int
    tokenizer_model: Path | None
    separator: str | None
    progress: Callable[[str], None]

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer.model"


class Prepared:
    """Tokenizer and token files of the prepared versions, memory-mapped."""

    def __init__(self, out: Path, record: DataRecord, names: Sequence[str]) -> None:
        """Open the folder ``out`` for the versions ``names``; see `load_prepared`."""
        self.names = tuple(names)
        self.tokenizer = Tokenizer(out / "tokenizer.model")
        if self.tokenizer.digest != record.tokenizer:
            raise DataError(
                f"{out / 'tokenizer.model'}: given sha256 {self.tokenizer.digest}, but the token files were made with "
                f"{record.tokenizer}; allowed: that model, or an empty folder to prepare anew"
            )
        self._records = {name: record.versions[name] for name in names}
        self._tokens = {
            (name, split): _open_tokens(out, name, split, record.versions[name][split])
            for name in names
            for split in SPLITS
        }

    def train_tokens(self, name: str) -> npt.NDArray[Any]:
        """Return all training tokens of a version, 1-D, in the order of its text."""
        return self._tokens[self._known(name), "train"]

    def test_tokens(self, name: str) -> npt.NDArray[Any]:
        """Return all test tokens of a version, 1-D, in the order of its text."""
        return self._tokens[self._known(name), "test"]

    def test_bytes(self, name: str) -> int:
        """Return the UTF-8 bytes of a version's test text, for bits per byte."""
        return self._records[self._known(name)]["test"].bytes

    def version_digest(self, name: str) -> str:
        """SHA-256 over the tokenizer and one version's source files and counts; other versions do not change it."""
        content = [self.tokenizer.digest, _as_json(self._records[self._known(name)])]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()

    def _known(self, name: str) -> str:
        if name not in self._records:
            raise DataError(f"version {name!r} is not prepared; prepared: {', '.join(self.names)}")
        return name


def prepare(
    versions: Sequence[VersionText],
    *,
    base: Path,
    out: Path,
    vocab_size: int,
    tokenizer_model: Path | None,
    separator: str | None,
    progress: Callable[[str], None],
) -> Prepared:
    """Bring ``out`` up to date with the versions' text and open it.

    The tokenizer is trained on the first version's training text, or copied from ``tokenizer_model``. A version that
    ``out`` holds is only checked against its text files; one that it lacks is added, and nothing else is touched. Each
    version is recorded in ``data.json`` after its files are complete, so a killed call is completed by the next one.
    The tokens of token files are taken as they are; ``tokenizer_model`` is then the model that they were made with.

    Raises:
        ConfigError: a bad name or pattern, text beside token files, token files without their tokenizer, or another
            tokenizer or separator than ``out`` was made with.
        DataError: unusable text or token files, or ones that changed since their version was prepared.
    """
    _check_names(versions)
    job = _Job(base, out, vocab_size, tokenizer_model, separator, progress)
    sources = {version.name: _sources(version, base) for version in versions}
    _check_kinds(job, [path for files in sources.values() for path in (*files["train"], *files["test"])])
    trained_on = versions[0].name if tokenizer_model is None else None
    out.mkdir(parents=True, exist_ok=True)
    if (out / "data.json").exists():
        record = _read_record(out)
    else:
        _make_tokenizer(job, sources[versions[0].name]["train"])
        record = DataRecord(Tokenizer(job.tokenizer).digest, trained_on, separator, {})
    _check_settings(job, record, trained_on)
    for name, files in sources.items():
        if name in record.versions:
            _check_unchanged(job, name, files, record.versions[name])
            continue
        record.versions[name] = {split: _encode(job, f"{name}_{split}", files[split]) for split in SPLITS}
        write_text_atomic(out / "data.json", json.dumps({"format": FORMAT, **asdict(record)}, indent=1) + "\n")
    return Prepared(out, record, list(sources))


def load_prepared(out: Path) -> Prepared:
    """Open a folder that `prepare` has made, all its versions, without looking at the text.

    Raises:
        DataError: there is no readable ``data.json``, or a file does not fit it.
    """
    record = _read_record(out)
    return Prepared(out, record, list(record.versions))


def _check_names(versions: Sequence[VersionText]) -> None:
    if not versions:
        raise ConfigError("versions", given=[], allowed="at least one version")
    seen: set[str] = set()
    for version in versions:
        if not _NAME.fullmatch(version.name) or version.name in seen:
            allowed = "a name of letters, digits, '.', '_', '-', which no other version has"
            raise ConfigError("version name", given=version.name, allowed=allowed)
        seen.add(version.name)


def _sources(version: VersionText, base: Path) -> dict[str, list[Path]]:
    return {"train": expand(version.train, base), "test": expand(version.test, base)}


def _check_kinds(job: _Job, files: Sequence[Path]) -> None:
    """Refuse text beside token files, and token files of an unknown tokenizer."""
    tokens = [path for path in files if path.suffix == _TOKENS]
    if not tokens:
        return
    if len(tokens) < len(files):
        text = next(path for path in files if path.suffix != _TOKENS)
        allowed = "either text or token files for all versions, train and test"
        raise ConfigError("train, test", given=f"{tokens[0].name} and {text.name}", allowed=allowed)
    if job.tokenizer_model is None:
        allowed = "the SentencePiece model that the token files were made with"
        raise ConfigError("[data] tokenizer", given="nothing", allowed=allowed)


def _make_tokenizer(job: _Job, files: Sequence[Path]) -> None:
    given = job.tokenizer_model
    if given is None:
        job.progress(f"tokenizer: training {job.vocab_size} pieces on {len(files)} file(s)")
        documents = read_documents(files, separator=job.separator)
        train_tokenizer(documents, vocab_size=job.vocab_size, model_path=job.tokenizer)
    else:
        job.progress(f"tokenizer: taken from {given}")
        Tokenizer(given)  # refuses an unusable file before it is copied
        write_bytes_atomic(job.tokenizer, given.read_bytes())


def _check_settings(job: _Job, record: DataRecord, trained_on: str | None) -> None:
    """Refuse settings under which the folder's token files would have come out differently."""
    rows: list[tuple[str, object, object]] = [
        ("version that the tokenizer is trained on", trained_on, record.tokenizer_text),
        ("tokenizer vocab_size", job.vocab_size, Tokenizer(job.tokenizer).vocab_size),
        ("separator", job.separator, record.separator),
    ]
    if job.tokenizer_model is not None:
        given = Tokenizer(job.tokenizer_model).digest
        rows.insert(0, (f"sha256 of tokenizer {job.tokenizer_model}", given, record.tokenizer))
    for what, value, recorded in rows:
        if value != recorded:
            raise ConfigError(what, given=value, allowed=f"{recorded!r}, as in {job.out}, or another folder to prepare")


def _check_unchanged(job: _Job, name: str, files: dict[str, list[Path]], recorded: dict[str, StreamRecord]) -> None:
    for split in SPLITS:
        before, now = recorded[split].files, _digests(files[split], job.base)
        for path in sorted(before.keys() | now.keys()):
            if before.get(path) != now.get(path):
                what = "is new" if path not in before else "is gone" if path not in now else "has changed"
                raise DataError(
                    f"{job.base / path}: this file {what} since version {name!r} was prepared ({split} text); allowed: "
                    "the same text, new text as a new version, or another folder to prepare everything anew"
                )


def _digests(files: Sequence[Path], base: Path) -> dict[str, str]:
    digests = {}
    for path in (part for source in files for part in _parts(source)):
        with path.open("rb") as file:
            digests[Path(os.path.relpath(path, base)).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _parts(path: Path) -> list[Path]:
    """Return the files that a source consists of: a token file is a pair."""
    if path.suffix != _TOKENS:
        return [path]
    index = path.with_suffix(".idx")
    if not index.is_file():
        raise DataError(f"{index}: no such file; a token file is a pair .bin and .idx")
    return [path, index]


def _encode(job: _Job, stream: str, files: Sequence[Path]) -> StreamRecord:
    """Write one token file."""
    for leftover in job.out.glob(f"{stream}.*.tmp"):  # of a call that was killed
        leftover.unlink()
    tokenizer = Tokenizer(job.tokenizer)
    digests = _digests(files, job.base)
    are_tokens = files[0].suffix == _TOKENS
    sources = _from_tokens(tokenizer, files) if are_tokens else _from_text(job, tokenizer, files)
    documents = tokens = size = 0
    with IndexedWriter(job.out / stream, tokenizer.vocab_size) as writer:
        for ids, text_bytes in sources:
            writer.add_document(ids)
            documents += 1
            tokens += len(ids)
            size += text_bytes
    job.progress(f"{stream}: {size:,} bytes, {documents:,} documents, {tokens:,} tokens")
    return StreamRecord(digests, documents, tokens, size)


def _from_text(job: _Job, tokenizer: Tokenizer, files: Sequence[Path]) -> Iterator[tuple[list[int], int]]:
    """Yield each document's ids, an end-of-sequence token after them, and the bytes of its text."""
    for batch in _batches(read_documents(files, separator=job.separator)):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            yield [*ids, tokenizer.eos_id], len(text.encode("utf-8"))


def _from_tokens(tokenizer: Tokenizer, files: Sequence[Path]) -> Iterator[tuple[npt.NDArray[Any], int]]:
    """Yield each document's ids as they are, and the bytes of the text that they decode to.

    Raises:
        DataError: a file is damaged, holds no token, or one that the tokenizer does not have.
    """
    for path in files:
        source = IndexedTokens(path.with_suffix(""))
        low, high = (source.tokens.min(), source.tokens.max()) if source.tokens.size else (0, -1)
        if not 0 <= low <= high < tokenizer.vocab_size:
            given = f"tokens from {low} to {high}" if source.tokens.size else "no token"
            raise DataError(f"{path}: given {given}; allowed: 0 to {tokenizer.vocab_size - 1}, as the tokenizer has")
        end = 0
        for length in source.document_lengths.tolist():
            ids = source.tokens[end : end + length]
            end += length
            if length:  # Megatron's tools keep documents without a token
                yield ids, len(tokenizer.decode(ids.tolist()).encode("utf-8"))


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Collect documents until a batch holds about a million characters: enough work for all cores."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _open_tokens(out: Path, name: str, split: str, record: StreamRecord) -> npt.NDArray[Any]:
    prefix = out / f"{name}_{split}"
    tokens = IndexedTokens(prefix).tokens
    if tokens.size != record.tokens:
        raise DataError(f"{prefix}.bin: {tokens.size} tokens found, {record.tokens} recorded in {out / 'data.json'}")
    return tokens


def _as_json(streams: dict[str, StreamRecord]) -> dict[str, Any]:
    return {split: asdict(stream) for split, stream in streams.items()}


def _read_record(out: Path) -> DataRecord:
    path = out / "data.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content.pop("format")
        if found != FORMAT:
            raise DataError(f"{path}: format {found!r}; allowed: {FORMAT}")
        content["versions"] = {
            name: {split: StreamRecord(**streams[split]) for split in SPLITS}
            for name, streams in content["versions"].items()
        }
        return DataRecord(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not the record of a prepared folder: {type(error).__name__}: {error}") from error
