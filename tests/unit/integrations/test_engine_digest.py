"""The digest of an engine's optimizer state, where one process is enough; test_zero_matrix.py has the rest."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pathswitch.checkpoint import StreamDigest
from pathswitch.integrations.state_digest import Digests, differences, state_digest


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model() -> torch.nn.Linear:
    torch.manual_seed(3)
    return torch.nn.Linear(5, 3)


def engine_of(module: torch.nn.Module, optimizer: Any) -> Any:
    """Return what an engine of DeepSpeed has of it all under ZeRO 0 in fp32."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    group = dist.group.WORLD
    return SimpleNamespace(
        module=module, optimizer=optimizer, param_names=names, seq_data_parallel_group=group, seq_dp_world_size=1
    )


def step(engine: Any) -> None:
    engine.module(torch.ones(2, 5)).square().sum().backward()
    engine.optimizer.step()


def test_streams_that_there_are() -> None:
    module = model()
    engine = engine_of(module, torch.optim.AdamW(module.parameters()))
    before = state_digest(engine)
    assert before is not None and {stream: digest.elements for stream, digest in before.items()} == {"weights": 18}
    step(engine)
    after = state_digest(engine)
    assert after is not None and after.keys() == {"weights", "exp_avg", "exp_avg_sq"}
    assert after["weights"] != before["weights"]
    momentum = engine_of(module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9))
    step(momentum)
    assert (state_digest(momentum) or {}).keys() == {"weights", "momentum_buffer"}


def test_every_bit_name_and_place_counts() -> None:
    module = model()
    engine = engine_of(module, torch.optim.AdamW(module.parameters()))
    first = state_digest(engine)
    assert state_digest(engine) == first
    with torch.no_grad():
        module.weight.view(torch.int32)[2, 4] ^= 1 << 31
        assert state_digest(engine) != first
        module.weight.view(torch.int32)[2, 4] ^= 1 << 31
        assert state_digest(engine) == first
        module.weight[0] = module.weight[0].roll(1)
        assert state_digest(engine) != first
        module.weight[0] = module.weight[0].roll(-1)
    engine.param_names = {parameter: f"other.{name}" for parameter, name in engine.param_names.items()}
    assert state_digest(engine) != first


def test_what_manifests_hold_stays_comparable() -> None:
    """Another definition of the digest would refuse every checkpoint that there is: it needs another field."""
    module = torch.nn.Linear(60, 40)
    for parameter in module.parameters():
        parameter.data = torch.arange(parameter.numel(), dtype=torch.float32).sub(700).div(64).view_as(parameter)
    found = state_digest(engine_of(module, torch.optim.AdamW(module.parameters())))
    assert found == {"weights": StreamDigest(digest="5cf20bab0c6be000c2d85688102c2000", elements=2440)}


def test_how_a_parameter_lies_in_memory_does_not_count() -> None:
    rows, columns = model(), model()
    columns.weight = torch.nn.Parameter(columns.weight.detach().t().contiguous().t())
    assert not columns.weight.is_contiguous()
    digests = [state_digest(engine_of(one, torch.optim.AdamW(one.parameters()))) for one in (rows, columns)]
    assert digests[0] == digests[1] is not None


class Unknown:
    """An optimizer of nobody's."""


class DeepSpeedZeroOptimizer:
    """One of another DeepSpeed, that has other attributes."""

    optimizer = SimpleNamespace(state={})


class DeepSpeedZeroOptimizer_Stage3:
    """One that keeps its state on disks."""

    swap_optimizer, optimizer = True, SimpleNamespace(state={})


@pytest.mark.parametrize(
    ("optimizer", "said"),
    [
        (Unknown(), "Unknown is not known"),
        (DeepSpeedZeroOptimizer(), "DeepSpeedZeroOptimizer: AttributeError: "),
        (DeepSpeedZeroOptimizer_Stage3(), "the optimizer state is offloaded to NVMe"),
    ],
)
def test_what_is_not_understood_is_not_recorded(optimizer: Any, said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pathswitch"):
        assert [state_digest(engine_of(model(), optimizer)) for _ in range(2)] == [None, None]
    assert [said in record.getMessage() for record in caplog.records] == [True], "one line, not one for each save"


def test_experts_are_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    module = model()
    module.weight.allreduce = False  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "pathswitch"):
        assert state_digest(engine_of(module, torch.optim.AdamW(module.parameters()))) is None
    assert "experts" in caplog.text


def digests(**streams: str) -> Digests:
    return {stream: StreamDigest(digest=digit * 32, elements=1000 + len(digit)) for stream, digit in streams.items()}


def test_differences() -> None:
    saved = digests(weights="1", exp_avg="2", exp_avg_sq="3")
    assert differences(saved, saved) == []
    assert differences(digests(weights="1"), saved) == [], "only what was recorded can be compared"
    assert [str(finding) for finding in differences(saved, digests(weights="1", exp_avg="4"))] == [
        f"exp_avg: expected {'2' * 32} of 1,001 elements, found {'4' * 32} of 1,001 elements",
        f"exp_avg_sq: expected {'3' * 32} of 1,001 elements, found nothing",
    ]
    fewer = {**saved, "weights": StreamDigest(digest="1" * 32, elements=999)}
    assert [str(finding) for finding in differences(saved, fewer)] == [
        f"weights: expected {'1' * 32} of 1,001 elements, found {'1' * 32} of 999 elements"
    ]
