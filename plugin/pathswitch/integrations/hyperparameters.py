"""Optimizer settings of a branch: DeepSpeed takes them from the checkpoint, a fork's policy overrides them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch

from pathswitch.checkpoint import Policy
from pathswitch.errors import CheckpointError

logger = logging.getLogger("pathswitch")

COMPARED = ("betas", "eps", "weight_decay")
NOT_SETTINGS = ("params", "lr", "initial_lr", "step")
NOT_MOMENTS = ("master", "average")  # of the weights, in the state of PathSwitchAdamW


def group_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return each param group's settings, without its parameters, LR and counters."""
    return [{k: v for k, v in group.items() if k not in NOT_SETTINGS} for group in optimizer.param_groups]


def differing_settings(configured: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> list[str]:
    """Return, in words, what a checkpoint has put in the place of the configuration."""
    lines = []
    for index, (ours, theirs) in enumerate(zip(configured, loaded, strict=False)):
        for name in COMPARED:
            if name in ours and name in theirs and _plain(ours[name]) != _plain(theirs[name]):
                lines.append(f"{name} of param group {index}: ds_config {ours[name]}, checkpoint {theirs[name]}")
    return lines


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def apply_policy(engine: Any, optimizer: torch.optim.Optimizer, policy: Policy, *, at_fork: bool) -> None:
    """Make a fork's changes real in a loaded engine.

    Weight decay changes where a group has one: groups without any (gains, biases) stay without.

    Raises:
        CheckpointError: the optimizer keeps its moments where they cannot be reset.
    """
    for group in optimizer.param_groups:
        if policy.beta2 is not None:
            group["betas"] = (group["betas"][0], policy.beta2)
        if policy.weight_decay is not None and group["weight_decay"] != 0:
            group["weight_decay"] = policy.weight_decay
    if policy.gradient_clipping is not None:
        _set_clipping(engine, policy.gradient_clipping)
    if policy.reset_moments and at_fork:
        _reset_moments(engine, optimizer)


def clipping(engine: Any) -> float:
    """Return the norm that gradients are clipped to: ZeRO 1 and 2 take it from the checkpoint."""
    for wrapper in _wrappers(engine.optimizer):
        if hasattr(wrapper, "clip_grad"):
            return float(wrapper.clip_grad)
    return float(engine.gradient_clipping())


def _set_clipping(engine: Any, value: float) -> None:
    engine._config.gradient_clipping = value
    for wrapper in _wrappers(engine.optimizer):
        if hasattr(wrapper, "clip_grad"):
            wrapper.clip_grad = value


def _wrappers(optimizer: Any) -> Iterator[Any]:
    """Yield the optimizer and every optimizer inside it."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "optimizer", None)


def _reset_moments(engine: Any, optimizer: torch.optim.Optimizer) -> None:
    if getattr(engine.optimizer, "swap_optimizer", False):
        raise CheckpointError("the fork resets Adam's moments, which is not possible where they are offloaded to NVMe")
    for state in optimizer.state.values():
        for name, value in state.items():
            if name in NOT_MOMENTS:
                continue
            if torch.is_tensor(value):
                value.zero_()
            elif name == "step":
                state[name] = 0
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = 0
