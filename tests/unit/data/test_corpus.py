from __future__ import annotations

import gzip
import json
import lzma
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from pathswitch.data import corpus, expand, read_documents
from pathswitch.errors import ConfigError, DataError

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
TEXTS = ["First, with  two spaces.\r\n", "ein Würfel\n\nzwei 🎲", "  \u2028last"]


def read(path: Path, separator: str | None = None) -> list[str]:
    return list(read_documents([path], separator=separator))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def as_jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": 1, "text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


@pytest.fixture(params=[1, 2, 3, 7, 1 << 20])
def chunk_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # zstd takes an eighth of a chunk from the file at a time, at least one byte.
    monkeypatch.setattr(corpus, "CHUNK_BYTES", request.param if request.param > 7 else 8 * request.param)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.usefixtures("chunk_bytes")
def test_every_format_gives_the_same_documents(tmp_path: Path, compression: str) -> None:
    compress = COMPRESS[compression]
    jsonl = write(tmp_path / f"a.jsonl{compression}", compress(as_jsonl(TEXTS)))
    txt = write(tmp_path / f"a.txt{compression}", compress("\n\n\n".join(TEXTS).encode()))
    assert read(jsonl) == TEXTS
    assert read(txt, separator="\n\n\n") == "\n\n\n".join(TEXTS).split("\n\n\n")
    assert read(txt) == ["\n\n\n".join(TEXTS)]


@pytest.mark.usefixtures("chunk_bytes")
def test_separator_is_cut_from_the_left_also_where_chunks_meet(tmp_path: Path) -> None:
    text = "\n\n\n\na\n\n\n\nb\n\n\n\n\n\n  \n\n\nc\n\n\n"
    path = write(tmp_path / "a.txt", text.encode())
    assert read(path, separator="\n\n\n") == ["\na", "\nb", "c"]


def test_several_compressed_frames_are_all_read(tmp_path: Path) -> None:
    for compression, compress in list(COMPRESS.items())[1:]:
        path = write(tmp_path / f"a.txt{compression}", compress(b"one ") + compress(b"two"))
        assert read(path) == ["one two"], compression


@pytest.mark.parametrize("compression", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "cut to the header", "not compressed"])
def test_damaged_compression_is_refused(tmp_path: Path, compression: str, damage: str) -> None:
    whole = COMPRESS[compression](b"".join(b"line %d of the text\n" % i for i in range(100_000)))
    data = {"cut": whole[: len(whole) // 2], "cut to the header": whole[:6], "not compressed": b"plain text" * 9}[
        damage
    ]
    path = write(tmp_path / f"a.txt{compression}", data)
    with pytest.raises(DataError, match=re.escape(f"{path}: damaged {compression} file")):
        read(path)


@pytest.mark.usefixtures("chunk_bytes")
@pytest.mark.parametrize("separator", [None, "\n\n\n"])
def test_invalid_utf8_names_file_and_byte_offset(tmp_path: Path, separator: str | None) -> None:
    good = "ä🎲\n\n\nü".encode()
    for tail in (b"\xff abc", b"\xf0\x9f\x8e", b"\xf0\x9f\x8eabc"):
        path = write(tmp_path / "a.txt", good + tail)
        with pytest.raises(DataError, match=re.escape(f"{path}: byte offset {len(good)} is not UTF-8")):
            read(path, separator)
    path = write(tmp_path / "a.jsonl", as_jsonl(["ä"]) + b'{"text": "\xff"}')
    with pytest.raises(DataError, match=re.escape(f"{path}: byte offset {len(as_jsonl(['ä'])) + 10} is not UTF-8")):
        read(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{oops", "not JSON"),
        (b"", "not JSON"),
        (b'{"body": "x"}', "no string \"text\" (given: 'body')"),
        (b'{"text": 3}', 'no string "text"'),
        (b'["text"]', 'no string "text" (given: list)'),
        (b'{"text": "\\ud83c"}', "the text holds half of a surrogate pair"),
    ],
)
def test_bad_json_line_names_file_and_line(tmp_path: Path, line: bytes, says: str) -> None:
    path = write(tmp_path / "a.jsonl", as_jsonl(["one", "two"]) + line + b"\n" + as_jsonl(["four"]))
    with pytest.raises(DataError, match=re.escape(f"{path}:3: {says}")) as caught:
        read(path)
    assert "allowed:" in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.xz", "a.txt.zst"])
def test_a_file_without_a_document_is_refused(tmp_path: Path, name: str) -> None:
    blank = as_jsonl(["", " \n"]) if "jsonl" in name else b" \n\n\n\n"
    good = write(tmp_path / "good.txt", b"text")
    for content in (b"", blank):
        path = write(tmp_path / name, COMPRESS.get(Path(name).suffix, bytes)(content))
        with pytest.raises(DataError, match=re.escape(f"{path}: holds no document")):
            list(read_documents([good, path], separator="\n\n\n"))


@pytest.mark.parametrize("name", ["a.csv", "a.gz", "a", "a.txt.bz2", "a.csv.zst", "a.TXT"])
def test_other_endings_are_refused_with_the_allowed_ones(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"text")
    with pytest.raises(ConfigError, match=re.escape(name)) as caught:
        read(path)
    assert all(ending in str(caught.value) for ending in (".txt", ".jsonl", ".gz", ".xz", ".zst"))


def test_an_empty_separator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="separator"):
        read(write(tmp_path / "a.txt", b"text"), separator="")


def test_documents_arrive_before_the_file_is_read_to_its_end(tmp_path: Path) -> None:
    damaged_later = as_jsonl(["x" * 1000] * 5000) + b"not json\n"
    documents = read_documents([write(tmp_path / "a.jsonl", damaged_later)], separator=None)
    assert next(documents) == "x" * 1000
    with pytest.raises(DataError, match=r"a\.jsonl:5001"):
        list(documents)


def test_expand_is_sorted_and_names_each_file_once(tmp_path: Path) -> None:
    base = tmp_path / "plan[1]"  # a folder whose name is itself a glob
    (base / "sub").mkdir(parents=True)
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        write(base / name, b"x")
    assert expand(["*.txt", "b.*"], base) == [base / "a.txt", base / "b.txt"]
    assert expand(["**/*.txt"], base) == [base / "a.txt", base / "b.txt", base / "sub/c.txt"]
    assert expand([str(tmp_path / "plan?1?" / "a.txt")], base) == [base / "a.txt"]


def test_expand_names_the_pattern_without_a_file_and_the_folder(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"x")
    (tmp_path / "folder.txt.d").mkdir()
    for pattern in ("*.jsonl", "folder*"):
        with pytest.raises(ConfigError, match=re.escape(repr(pattern))) as caught:
            expand(["a.txt", pattern], tmp_path)
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(ConfigError, match="at least one pattern"):
        expand([], tmp_path)
