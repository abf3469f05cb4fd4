from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from pathswitch.data import IGNORED_TARGET
from pathswitch.errors import ConfigError
from pathswitch.trainer.llama import Llama, LlamaConfig, rotary_tables, rotate

TINY = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=48, n_layers=2, n_heads=4, max_seq_len=16, init_std=0.05
)
CONFIGS = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tie_embeddings=False),
    "grouped": dataclasses.replace(TINY, n_kv_heads=2),
}


def tokens(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (batch, length), generator=generator)


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("vocab_size", {"vocab_size": 0}),
        ("n_layers", {"n_layers": -1}),
        ("rope_theta", {"rope_theta": 0.0}),
        ("n_kv_heads", {"n_kv_heads": 3}),
        ("n_kv_heads", {"n_kv_heads": -4}),
        ("hidden_size", {"hidden_size": 30}),
        ("hidden_size", {"hidden_size": 20}),  # 4 heads of 5: not even
    ],
)
def test_config_refuses_and_names_the_field(field: str, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"^model\.{field}: given "):
        dataclasses.replace(TINY, **change)


def test_kv_heads_default_to_heads() -> None:
    assert dataclasses.replace(TINY, n_kv_heads=4) == TINY


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_shapes_and_n_params_are_the_modules(config: LlamaConfig) -> None:
    model = Llama(config, seed=0)
    found = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    assert found == config.shapes
    assert config.n_params == sum(weight.numel() for weight in model.parameters())
    assert list(model.buffers()) == []  # nothing for a cast to bf16 to round


def test_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = Llama(TINY, seed=7).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = Llama(TINY, seed=7).state_dict(), Llama(TINY, seed=8).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])


def test_initial_spread() -> None:
    config = dataclasses.replace(TINY, hidden_size=128, intermediate_size=352, n_layers=8)
    for name, weight in Llama(config, seed=0).named_parameters():
        if weight.ndim == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        residual = "o_proj" in name or "down_proj" in name
        assert weight.std().item() == pytest.approx(0.05 / 4 if residual else 0.05, rel=0.05), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_token_changes_no_logits_before_it(config: LlamaConfig) -> None:
    model = Llama(config, seed=0)
    inputs = tokens(2, 16)
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model.logits(inputs), model.logits(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    moved = (before - after).abs().amax(dim=-1)
    assert (moved[:, 9:] > 1e-4).all()  # every later token sees it


def test_rotation_matches_complex_multiplication() -> None:
    x = torch.randn(3, 11, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(11, 8, 100.0, x.device)
    rotated = rotate(x, cos, sin)
    angle = torch.arange(11)[:, None] / 100.0 ** (torch.arange(4) / 4)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(11, 4), angle)
    torch.testing.assert_close(rotated, torch.cat((expected.real, expected.imag), -1), rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_distance_only() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(8, generator=generator).expand(12, 8) for _ in range(2))
    cos, sin = rotary_tables(12, 8, 10000.0, q.device)
    scores = rotate(q, cos, sin) @ rotate(k, cos, sin).T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-4, atol=1e-5)
    assert (scores[0] - scores[0, 0]).abs()[1:].min() > 1e-3


def test_rotation_of_bf16_uses_fp32_tables() -> None:
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = rotary_tables(200, 8, 10000.0, x.device)
    assert cos.dtype == sin.dtype == torch.float32
    rotated = rotate(x, cos, sin)
    assert rotated.dtype == torch.bfloat16
    assert torch.equal(rotated, rotate(x.float(), cos, sin).bfloat16())


def test_grouped_heads_equal_repeated_heads() -> None:
    grouped = Llama(CONFIGS["grouped"], seed=0)
    state = grouped.state_dict()
    for name, weight in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = weight.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1)
    full = Llama(TINY, seed=1)
    full.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(grouped.logits(tokens(2, 16)), full.logits(tokens(2, 16)), rtol=1e-5, atol=1e-5)


def test_an_untrained_model_knows_nothing() -> None:
    config = dataclasses.replace(TINY, vocab_size=1024, init_std=0.02)
    inputs = torch.randint(1024, (8, 17), generator=torch.Generator().manual_seed(0))
    loss = Llama(config, seed=0)(inputs[:, :-1], inputs[:, 1:])
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert loss.item() == pytest.approx(math.log(1024), abs=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_overfits_one_batch(config: LlamaConfig, dtype: torch.dtype) -> None:
    model = Llama(config, seed=0).to(dtype)
    sequence = tokens(2, 17)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(60):
        loss = model(sequence[:, :-1], sequence[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.dtype == torch.float32
    assert loss.item() < 0.1


def test_ignored_targets_take_no_part() -> None:
    model = Llama(TINY, seed=0)
    inputs, targets = tokens(2, 16), tokens(2, 16, seed=1)
    targets[0, :10] = IGNORED_TARGET
    with torch.no_grad():
        log_p = model.logits(inputs).double().log_softmax(-1)
        mean, (nll, count) = model(inputs, targets), model.token_nll(inputs, targets)
    kept = targets != IGNORED_TARGET
    expected = -log_p[kept].gather(-1, targets[kept][:, None]).sum()
    assert count == 22 and nll.dtype == torch.float64
    assert nll.item() == pytest.approx(expected.item(), rel=1e-6)
    assert mean.item() == pytest.approx(expected.item() / 22, rel=1e-6)


def test_evaluation_goes_through_a_module_call() -> None:
    """ZeRO-3 hooks the call of the module, so a direct ``forward`` would score partitioned weights."""
    model = Llama(TINY, seed=0)
    calls: list[object] = []
    model.register_forward_pre_hook(lambda module, _: calls.append(module))
    model.token_nll(tokens(1, 4), tokens(1, 4))
    assert calls == [model]


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match="given '17 tokens'; allowed: at most max_seq_len = 16"):
        Llama(TINY, seed=0)(tokens(1, 17), tokens(1, 17))
