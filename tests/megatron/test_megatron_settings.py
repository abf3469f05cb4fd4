"""Which of Megatron's arguments a job of a plan may have, and which may change between two jobs."""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pathswitch.checkpoint import CheckpointSettings
from pathswitch.config import plan_from_params
from pathswitch.errors import CheckpointError, ConfigError
from pathswitch.integrations.megatron_settings import data_settings
from pathswitch_megatron.arguments import check_arguments, check_same_settings
from pathswitch_megatron.hooks import MegatronLMHooks

PLAN = plan_from_params({"max_lr": 1e-3, "versions": [{"name": "v1", "steps": 40}, {"name": "v2", "steps": 30}]})
ARGS = {
    "data_path": ["0.7", "/first/web_text_document", "0.3", "/first/code_text_document"],
    "split": "99,1,0",
    "seed": 1234,
    "seq_length": 4096,
    "train_iters": 70,
    "train_samples": None,
    "mock_data": False,
    "phase_transition_iterations": None,
    "global_batch_size": 512,
    "rampup_batch_size": None,
    "tokenizer_type": "HuggingFaceTokenizer",
    "tokenizer_model": "/first/tokenizer",
    "padded_vocab_size": 32256,
    "micro_batch_size": 2,
    "tensor_model_parallel_size": 1,
    "save": "/main",
}


def settings(**changes: Any) -> dict[str, Any]:
    return data_settings(SimpleNamespace(**{**ARGS, **changes}))


def check(step: int, **changes: Any) -> None:
    saved = json.loads(json.dumps(settings()))
    check_same_settings(PLAN, PLAN.path("v1"), step, saved, settings(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"micro_batch_size": 4, "tensor_model_parallel_size": 2, "save": "/v1"},
        {"data_path": ["0.7", "/second/web_text_document", "0.3", "/second/code_text_document"]},
        {"tokenizer_model": "elsewhere/tokenizer", "mock_data": None},
        {"rampup_batch_size": None, "a_new_argument": 7},
    ],
)
def test_what_changes_neither_samples_nor_vocabulary(changes: dict[str, Any]) -> None:
    check(16, **changes)


DATA = {
    "data_path": ["0.6", "/first/web_text_document", "0.4", "/first/code_text_document"],
    "split": "90,10,0",
    "seed": 1,
    "seq_length": 2048,
    "train_iters": 71,
    "train_samples": 35840,
    "mock_data": True,
    "phase_transition_iterations": [40],
}
NEVER = {
    "global_batch_size": 256,
    "rampup_batch_size": ["16", "16", "1000"],
    "tokenizer_type": "GPT2BPETokenizer",
    "padded_vocab_size": 32512,
}


@pytest.mark.parametrize("name", DATA)
def test_data_changes_only_where_a_version_ends(name: str) -> None:
    for step in (0, 40, 70):
        check(step, **{name: DATA[name]})
    with pytest.raises(CheckpointError) as caught:
        check(16, **{name: DATA[name]})
    flag = f"--{name.replace('_', '-')}"
    assert f"{flag}: checkpoint " in str(caught.value) and "may change only where a version's data ends" in str(
        caught.value
    )
    assert "(steps 40, 70)" in str(caught.value)


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("step", [16, 40])
def test_batches_and_vocabulary_never_change(name: str, step: int) -> None:
    with pytest.raises(CheckpointError, match=f"--{name.replace('_', '-')}: checkpoint .*, now .* may not change"):
        check(step, **{name: NEVER[name]})


def test_every_difference_is_named() -> None:
    with pytest.raises(CheckpointError) as caught:
        check(16, seed=1, global_batch_size=256, padded_vocab_size=32512)
    for text in (
        "--seed: checkpoint 1234, now 1",
        "--global-batch-size: checkpoint 512, now 256",
        "--padded-vocab-size",
    ):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "finetune",
        "no_load_optim",
        "no_load_rng",
        "no_save_optim",
        "no_save_rng",
        "pretrained_checkpoint",
        "reset_iteration",
        "non_persistent_ckpt_type",
    ],
)
def test_refused_arguments(name: str) -> None:
    check_arguments(SimpleNamespace(save="a", load="b"))
    check_arguments(SimpleNamespace(save=None, load=None, **{name: None}))
    with pytest.raises(ConfigError, match=f"given '--{name.replace('_', '-')}'; allowed: not --"):
        check_arguments(SimpleNamespace(save="a", load="b", **{name: True}))


def test_object_storage_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--save: given 'msc://bucket/main'; allowed: a folder of a file system"):
        check_arguments(SimpleNamespace(save="msc://bucket/main", load=None))


def test_a_comparison_that_would_not_happen_is_refused() -> None:
    def hooks(**checkpoint: Any) -> MegatronLMHooks:
        job: Any = SimpleNamespace(settings=CheckpointSettings(**checkpoint))
        return MegatronLMHooks(job, ModuleType("training"), lambda: None, "0.16.1")

    hooks(verify="sizes")
    for given in (True, False):
        with pytest.raises(
            ConfigError, match=rf"^\[megatron.checkpoint\] state_digest: given {given}; allowed: no such"
        ):
            hooks(state_digest=given)
