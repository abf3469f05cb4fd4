from __future__ import annotations

import os
import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pathswitch.data import IndexedTokens, IndexedWriter
from pathswitch.errors import ConfigError, DataError

DOCUMENTS = [[5, 6, 7], [1], list(range(300)), [499, 0]]


def write(prefix: Path, documents: Sequence[Sequence[int]] = DOCUMENTS, vocab_size: int = 500) -> Path:
    with IndexedWriter(prefix, vocab_size) as writer:
        for document in documents:
            writer.add_document(document)
    return prefix


@pytest.fixture(scope="module")
def megatron() -> Any:
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocab_size", [500, 65_499, 65_500, 200_000])
def test_megatron_reads_what_we_write(tmp_path: Path, megatron: Any, vocab_size: int) -> None:
    documents = [*DOCUMENTS, [vocab_size - 1]]
    prefix = write(tmp_path / "v1.0_train", documents, vocab_size)
    assert megatron.IndexedDataset.exists(str(prefix))
    dataset = megatron.IndexedDataset(str(prefix))
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.index.dtype == megatron.DType.optimal_dtype(vocab_size)
    assert dataset.document_indices.tolist() == list(range(len(documents) + 1))


@pytest.mark.filterwarnings("ignore")
def test_the_files_are_megatrons_byte_for_byte(tmp_path: Path, megatron: Any) -> None:
    ours = write(tmp_path / "ours")
    theirs = build_with_megatron(megatron, tmp_path / "theirs", [[document] for document in DOCUMENTS], np.uint16)
    for ending in (".bin", ".idx"):
        assert Path(f"{ours}{ending}").read_bytes() == Path(f"{theirs}{ending}").read_bytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_what_megatron_writes(tmp_path: Path, megatron: Any, dtype: type[np.number[Any]]) -> None:
    documents = [[[1, 2], [3]], [[4, 5, 6]], [[7], [8], [9, 10]]]  # of several sequences each
    read = IndexedTokens(build_with_megatron(megatron, tmp_path / "theirs", documents, dtype))
    assert read.tokens.tolist() == list(range(1, 11))
    assert read.document_lengths.tolist() == [3, 3, 4]
    assert read.tokens.dtype == dtype


def build_with_megatron(megatron: Any, prefix: Path, documents: list[list[list[int]]], dtype: Any) -> Path:
    import torch

    builder = megatron.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        flat = [token for sequence in sequences for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in sequences])
    builder.finalize(f"{prefix}.idx")
    return prefix


@pytest.mark.parametrize(("vocab_size", "dtype"), [(500, np.uint16), (65_499, np.uint16), (65_500, np.int32)])
def test_what_is_written_is_read(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    read = IndexedTokens(write(tmp_path / "a", DOCUMENTS, vocab_size))
    assert read.tokens.tolist() == [token for document in DOCUMENTS for token in document]
    assert read.document_lengths.tolist() == [3, 1, 300, 2]
    assert read.tokens.dtype == dtype
    assert not read.tokens.flags.writeable
    assert not read.tokens.flags.owndata, "a view of the map, not a copy"


def test_no_document_is_a_file_too(tmp_path: Path) -> None:
    read = IndexedTokens(write(tmp_path / "a", []))
    assert read.tokens.size == 0
    assert read.document_lengths.size == 0


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 500], "given token 500; allowed: 0 to 499"),
        ([3, -1], "given token -1"),
        ([], "at least one integer"),
        ([1.5], "given float64"),
        ([[1, 2]], r"shape (1, 2)"),
    ],
)
def test_bad_tokens_are_refused_and_leave_nothing(tmp_path: Path, tokens: Any, says: str) -> None:
    with pytest.raises(DataError, match=re.escape(says)) as caught, IndexedWriter(tmp_path / "a", 500) as writer:
        writer.add_document([1])
        writer.add_document(tokens)
    assert "document 1:" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_bad_vocab_size_is_refused(tmp_path: Path) -> None:
    for size in (0, -5, 2**31 + 1):
        with pytest.raises(ConfigError, match=f"vocab_size: given {size}"):
            IndexedWriter(tmp_path / "a", size)


def test_an_unfinished_writer_shows_no_file_under_the_final_names(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", 500) as writer:
        writer.add_document([1, 2])
        assert all(name.endswith(".tmp") for name in os.listdir(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


def test_new_tokens_never_stand_beside_an_old_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefix = write(tmp_path / "a", [[1, 2]])
    replace = os.replace

    def replace_bin_then_die(source: Path, target: Path) -> None:
        if target.suffix == ".idx":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_bin_then_die)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [[3, 4]])
    assert os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(DataError, match=r"a\.idx: no such file"):
        IndexedTokens(prefix)


@pytest.mark.parametrize("ending", [".bin", ".idx"])
@pytest.mark.parametrize("change", [-1, 1, -2, 8])
def test_a_file_of_the_wrong_size_names_both_sizes(tmp_path: Path, ending: str, change: int) -> None:
    path = Path(f"{write(tmp_path / 'a')}{ending}")
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    says = f"{path}: {len(data) + change} bytes found, {len(data)} expected"
    with pytest.raises(DataError, match=re.escape(says)):
        IndexedTokens(tmp_path / "a")


def overwritten(path: Path, offset: int, new: bytes) -> None:
    data: npt.NDArray[np.uint8] = np.frombuffer(path.read_bytes(), np.uint8).copy()
    data[offset : offset + len(new)] = np.frombuffer(new, np.uint8)
    path.write_bytes(data.tobytes())


@pytest.mark.parametrize(
    ("offset", "new", "says"),
    [
        (0, b"PK", "Megatron's indexed format"),
        (9, struct.pack("<Q", 2), "format version 2; allowed: 1"),
        (17, b"\x07", r"dtype code 7; allowed: 4 (int32), 5 (int64), 8 (uint16)"),
        (18, struct.pack("<Q", 5), "bytes found"),
        (34 + 16, struct.pack("<q", 2), "without gaps"),
        (34 + 48 + 32, struct.pack("<q", 3), "document bounds"),
        (34 + 48 + 8, struct.pack("<q", 4), "document bounds"),
    ],
)
def test_an_index_that_is_wrong_is_refused(tmp_path: Path, offset: int, new: bytes, says: str) -> None:
    overwritten(tmp_path / "a.idx" if write(tmp_path / "a") else Path(), offset, new)
    with pytest.raises(DataError, match=re.escape(says)) as caught:
        IndexedTokens(tmp_path / "a")
    assert str(tmp_path / "a.idx") in str(caught.value)


def test_a_short_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0")
    with pytest.raises(DataError, match="9 bytes found, at least 34 expected"):
        IndexedTokens(tmp_path / "a")
