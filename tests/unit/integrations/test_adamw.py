"""torch.optim.PathSwitchAdamW without DeepSpeed: its parameters, and the states of other AdamWs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from pathswitch.errors import ConfigError
from pathswitch.integrations.adamw import PathSwitchAdamW


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, 5))


def adamw(**parameters: Any) -> PathSwitchAdamW:
    return PathSwitchAdamW([parameter()], backend="reference", **parameters)


def trained(optimizer: Any, steps: int) -> torch.Tensor:
    (p,) = optimizer.param_groups[0]["params"]
    for step in range(steps):
        p.grad = torch.full_like(p, 0.1 * (step + 1))
        optimizer.step()
    weights: torch.Tensor = p.detach().clone()
    return weights


@pytest.mark.parametrize(
    "parameters",
    [
        {"torch_adam": False, "adam_w_mode": True, "bias_correction": True},
        {"amsgrad": False, "maximize": False, "differentiable": False, "capturable": True, "foreach": None},
        {"betas": [0.9, 0.95], "fused": True, "lr": 1},
    ],
)
def test_parameters_that_ask_for_what_it_does(parameters: dict[str, Any]) -> None:
    optimizer = adamw(**parameters)
    assert tuple(optimizer.param_groups[0]["betas"]) == tuple(parameters.get("betas", (0.9, 0.999)))
    assert optimizer.param_groups[0]["lr"] == parameters.get("lr", 1e-3)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"weight_decays": 0.1}, r"params: given 'weight_decays'; allowed: lr, .*did you mean 'weight_decay'"),
        ({"amsgrad": True}, "amsgrad: given True; allowed: False, or leave the key out"),
        ({"bias_correction": False}, "bias_correction: given False; allowed: True, or"),
        ({"torch_adam": 0}, "torch_adam: given 0; allowed: False, or"),
        ({"lr": True}, "lr: given True; allowed: a number"),
        ({"lr": -1.0}, "lr: given -1.0; allowed: a finite LR >= 0"),
        ({"eps": "1e-8"}, "eps: given '1e-8'; allowed: a number"),
        ({"betas": 0.9}, "betas: given 0.9; allowed: two numbers"),
        ({"betas": [0.9, "0.95"]}, r"betas: given \[0.9, '0.95'\]; allowed: two numbers"),
        ({"betas": [0.9, 1.0]}, r"betas: given \(0.9, 1.0\); allowed: two numbers"),
        ({"max_norm": None}, "max_norm: given None; allowed: a number"),
        ({"one_pass": 1}, "one_pass: given 1; allowed: true or false"),
    ],
)
def test_other_parameters_are_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^PathSwitchAdamW {said}"):
        adamw(**parameters)


def test_unknown_backend() -> None:
    with pytest.raises(ConfigError, match="backend: given 'cuda'; allowed: kernels, reference"):
        PathSwitchAdamW([parameter()], backend="cuda")


@pytest.mark.parametrize("step_in_group", (False, True))
def test_goes_on_from_a_state_of_deepspeeds_fused_adam(step_in_group: bool) -> None:
    """FusedAdam's steps are plain numbers, of a parameter or, in older checkpoints, of a group."""
    whole = adamw(lr=1e-2)
    trained(whole, 3)
    saved = copy.deepcopy(whole.state_dict())
    expected = trained(whole, 2)
    (state,) = saved["state"].values()
    step = int(state.pop("step"))
    if step_in_group:
        saved["param_groups"][0]["step"] = step
    else:
        state["step"] = step
    resumed = adamw(lr=1e-2)
    resumed.param_groups[0]["params"][0].data.copy_(trained(adamw(lr=1e-2), 3))
    resumed.load_state_dict(saved)
    (p,) = resumed.param_groups[0]["params"]
    assert float(resumed.state[p]["step"]) == 3
    assert "step" not in resumed.param_groups[0]
    assert torch.equal(trained(resumed, 2), expected)


def test_deepspeeds_fused_adam_finds_its_keys() -> None:
    stock = torch.optim.AdamW([parameter()])
    trained(stock, 1)
    optimizer = adamw()
    assert optimizer.state_dict()["param_groups"][0]["bias_correction"] is True
    optimizer.load_state_dict(stock.state_dict())
    assert optimizer.state_dict()["param_groups"][0]["bias_correction"] is True


@pytest.mark.parametrize(
    ("name", "value"), [("amsgrad", True), ("bias_correction", False), ("decoupled_weight_decay", False)]
)
def test_states_of_other_adams_are_refused(name: str, value: bool) -> None:
    saved = adamw().state_dict()
    saved["param_groups"][0][name] = value
    with pytest.raises(ConfigError, match=f"{name} of a loaded state: given {value}; allowed: {not value}"):
        adamw().load_state_dict(saved)
