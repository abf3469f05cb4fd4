"""What manifests keep of Megatron's arguments: those that the samples of every step and the vocabulary follow from."""

from __future__ import annotations

from os.path import basename
from typing import Any

# Our state in that of Megatron's scheduler: path_state in JSON.
STATE_KEY = "pathswitch"
# What the order of the samples follows from; it may change only where a version's data ends.
DATA = (
    "data_path",
    "train_data_path",
    "data_args_path",
    "per_split_data_args_path",
    "mock_data",
    "split",
    "seed",
    "seq_length",
    "train_iters",
    "train_samples",
    "phase_transition_iterations",
    "dataloader_type",
    "reset_position_ids",
    "reset_attention_mask",
    "eod_mask_loss",
)
BATCHES = ("global_batch_size", "rampup_batch_size", "step_batch_size_schedule")
VOCABULARY = ("tokenizer_type", "tokenizer_model", "vocab_file", "merge_file", "vocab_size", "padded_vocab_size")
# The same file in another folder is the same data.
FILES = {"data_path", "train_data_path", "data_args_path", "per_split_data_args_path"}
FILES |= {"tokenizer_model", "vocab_file", "merge_file"}


def data_settings(args: Any) -> dict[str, Any]:
    """Return the arguments that the samples of every step and the vocabulary follow from, as JSON values."""
    settings = {}
    for name in (*DATA, *BATCHES, *VOCABULARY):
        value = getattr(args, name, None)
        if value is not None and value is not False:
            settings[name] = _file_names(value) if name in FILES else _plain(value)
    return settings


def _plain(value: Any) -> Any:
    """Return a value as it comes back from JSON."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str) else str(value)


def _file_names(value: Any) -> Any:
    return [_file_names(item) for item in value] if isinstance(value, list | tuple) else basename(str(value))
