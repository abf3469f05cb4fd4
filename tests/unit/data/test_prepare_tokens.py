"""Token files of Megatron's tools in place of text: their tokens as they are, with the tokenizer that made them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pathswitch.data import (
    Prepared,
    SampleStream,
    StreamConfig,
    Tokenizer,
    VersionText,
    load_prepared,
    prepare,
    train_tokenizer,
)
from pathswitch.errors import ConfigError, DataError

TEXTS = [f"We have {number} reasons, and {number * number} more: “peace” is one. " * 3 for number in range(12)]
VOCAB_SIZE = 300

pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass
class Site:
    """A folder with a tokenizer, and token files that Megatron's builder has made with it."""

    folder: Path
    tokenizer: Tokenizer

    def build(self, name: str, texts: Sequence[str], dtype: Any = np.uint16) -> list[list[int]]:
        """Write documents of two sequences each with Megatron's own builder; every third has no token."""
        indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
        torch = pytest.importorskip("torch")
        builder = indexed.IndexedDatasetBuilder(str(self.folder / f"{name}.bin"), dtype=dtype)
        documents = []
        for number, text in enumerate(texts):
            ids = self.tokenizer.encode(text)
            documents.append(ids)
            builder.add_document(torch.tensor(ids), [5, len(ids) - 5])
            if number % 3 == 0:
                builder.add_document(torch.tensor([], dtype=torch.int64), [0])
        builder.finalize(str(self.folder / f"{name}.idx"))
        return documents

    def prepare(
        self, *versions: VersionText, tokenizer: str | None = "t.model", vocab_size: int = VOCAB_SIZE
    ) -> Prepared:
        return prepare(
            versions,
            base=self.folder,
            out=self.folder / "run" / "data",
            vocab_size=vocab_size,
            tokenizer_model=self.folder / tokenizer if tokenizer else None,
            separator=None,
            progress=lambda message: None,
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    train_tokenizer(TEXTS, vocab_size=VOCAB_SIZE, model_path=tmp_path / "t.model")
    return Site(tmp_path, Tokenizer(tmp_path / "t.model"))


V1 = VersionText("v1", ("train_*.bin",), ("test.bin",))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatrons_tokens_arrive_as_they_are(site: Site, dtype: Any) -> None:
    train = site.build("train_1.0_a", TEXTS[:6], dtype) + site.build("train_b", TEXTS[6:10], dtype)
    test = site.build("test", TEXTS[10:], dtype)
    prepared = site.prepare(V1)
    assert prepared.train_tokens("v1").tolist() == [token for ids in train for token in ids]
    assert prepared.test_tokens("v1").tolist() == [token for ids in test for token in ids]
    assert prepared.test_bytes("v1") == sum(len(text.encode()) for text in TEXTS[10:])
    assert prepared.train_tokens("v1").dtype == np.uint16
    assert (prepared.tokenizer.vocab_size, prepared.tokenizer.digest) == (VOCAB_SIZE, site.tokenizer.digest)


def test_they_train_as_text_does(site: Site) -> None:
    site.build("train_a", TEXTS)
    site.build("test", TEXTS[:2])
    site.prepare(V1)
    prepared = load_prepared(site.folder / "run" / "data")
    config = StreamConfig(seed=1, seq_len=16, batch_size=4)
    batch = SampleStream([prepared.train_tokens("v1")], [5], ["v1"], config).batch(3)
    text = prepared.tokenizer.decode(prepared.train_tokens("v1").tolist())
    assert batch.shape == (4, 17) and text == "".join(TEXTS)
    assert all(prepared.tokenizer.decode(sample.tolist()).strip("�") in text for sample in batch)


def test_the_files_are_read_once_and_must_not_change(site: Site) -> None:
    site.build("train_a", TEXTS)
    site.build("test", TEXTS[:2])
    digest = site.prepare(V1).version_digest("v1")
    before = (site.folder / "run" / "data" / "v1_train.bin").stat().st_mtime_ns
    assert site.prepare(V1).version_digest("v1") == digest
    assert (site.folder / "run" / "data" / "v1_train.bin").stat().st_mtime_ns == before
    index = site.folder / "test.idx"
    index.write_bytes(index.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=r"test\.idx: this file has changed since version 'v1'"):
        site.prepare(V1)
    index.unlink()
    with pytest.raises(DataError, match=r"test\.idx: no such file; a token file is a pair"):
        site.prepare(V1)


def test_text_beside_token_files_is_refused(site: Site) -> None:
    site.build("train_a", TEXTS)
    site.build("test", TEXTS[:2])
    (site.folder / "test.txt").write_text(TEXTS[0])
    of_text = VersionText("v2", ("test.txt",), ("test.txt",))
    for versions in ([V1, of_text], [of_text, V1], [VersionText("v1", ("train_a.bin",), ("test.txt",))]):
        with pytest.raises(ConfigError, match=r"given 'train_a\.bin and test\.txt'; allowed: either text or token"):
            site.prepare(*versions)
    assert not (site.folder / "run").exists()


def test_token_files_need_the_tokenizer_that_made_them(site: Site) -> None:
    site.build("train_a", TEXTS)
    site.build("test", TEXTS[:2])
    with pytest.raises(ConfigError, match=r"\[data\] tokenizer: given 'nothing'; allowed: the SentencePiece model"):
        site.prepare(V1, tokenizer=None)
    train_tokenizer(TEXTS, vocab_size=VOCAB_SIZE - 10, model_path=site.folder / "smaller.model")
    with pytest.raises(
        DataError, match=rf"train_a\.bin: given tokens from \d+ to 299; allowed: 0 to {VOCAB_SIZE - 11}"
    ):
        site.prepare(V1, tokenizer="smaller.model", vocab_size=VOCAB_SIZE - 10)
    assert not (site.folder / "run" / "data" / "data.json").exists()


def test_a_token_file_without_a_token_is_refused(site: Site) -> None:
    site.build("train_a", TEXTS)
    site.build("test", [])
    with pytest.raises(DataError, match=r"test\.bin: given no token; allowed: 0 to 299"):
        site.prepare(V1)
