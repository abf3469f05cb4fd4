"""Text to tokens to batches: files on disk, and an order of samples that is a pure function of seed and step."""

from pathswitch.data.corpus import expand, read_documents
from pathswitch.data.indexed import IndexedTokens, IndexedWriter
from pathswitch.data.prepare import Prepared, VersionText, load_prepared, prepare
from pathswitch.data.stream import IGNORED_TARGET, SampleStream, Split, StreamConfig, test_windows
from pathswitch.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "IGNORED_TARGET",
    "IndexedTokens",
    "IndexedWriter",
    "Prepared",
    "SampleStream",
    "Split",
    "StreamConfig",
    "Tokenizer",
    "VersionText",
    "expand",
    "load_prepared",
    "prepare",
    "read_documents",
    "test_windows",
    "train_tokenizer",
]
