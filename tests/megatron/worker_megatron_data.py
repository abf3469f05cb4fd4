"""Build the training data of Megatron jobs with Megatron core's own classes, and write down what each step sees.

worker_megatron_data.py REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import get_blend_from_list


class Vocabulary:
    """What a GPTDataset asks of a tokenizer."""

    def __init__(self, size: int) -> None:
        self.unique_identifiers = {"class": "Vocabulary"}
        self.vocab_size, self.eod, self.pad = size, 1, size - 1


def dataset(blend: list[str], samples: int, seq_len: int, vocab_size: int) -> Any:
    """Return Megatron's training data of ``samples`` samples, laid out anew."""
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=seq_len,
        blend=get_blend_from_list(blend),
        split="100,0,0",
        path_to_cache=tempfile.mkdtemp(),
        tokenizer=Vocabulary(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.005,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]


def windows(blend: list[str], samples: int, seq_len: int, vocab_size: int, first: int, count: int) -> list[list[int]]:
    """Return ``count`` samples from number ``first`` on: the input tokens and the last label of each."""
    data = dataset(blend, samples, seq_len, vocab_size)
    found = []
    for number in range(first, first + count):
        tokens, labels = data[number]["tokens"], data[number]["labels"]
        assert torch.equal(tokens[1:], labels[:-1])
        found.append([*tokens.tolist(), int(labels[-1])])
    return found


def main() -> None:
    """Answer the requests: keyword arguments of ``windows``, by name."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    requests = json.loads(Path(sys.argv[1]).read_text())
    answers = {name: windows(**request) for name, request in requests.items()}
    Path(sys.argv[2]).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
