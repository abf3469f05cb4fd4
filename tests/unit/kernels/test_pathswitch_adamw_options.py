"""PathSwitchAdamW's averages, memory formats and sizes, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adamw_cases import SHAPES, parameters, set_gradients
from torch import Tensor
from torch.nn import Parameter

from pathswitch.errors import ConfigError
from pathswitch.kernels.averaging import merge_weights
from pathswitch.kernels.optimizer import PathSwitchAdamW
from pathswitch.schedule import DecayRun, MainPath, make_shape


def test_exponential_average() -> None:
    mine = parameters(torch.bfloat16, [(50,)])
    optimizer = PathSwitchAdamW(mine, lr=1e-2, average=0.9)
    expected = mine[0].detach().double()
    for step in range(20):
        set_gradients(step, mine)
        optimizer.step()
        expected += 0.1 * (optimizer.state[mine[0]]["master"].double() - expected)
    assert torch.allclose(optimizer.state[mine[0]]["average"].double(), expected, rtol=1e-6, atol=1e-7)
    own = mine[0].detach().clone()
    with optimizer.averaged():
        assert torch.equal(mine[0], optimizer.state[mine[0]]["average"].bfloat16())
    assert torch.equal(mine[0], own)


@pytest.mark.parametrize("path_step", [None, 100], ids=["LR from the host", "LR from a path"])
@pytest.mark.parametrize("name", ["linear", "cosine", "one_minus_sqrt", "knee"])
def test_the_average_imitates_a_decay(name: str, path_step: int | None) -> None:
    """Merged weights equal the start plus every update times the multiplier that a branch would give it."""
    steps, start_step = 13, 4
    shape = make_shape(name, SHAPES[name])
    mine = parameters(sizes=[(50,)])
    choice = {"shape": name, "steps": steps, "start_step": start_step, **SHAPES[name]}
    optimizer = PathSwitchAdamW(mine, lr=1e-2, average=choice)
    if path_step is not None:
        optimizer.follow(MainPath(1e-2, 0.0, warmup_steps=1), path_step)
    weights: list[Tensor] = [mine[0].detach().double()]
    for step in range(start_step + steps + 3):
        set_gradients(step, mine)
        optimizer.step()
        weights.append(mine[0].detach().double())
    curve = shape.curve(1.0, 0.0)
    expected = weights[start_step].clone()
    for j in range(steps):
        expected += curve(j / steps) * (weights[start_step + j + 1] - weights[start_step + j])
    assert torch.allclose(optimizer.state[mine[0]]["average"].double(), expected, rtol=1e-5, atol=1e-6)
    assert merge_weights(shape, steps)[0] == 1.0


def test_memory_formats() -> None:
    torch.manual_seed(0)
    first = torch.randn(4, 3, 5, 5)
    lists = [
        [Parameter(first.clone().to(memory_format=torch.channels_last)), Parameter(torch.randn(6, 9).t())]
        for _ in range(2)
    ]
    with torch.no_grad():
        lists[1][1].copy_(lists[0][1])
    mine, theirs = PathSwitchAdamW(lists[0], lr=1e-2), torch.optim.AdamW(lists[1], lr=1e-2)
    for step in range(3):
        set_gradients(step, *lists)  # gradients are contiguous, the parameters are not
        mine.step()
        theirs.step()
    for p, q in zip(*lists, strict=True):
        assert torch.allclose(p, q, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sizes_of_other_libraries_tests(dtype: torch.dtype) -> None:
    """The sizes that apex and TransformerEngine test, within a thousandth of their tolerance in float32."""
    sizes = [(4096, 1024), (4096,), (4096, 2048), (32320, 1024), (1,), (278011,)]
    lists = [parameters(dtype, sizes), parameters(dtype, sizes)]
    mine = PathSwitchAdamW(lists[0], lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    masters = [Parameter(p.detach().float()) for p in lists[1]]
    theirs = torch.optim.AdamW(masters, lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    for step in range(2):
        set_gradients(step, lists[0])
        for p, q in zip(lists[0], masters, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        mine.step()
        theirs.step()
    for p, q in zip(lists[0], masters, strict=True):
        assert torch.allclose(mine.state[p].get("master", p), q, rtol=1e-6, atol=1e-6)
        assert torch.equal(p, mine.state[p].get("master", p).to(dtype))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr: given -1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": math.nan}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"max_norm": math.inf}, "max_norm"),
        ({"average": 1.0}, "average"),
        ({"average": {"shape": "cosine"}}, "average"),
        ({"average": {"shape": "harmonic", "steps": 5}}, "decays completely"),
        ({"backend": "cuda"}, "kernels or reference"),
    ],
)
def test_refused_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PathSwitchAdamW(parameters(), **settings)


def test_refused_parameters_and_states() -> None:
    with pytest.raises(ConfigError, match=r"torch\.float64"):
        PathSwitchAdamW([Parameter(torch.zeros(3, dtype=torch.float64))])
    with pytest.raises(ConfigError, match="without gaps"):
        PathSwitchAdamW([Parameter(torch.zeros(6)[::2])])
    mine, theirs = parameters(), parameters()
    state = torch.optim.AdamW(theirs, amsgrad=True).state_dict()
    with pytest.raises(ConfigError, match="amsgrad"):
        PathSwitchAdamW(mine).load_state_dict(state)
    optimizer = PathSwitchAdamW(mine)
    with pytest.raises(ConfigError, match="follow step"):
        optimizer.follow(DecayRun(MainPath(1e-3), 6, 30, make_shape("cosine", {})), 5)
    with pytest.raises(ConfigError, match="average"), optimizer.averaged():
        pass
