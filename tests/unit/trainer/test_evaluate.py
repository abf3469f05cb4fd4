from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from pathswitch.data import IGNORED_TARGET
from pathswitch.errors import ConfigError
from pathswitch.score import Score
from pathswitch.trainer.evaluate import Tokens, evaluate
from pathswitch.trainer.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, n_layers=2, n_heads=4, max_seq_len=8, init_std=0.2
)
N_WINDOWS = 7  # on 2, 3 and 4 ranks a rank gets one window fewer than another


@pytest.fixture
def model() -> Llama:
    return Llama(CONFIG, seed=0)


@pytest.fixture
def windows() -> tuple[Tokens, Tokens]:
    rng = np.random.default_rng(0)
    inputs, targets = rng.integers(0, CONFIG.vocab_size, (2, N_WINDOWS, 8))
    targets[-1, 3:] = IGNORED_TARGET  # a last window that the text does not fill
    return inputs, targets


def no_reduce(_: torch.Tensor) -> None:
    return None


def on_ranks(
    model: Llama, windows: tuple[Tokens, Tokens], *, world_size: int, batch_size: int
) -> tuple[list[Score], list[int]]:
    """Run every rank in turn, twice: to learn the parts, then with their sum; return results and forward calls."""
    parts: list[torch.Tensor] = []
    calls: list[int] = []

    def run(rank: int, all_reduce: Callable[[torch.Tensor], None]) -> Score:
        return evaluate(
            model,
            windows,
            n_bytes=99,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            all_reduce=all_reduce,
        )

    for rank in range(world_size):
        hook = model.register_forward_pre_hook(lambda *_, rank=rank: calls.append(rank))
        run(rank, lambda part: parts.append(part.clone()))
        hook.remove()
    total = torch.stack(parts).sum(0)

    def fill(mine: torch.Tensor) -> None:
        mine.copy_(total)

    results = [run(rank, fill) for rank in range(world_size)]
    return results, [calls.count(rank) for rank in range(world_size)]


def test_equals_one_plain_forward(model: Llama, windows: tuple[Tokens, Tokens]) -> None:
    results, _ = on_ranks(model, windows, world_size=1, batch_size=N_WINDOWS)
    inputs, targets = map(torch.from_numpy, windows)
    kept = targets != IGNORED_TARGET
    with torch.no_grad():
        log_p = model.logits(inputs).double().log_softmax(-1)
    nll = -log_p[kept].gather(-1, targets[kept][:, None]).sum().item()
    assert results[0].tokens == 7 * 8 - 5
    assert results[0].n_bytes == 99
    assert results[0].nll_nats == pytest.approx(nll, rel=1e-6)
    assert results[0].perplexity == pytest.approx(math.exp(nll / 51), rel=1e-6)
    assert results[0].bits_per_byte == pytest.approx(nll / math.log(2) / 99, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
def test_neither_ranks_nor_batches_matter(
    model: Llama, windows: tuple[Tokens, Tokens], world_size: int, batch_size: int
) -> None:
    (reference,), _ = on_ranks(model, windows, world_size=1, batch_size=N_WINDOWS)
    results, calls = on_ranks(model, windows, world_size=world_size, batch_size=batch_size)
    assert len(set(results)) == 1  # every rank holds the whole result
    assert results[0].tokens == reference.tokens
    assert results[0].nll_nats == pytest.approx(reference.nll_nats, rel=1e-6)
    assert len(set(calls)) == 1 and calls[0] > 0  # ZeRO-3's forward is a collective


def test_the_same_forward_calls_give_the_same_sum_on_any_ranks(model: Llama, windows: tuple[Tokens, Tokens]) -> None:
    """One window per call: the only freedom left is the order of a float64 sum."""
    nll = [on_ranks(model, windows, world_size=world_size, batch_size=1)[0][0].nll_nats for world_size in (1, 2, 4)]
    assert nll == pytest.approx([nll[0]] * 3, rel=1e-14)


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_mode_and_no_gradients(model: Llama, windows: tuple[Tokens, Tokens], training: bool) -> None:
    model.train(training)
    modes: list[tuple[bool, bool]] = []
    model.register_forward_pre_hook(lambda *_: modes.append((model.training, torch.is_grad_enabled())))
    evaluate(model, windows, n_bytes=1, batch_size=4, rank=0, world_size=1, all_reduce=no_reduce)
    assert model.training is training
    assert set(modes) == {(False, False)}
    assert all(weight.grad is None for weight in model.parameters())


def test_restores_the_mode_after_a_failure(model: Llama, windows: tuple[Tokens, Tokens]) -> None:
    too_long = (np.tile(windows[0], 2), np.tile(windows[1], 2))
    with pytest.raises(ConfigError, match="max_seq_len"):
        evaluate(model, too_long, n_bytes=1, batch_size=4, rank=0, world_size=1, all_reduce=no_reduce)
    assert model.training


def test_training_goes_on_after_an_evaluation(model: Llama, windows: tuple[Tokens, Tokens]) -> None:
    evaluate(model, windows, n_bytes=1, batch_size=4, rank=0, world_size=1, all_reduce=no_reduce)
    inputs, targets = map(torch.from_numpy, windows)
    model(inputs, targets).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_pooled_weighs_by_tokens() -> None:
    small, large = Score(nll_nats=8.0, tokens=2, n_bytes=9), Score(nll_nats=10.0, tokens=10, n_bytes=40)
    assert Score.pooled([small, large]).perplexity == pytest.approx(math.exp(18 / 12))
    assert Score.pooled([small]) == small


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": (np.zeros((0, 8), np.int64), np.zeros((0, 8), np.int64))}, "no scored target"),
        ({"windows": (np.zeros((2, 8), np.int64), np.full((2, 8), IGNORED_TARGET))}, "no scored target"),
        ({"windows": (np.zeros((2, 8), np.int64), np.zeros((3, 8), np.int64))}, "one shape"),
        ({"n_bytes": 0}, "n_bytes: given 0"),
        ({"batch_size": 0}, "batch_size: given 0"),
    ],
)
def test_refuses_what_cannot_be_scored(
    model: Llama, windows: tuple[Tokens, Tokens], change: dict[str, object], message: str
) -> None:
    arguments: dict[str, object] = {"windows": windows, "n_bytes": 1, "batch_size": 2} | change
    with pytest.raises(ConfigError, match=message):
        evaluate(model, rank=0, world_size=1, all_reduce=no_reduce, **arguments)  # type: ignore[arg-type]
