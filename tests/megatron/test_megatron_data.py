"""Megatron's own classes on the data of a plan: a branch sees the main path's samples, and our token files train."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import core_ranks
import numpy as np
import pytest

from pathswitch.config import load_plan_file
from pathswitch.data import IndexedTokens, IndexedWriter, VersionText, prepare
from pathswitch.launch.megatron import megatron_job

SEQ_LEN, BATCH_SIZE, VOCAB_SIZE = 16, 4, 300
# A version's file holds about 47 samples, so each version of 100 samples goes round more than once.
STEPS = {"v1": 10, "v2": 25, "v3": 25}
PLAN = """
[schedule]
max_lr = 1e-3
alpha = 0.4
[[versions]]
name = "v1"
steps = 10
megatron_data = "v1"
[[versions]]
name = "v2"
steps = 25
megatron_data = ["0.7", "v2", "0.3", "v1"]
[[versions]]
name = "v3"
steps = 25
megatron_data = "v3"
[megatron]
global_batch_size = 4
"""
ONE_DATASET = PLAN.replace("megatron_data", "#") + 'data = ["1", "v1", "2", "v2"]\nhorizon_steps = 70\n'
# Token ids of a file begin here: what a sample holds tells where it comes from.
FIRST_ID = {"v1": 2, "v2": 100, "v3": 200}

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Layout:
    """What Megatron asks its datasets for in a job that stands at a step."""

    blend: list[str]
    samples: int
    first: int
    """The sample that the step begins with."""

    def request(self, count: int) -> dict[str, Any]:
        """Return the worker's request of ``count`` samples."""
        sizes = {"seq_len": SEQ_LEN, "vocab_size": VOCAB_SIZE}
        return {"blend": self.blend, "samples": self.samples, "first": self.first, "count": count, **sizes}


def layout(arguments: Sequence[str], step: int) -> Layout:
    """Read a job's arguments as Megatron does.

    Megatron lays out the samples from the last phase transition to the next one, or to the end of all samples.
    """
    options: dict[str, list[str]] = {}
    for argument in arguments:
        if argument.startswith("--"):
            options[argument] = values = []
        else:
            values.append(argument)
    batch_size = int(options["--global-batch-size"][0])
    if "--train-samples" in options:
        total_steps = int(options["--train-samples"][0]) // batch_size
    else:
        total_steps = int(options["--train-iters"][0])
    inner = [int(i) for text in options.get("--phase-transition-iterations", []) for i in text.split(",")]
    begin = max(transition for transition in (0, *inner) if transition <= step)
    end = min(transition for transition in (*inner, total_steps) if transition > step)
    return Layout(options["--data-path"], (end - begin) * batch_size, (step - begin) * batch_size)


@dataclass(frozen=True)
class Plans:
    """A folder with a plan and its data files, for the jobs of which the worker has read samples."""

    folder: Path

    def layout(self, text: str, path: str, version: str | None, step: int) -> Layout:
        """Return what a job of the plan asks for when it stands at a step."""
        plan = self.folder / "plan.toml"
        plan.write_text(text)
        return layout(megatron_job(plan, load_plan_file(plan), path, version).arguments, step)


def write_documents(prefix: Path, first_id: int, seed: int) -> list[list[int]]:
    """Write a token file with our writer: documents that end in 1, Megatron's end of document."""
    random = np.random.default_rng(seed)
    documents = [[*random.integers(first_id, first_id + 98, random.integers(5, 60)).tolist(), 1] for _ in range(24)]
    with IndexedWriter(prefix, VOCAB_SIZE) as writer:
        for document in documents:
            writer.add_document(document)
    return documents


def read_by_megatron(folder: Path, requests: dict[str, Any]) -> dict[str, list[list[int]]]:
    (folder / "requests.json").write_text(json.dumps(requests))
    files = (str(folder / "requests.json"), str(folder / "answers.json"))
    done = core_ranks.run("worker_megatron_data.py", *files, folder=folder, extra={"TMPDIR": str(folder)})
    assert done.returncode == 0, done.output[-3000:]
    answers: dict[str, list[list[int]]] = json.loads((folder / "answers.json").read_text())
    return answers


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Plans:
    pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="pip install megatron-core")
    folder = tmp_path_factory.mktemp("plans")
    for seed, (name, first_id) in enumerate(FIRST_ID.items()):
        write_documents(folder / name, first_id, seed)
    return Plans(folder)


@pytest.fixture(scope="module")
def samples(plans: Plans) -> dict[str, list[list[int]]]:
    """The samples that jobs see: from the beginning, from the fork, and in jobs that ask for others."""
    requests: dict[str, Any] = {}
    for version, first_step, fork_step, end_step in (("v1", 0, 6, 10), ("v2", 10, 25, 35), ("v3", 35, 50, 60)):
        count = (end_step - fork_step) * BATCH_SIZE
        main = plans.layout(PLAN, "main", version, first_step)
        requests[f"main {version}"] = main.request((end_step - first_step) * BATCH_SIZE)
        requests[f"branch {version}"] = plans.layout(PLAN, version, None, fork_step).request(count)
        alone = plans.layout(ONE_DATASET, version, None, fork_step)
        requests[f"one dataset {version}"] = alone.request(count)
    requests["one dataset main"] = plans.layout(ONE_DATASET, "main", "v2", 0).request(35 * BATCH_SIZE)
    # What a job would see that asked for another number of samples, enough to need one epoch more.
    longer = plans.layout(PLAN.replace("steps = 25", "steps = 45", 1), "main", "v2", 10)
    requests["longer v2"] = longer.request(25 * BATCH_SIZE)
    requests["longer horizon"] = plans.layout(ONE_DATASET.replace("70", "200"), "main", "v2", 0).request(140)
    return read_by_megatron(plans.folder, requests)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_a_branch_sees_exactly_the_main_paths_samples(samples: dict[str, list[list[int]]], version: str) -> None:
    main, branch = samples[f"main {version}"], samples[f"branch {version}"]
    assert len(main) == STEPS[version] * BATCH_SIZE and len(branch) == round(0.4 * STEPS[version]) * BATCH_SIZE
    assert branch == main[-len(branch) :]
    assert branch != main[: len(branch)]


def test_a_version_begins_with_its_first_sample(plans: Plans) -> None:
    for version, first_step in (("v1", 0), ("v2", 10), ("v3", 35)):
        begun = plans.layout(PLAN, "main", version, first_step)
        assert (begun.samples, begun.first) == (STEPS[version] * BATCH_SIZE, 0)


def test_a_version_sees_its_own_data_more_than_once(samples: dict[str, list[list[int]]]) -> None:
    def sources(sample: list[int]) -> set[str]:
        return {max(name for name, first in FIRST_ID.items() if first <= token) for token in sample if token > 1}

    assert all(sources(sample) == {"v1"} for sample in samples["main v1"])
    assert all(sources(sample) == {"v3"} for sample in samples["main v3"])
    of_v2 = [sources(sample) for sample in samples["main v2"]]
    assert {"v2"} in of_v2 and {"v1"} in of_v2 and 0.6 < of_v2.count({"v2"}) / len(of_v2) < 0.8
    assert len({tuple(sample) for sample in samples["main v3"]}) < len(samples["main v3"])


def test_one_dataset_gives_every_job_the_same_order(samples: dict[str, list[list[int]]]) -> None:
    main = samples["one dataset main"]
    assert samples["one dataset v1"] == main[6 * BATCH_SIZE : 10 * BATCH_SIZE]
    assert samples["one dataset v2"] == main[25 * BATCH_SIZE : 35 * BATCH_SIZE]


def test_a_job_that_asks_for_more_samples_sees_another_order(samples: dict[str, list[list[int]]]) -> None:
    """The control: this is what the printed arguments are for, and what a resumed job is refused for."""
    for asked, longer in (("main v2", "longer v2"), ("one dataset main", "longer horizon")):
        alike = sum(a == b for a, b in zip(samples[asked], samples[longer], strict=True))
        assert alike < 0.1 * len(samples[asked])


def in_pieces(sample: list[int], documents: Sequence[Sequence[int]]) -> bool:
    """Whether a sample is the end of a document, whole documents, and the beginning of one, by their last tokens."""
    cuts = [0, *(place + 1 for place, token in enumerate(sample) if token == 1), len(sample)]
    first, *rest = (sample[a:b] for a, b in pairwise(cuts) if a < b)
    if rest and rest[-1][-1] != 1:
        last = rest.pop()
        if not any(list(document[: len(last)]) == last for document in documents):
            return False
    inside = any(
        list(document[start : start + len(first)]) == first for document in documents for start in range(len(document))
    )
    return inside and all(whole in documents for whole in rest)


def documents_of(prefix: Path) -> list[list[int]]:
    read = IndexedTokens(prefix)
    ends = np.cumsum(read.document_lengths)
    return [read.tokens[end - length : end].tolist() for end, length in zip(ends, read.document_lengths, strict=True)]


def test_our_token_files_and_a_runs_prepared_data_train_under_megatron(tmp_path: Path, plans: Plans) -> None:
    """What we write in Megatron's format is read by its GPTDataset, document by document."""
    text = "Fellow citizens of the Senate. " * 6
    (tmp_path / "text.txt").write_text("\n\n\n".join(text[: 40 + 7 * number] for number in range(20)))
    prepare(
        [VersionText("v1", ("text.txt",), ("text.txt",))],
        base=tmp_path,
        out=tmp_path / "data",
        vocab_size=VOCAB_SIZE - 25,
        tokenizer_model=None,
        separator="\n\n\n",
        progress=lambda message: None,
    )
    prefixes = {"written": plans.folder / "v3", "prepared": tmp_path / "data" / "v1_train"}
    count = {name: (IndexedTokens(prefix).tokens.size - 1) // SEQ_LEN for name, prefix in prefixes.items()}
    answers = read_by_megatron(
        tmp_path,
        {name: Layout([str(prefix)], 2 * count[name], 0).request(count[name]) for name, prefix in prefixes.items()},
    )
    for name, samples in answers.items():
        documents = documents_of(prefixes[name])
        assert len(documents) in (20, 24) and all(document[-1] == 1 for document in documents)
        assert len(samples) == count[name] and all(len(sample) == SEQ_LEN + 1 for sample in samples)
        assert all(in_pieces(sample, documents) for sample in samples)
        assert not in_pieces(samples[0][1:] + samples[0][:1], documents)
