"""SentencePiece byte-pair encoding that gives every text back exactly."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from pathswitch.atomic import write_bytes_atomic
from pathswitch.errors import ConfigError, DataError

# SentencePiece writes a space as this character, and would read it back as a space.
_SPACE_MARK = "\u2581"
# Lines, and the characters that SentencePiece keeps for itself: it drops a training sentence that holds one.
_CUTS = re.compile("[\n\t\0\u2581\u2585]+")
# In characters; SentencePiece drops a training sentence of more than 4,192 bytes without an error.
_MAX_SENTENCE = 1000


def train_tokenizer(documents: Iterable[str], *, vocab_size: int, model_path: Path) -> None:
    """Train a lossless byte-pair model of exactly ``vocab_size`` pieces and write it to ``model_path`` atomically.

    Ids: 0 ``<unk>`` (never produced: unknown characters become bytes), 1 ``</s>`` (eos), 2 to 257 the bytes, then
    the learned pieces; there is no bos and no pad. No normalisation; a line feed is always one byte piece. The same
    documents give the same bytes of model. SentencePiece holds all the text in memory while it trains.

    Raises:
        ConfigError: the text has more characters, or fewer possible pieces, than ``vocab_size`` allows.
        DataError: there is no text to train on.
    """
    sentences = _sentences(documents)
    first = next(sentences, None)
    if first is None:
        raise DataError("tokenizer: given no text to train on; allowed: documents with at least one letter")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _refused(vocab_size, str(error)) from error
    write_bytes_atomic(model_path, model.getvalue())


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    """Cut documents into what SentencePiece accepts as a sentence, at spaces where it can."""
    for document in documents:
        for line in _CUTS.split(document):
            start = 0
            while len(line) - start > _MAX_SENTENCE:
                space = line.rfind(" ", start + 1, start + _MAX_SENTENCE)
                end = space if space > 0 else start + _MAX_SENTENCE
                yield line[start:end]
                start = end
            if start < len(line):
                yield line[start:]


def _refused(vocab_size: int, message: str) -> ConfigError:
    """Turn SentencePiece's message into ours, with the bound that it reports."""
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        allowed = f"at least {too_small[1]} for this text (256 bytes, 2 special pieces, its frequent characters)"
    elif too_large := re.search(r"set it to a value <= (\d+)", message):
        allowed = f"at most {too_large[1]} for this text (it has no more pieces to learn)"
    else:
        allowed = f"a size that SentencePiece accepts; it reports: {message.strip()}"
    return ConfigError("tokenizer vocab_size", given=vocab_size, allowed=allowed)


class Tokenizer:
    """A SentencePiece model file: text to token ids and back."""

    def __init__(self, model_path: Path) -> None:
        """Load the model.

        Raises:
            DataError: the file cannot be read, is not a SentencePiece model, or has no end-of-sequence piece.
        """
        try:
            model = model_path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(model)  # its constructor takes no model at all for an empty one
        except (OSError, RuntimeError) as error:
            raise DataError(f"{model_path}: cannot be loaded as a SentencePiece model: {error}") from error
        self.digest: str = hashlib.sha256(model).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        if self.eos_id < 0:
            raise DataError(f"{model_path}: has no end-of-sequence piece; allowed: a model trained with eos_id >= 0")
        self._space_mark_ids = self._byte_ids(_SPACE_MARK)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, without an end-of-sequence id."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text, encoded on all cores."""
        encoded: list[list[int]] = self._processor.encode(list(texts))
        for index, text in enumerate(texts):
            if _SPACE_MARK in text:
                encoded[index] = self._encode_space_marks(text)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the token ids; bytes that are no whole character become U+FFFD."""
        text: str = self._processor.decode(list(ids))
        return text

    def _byte_ids(self, text: str) -> list[int]:
        """Return the byte pieces of ``text``, or what the model makes of it when it has no byte pieces."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode("utf-8")]
        return ids if all(map(self._processor.is_byte, ids)) else list(self._processor.encode(text))

    def _encode_space_marks(self, text: str) -> list[int]:
        head, *tail = self._processor.encode(text.split(_SPACE_MARK))
        return list(head) + [token for part in tail for token in (*self._space_mark_ids, *part)]
