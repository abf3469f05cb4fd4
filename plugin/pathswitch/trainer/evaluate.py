"""Perplexity of a model on a test set, each rank scoring its share of the windows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pathswitch.data import IGNORED_TARGET
from pathswitch.errors import ConfigError
from pathswitch.score import Score
from pathswitch.trainer.llama import Llama

Tokens = npt.NDArray[np.int64]


def evaluate(
    model: Llama,
    windows: tuple[Tokens, Tokens],
    *,
    n_bytes: int,
    batch_size: int,
    rank: int,
    world_size: int,
    all_reduce: Callable[[Tensor], None],
) -> Score:
    """Score (inputs, targets), int64 [n, L] each, and return on every rank the result over all n windows.

    Collective: every rank calls it with the same windows. ``all_reduce`` sums a float64 tensor over the ranks in
    place. The model's training mode is left as it was found.

    Raises:
        ConfigError: the windows' shapes differ, no target is scored, or ``n_bytes`` or ``batch_size`` is not positive.
    """
    inputs, targets = windows
    _check(inputs, targets, n_bytes=n_bytes, batch_size=batch_size)
    inputs, targets = _share(inputs, targets, rank=rank, world_size=world_size)
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # nll in nats, tokens
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(inputs), batch_size):
                batch = slice(start, start + batch_size)
                nll, tokens = model.token_nll(
                    torch.from_numpy(inputs[batch]).to(device), torch.from_numpy(targets[batch]).to(device)
                )
                total[0] += nll
                total[1] += tokens
    finally:
        model.train(was_training)
    all_reduce(total)
    return Score(nll_nats=total[0].item(), tokens=int(total[1].item()), n_bytes=n_bytes)


def _check(inputs: Tokens, targets: Tokens, *, n_bytes: int, batch_size: int) -> None:
    if inputs.ndim != 2 or inputs.shape != targets.shape:
        given = f"inputs {inputs.shape}, targets {targets.shape}"
        raise ConfigError("test windows", given=given, allowed="two arrays of one shape [n, L]")
    if not (targets != IGNORED_TARGET).any():
        raise ConfigError("test windows", given="no scored target", allowed="at least one")
    for name, value in (("n_bytes", n_bytes), ("batch_size", batch_size)):
        if value <= 0:
            raise ConfigError(f"evaluate {name}", given=value, allowed="a positive integer")


def _share(inputs: Tokens, targets: Tokens, *, rank: int, world_size: int) -> tuple[Tokens, Tokens]:
    """Take windows rank::world_size, filled up with a window that scores nothing to the same number on each rank.

    A ZeRO-3 forward is a collective: a rank that ran one batch fewer would leave the others waiting for ever.
    """
    per_rank = -(-len(inputs) // world_size)
    mine, mine_targets = inputs[rank::world_size], targets[rank::world_size]
    missing = ((0, per_rank - len(mine)), (0, 0))
    return np.pad(mine, missing), np.pad(mine_targets, missing, constant_values=IGNORED_TARGET)
