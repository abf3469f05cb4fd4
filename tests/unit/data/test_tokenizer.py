from __future__ import annotations

import hashlib
import io
import lzma
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pathswitch.data import Tokenizer, train_tokenizer
from pathswitch.errors import ConfigError, DataError

CORPUS = Path(__file__).parents[3] / "launch" / "sotu"
HARD = [
    "",
    " ",
    "  a  b ",
    "\n",
    "a\n\n\nb\r\n",
    "\t\0\x07",
    "▁",
    "▁▁a▁ b▁",
    "\u2585 ⁇ \u2047",
    "<unk></s><s><0x0A>",
    "ﬁ ½ Å e\u0301",
    "\ufeff\ufffe\ufffd\u200b\u2028\U0010ffff",
    "日本語🎲",
]


@pytest.fixture(scope="module")
def documents() -> list[str]:
    with lzma.open(CORPUS / "v1_test.txt.xz", "rt", encoding="utf-8") as file:
        return file.read().split("\n\n\n")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(documents, vocab_size=512, model_path=path)
    return path


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_come_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text(st.characters(codec="utf-8") | st.sampled_from(" \n\t▁<>s/e"), max_size=60))
@settings(max_examples=400, deadline=None)
def test_every_text_comes_back_exactly(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(1 < token < tokenizer.vocab_size for token in ids), "no unknown piece, no end-of-sequence piece"


def test_real_text_is_compressed_and_comes_back(tokenizer: Tokenizer, documents: list[str]) -> None:
    encoded = tokenizer.encode_batch(documents)
    assert [tokenizer.decode(ids) for ids in encoded] == documents
    assert encoded == [tokenizer.encode(text) for text in documents]
    ratio = sum(map(len, encoded)) / sum(len(text.encode()) for text in documents)
    assert ratio < 0.5, "tokens per byte"


def test_ids_are_as_documented(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 512
    assert tokenizer.eos_id == 1
    assert tokenizer.encode("\n") == [2 + 0x0A]


def test_digest_is_the_files(tokenizer: Tokenizer, model: Path) -> None:
    assert tokenizer.digest == hashlib.sha256(model.read_bytes()).hexdigest()


def test_same_text_same_bytes_of_model(tmp_path: Path, model: Path, documents: list[str]) -> None:
    again = tmp_path / "elsewhere" / "other.name"
    again.parent.mkdir()
    train_tokenizer(iter(documents), vocab_size=512, model_path=again)
    assert again.read_bytes() == model.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == ["other.name"]


def test_one_line_of_any_length_is_learned_from(tmp_path: Path, documents: list[str]) -> None:
    # As one line the document is far longer than what SentencePiece takes; a word of 70,000 letters as well.
    text = " ".join(documents).replace("\n", " ") + " " + "zyx" * 24_000
    train_tokenizer([text], vocab_size=512, model_path=tmp_path / "m")
    tokenizer = Tokenizer(tmp_path / "m")
    assert len(tokenizer.encode(" the government")) <= 3
    assert len(tokenizer.encode("zyx" * 100)) < 60


@pytest.mark.parametrize("reserved", ["\n", "\t", "\0", "▁", "\u2585"])
def test_lines_with_reserved_characters_are_learned_from(tmp_path: Path, reserved: str) -> None:
    train_tokenizer([reserved.join(["hello"] * 6)], vocab_size=266, model_path=tmp_path / "m")
    assert len(Tokenizer(tmp_path / "m").encode("hello")) == 1


def test_a_long_line_is_cut_between_words(tmp_path: Path) -> None:
    line = " x" * 499 + " unusual"  # SentencePiece gets 1,000 characters at most: the border lies in the last word
    train_tokenizer([line] * 5, vocab_size=273, model_path=tmp_path / "m")
    assert len(Tokenizer(tmp_path / "m").encode(" unusual")) == 1


def test_training_is_quiet(tmp_path: Path, documents: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(documents, vocab_size=400, model_path=tmp_path / "m")
    assert capfd.readouterr() == ("", "")


def test_vocab_size_below_the_minimum_names_the_minimum(tmp_path: Path, documents: list[str]) -> None:
    path = tmp_path / "m"
    for size in (-1, 0, 2, 100, 300):
        with pytest.raises(ConfigError, match="tokenizer vocab_size") as caught:
            train_tokenizer(documents, vocab_size=size, model_path=path)
        assert f"given {size}" in str(caught.value)
    least = int(caught.value.allowed.split()[2])
    with pytest.raises(ConfigError):
        train_tokenizer(documents, vocab_size=least - 1, model_path=path)
    assert not path.exists()
    train_tokenizer(documents, vocab_size=least, model_path=path)
    assert Tokenizer(path).vocab_size == least


def test_vocab_size_out_of_reach_names_the_most(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer vocab_size: given 9000; allowed: at most ") as caught:
        train_tokenizer(["abc abd"], vocab_size=9000, model_path=tmp_path / "m")
    most = int(caught.value.allowed.split()[2])
    train_tokenizer(["abc abd"], vocab_size=most, model_path=tmp_path / "m")


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    for documents in ([], ["", "\n\n"]):
        with pytest.raises(DataError, match="no text to train on"):
            train_tokenizer(documents, vocab_size=300, model_path=tmp_path / "m")


def test_a_file_that_is_no_model_is_refused(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "m"
    for content in (b"", b"no model", model.read_bytes()[:-3]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=str(path)):
            Tokenizer(path)
    with pytest.raises(DataError, match="missing"):
        Tokenizer(tmp_path / "missing")


def test_a_model_without_end_of_sequence_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some text to learn"]), model_writer=model, vocab_size=14, eos_id=-1, minloglevel=2
    )
    (tmp_path / "m").write_bytes(model.getvalue())
    with pytest.raises(DataError, match="end-of-sequence"):
        Tokenizer(tmp_path / "m")
