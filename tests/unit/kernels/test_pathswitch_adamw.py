"""PathSwitchAdamW against torch.optim.AdamW in float64, its own reference, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adamw_cases import SHAPES, branch, lr_of_last_step, parameters, set_gradients
from torch.nn import Parameter

from pathswitch.integrations.scheduler import PathSwitchLR
from pathswitch.kernels.optimizer import PathSwitchAdamW, ShardUpdate
from pathswitch.schedule import ConstantRun, DecayRun, LRPath, MainPath, make_shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_near_float64(dtype: torch.dtype, clip: float) -> None:
    mine = parameters(dtype)
    exact = [Parameter(p.detach().double()) for p in mine]
    settings: dict[str, Any] = {"betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer, expected = PathSwitchAdamW(mine, max_norm=clip, **settings), torch.optim.AdamW(exact, **settings)
    path = branch("cosine")
    optimizer.follow(path, 0)
    for step in range(12):
        set_gradients(step, mine)
        for p, q in zip(mine, exact, strict=True):
            assert p.grad is not None
            q.grad = p.grad.double()
        if clip:
            torch.nn.utils.clip_grad_norm_(exact, clip)
        for group in expected.param_groups:
            group["lr"] = path.schedule()(step)
        optimizer.step()
        expected.step()
    for p, q in zip(mine, exact, strict=True):
        weights = optimizer.state[p].get("master", p).detach().double()
        if p.numel():
            scale = q.detach().abs() + path.main.max_lr  # an update is about that large
            assert float(((weights - q.detach()).abs() / scale).max()) < 2e-6
        assert torch.equal(p, optimizer.state[p].get("master", p).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_reference_gives_the_same_bits(dtype: torch.dtype) -> None:
    lists = [parameters(dtype), parameters(dtype)]
    average = {"shape": "one_minus_sqrt", "start_step": 3, "steps": 6}
    both = [
        PathSwitchAdamW(p, lr=1e-2, max_norm=0.5, average=average, backend=backend)
        for p, backend in zip(lists, ("kernels", "reference"), strict=True)
    ]
    both[0].follow(branch("cosine"), 5)
    both[1].follow(branch("cosine"), 5)
    for step in range(12):
        set_gradients(step, *lists)
        if step == 7:
            for same in lists:
                assert same[1].grad is not None
                same[1].grad[3] = math.inf
        for optimizer in both:
            optimizer.step()
    for left, right in zip(*lists, strict=True):
        assert torch.equal(left, right)
        for name, value in both[0].state[left].items():
            assert torch.equal(value, both[1].state[right][name]), name
    assert [optimizer.skipped_steps() for optimizer in both] == [1, 1]
    assert [optimizer.path_step() for optimizer in both] == [16, 16]


PATHS: list[Callable[[], LRPath]] = [
    *[lambda name=name: branch(name) for name in SHAPES],  # type: ignore[misc]
    lambda: MainPath(3e-3, 1e-4, warmup_steps=5),
    lambda: MainPath(3e-3),
    lambda: ConstantRun(1e-4),
    lambda: DecayRun(MainPath(3e-3, 0.0, warmup_steps=4), 6, 30, make_shape("cosine", {}), 3e-5),
]


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("number", range(len(PATHS)))
def test_the_device_has_the_schedule_s_lr_to_the_bit(number: int, backend: str) -> None:
    path = PATHS[number]()
    lr = path.schedule()
    start = path.start_step if isinstance(path, DecayRun) else 0
    mine = parameters(sizes=[(3,)])
    optimizer = PathSwitchAdamW(mine, max_norm=1.0, backend=backend)
    optimizer.follow(path, start, lr_multiples=[0.3])
    for step in range(start, 40):
        set_gradients(step, mine)
        if step % 11 == 3:  # a step that is left out does not move the path
            assert mine[0].grad is not None
            good = mine[0].grad.clone()
            mine[0].grad[0] = math.nan
            optimizer.step()
            mine[0].grad = good
        assert optimizer.path_step() == step
        optimizer.step()
        assert lr_of_last_step(optimizer) == 0.3 * lr(step)


def test_the_lr_of_the_host_gives_the_same_bits_as_the_path() -> None:
    lists = [parameters(), parameters()]
    host, device = (PathSwitchAdamW(p, lr=3e-3) for p in lists)
    path = branch("one_minus_sqrt")
    device.follow(path)
    for step in range(28):
        set_gradients(step, *lists)
        host.param_groups[0]["lr"] = path.schedule()(step)
        host.step()
        device.step()
    for left, right in zip(*lists, strict=True):
        assert torch.equal(left, right)


def test_switching_from_the_main_path_to_a_branch_keeps_the_count() -> None:
    mine = parameters(sizes=[(3,)])
    optimizer, path = PathSwitchAdamW(mine), branch("linear")
    optimizer.follow(path.main, 0)
    for step in range(20):
        if step == path.fork_step:
            optimizer.follow(path)
        set_gradients(step, mine)
        optimizer.step()
        assert lr_of_last_step(optimizer) == path.schedule()(step)


def test_pathswitchlr_sets_its_lr() -> None:
    mine = parameters(sizes=[(3,)])
    optimizer = PathSwitchAdamW(mine, lr=3e-3)
    versions = [{"name": "v1", "steps": 10, "decay_steps": 4}]
    scheduler = PathSwitchLR(optimizer, path="main", max_lr=3e-3, warmup_steps=2, versions=versions)
    for step in range(10):
        set_gradients(step, mine)
        optimizer.step()
        assert lr_of_last_step(optimizer) == scheduler.path.lr(step)
        scheduler.step()


@pytest.mark.parametrize("fused", [False, True])
def test_states_go_to_torch_s_adamw_and_back(fused: bool) -> None:
    lists = [parameters(), parameters(), parameters()]
    mine, theirs = PathSwitchAdamW(lists[0], lr=1e-2), torch.optim.AdamW(lists[1], lr=1e-2, fused=fused)
    for step in range(3):
        set_gradients(step, lists[1])
        theirs.step()
    with torch.no_grad():
        for p, q in zip(lists[0], lists[1], strict=True):
            p.copy_(q)
    mine.load_state_dict(theirs.state_dict())
    for step in range(3, 6):
        set_gradients(step, lists[0], lists[1])
        mine.step()
        theirs.step()
    for p, q in zip(lists[0], lists[1], strict=True):
        assert torch.allclose(p, q, rtol=2e-6, atol=1e-7)
        assert float(mine.state[p]["step"]) == float(theirs.state[q]["step"]) == 6
    back = torch.optim.AdamW(lists[2], lr=1.0, fused=fused)
    back.load_state_dict(mine.state_dict())
    for p, q in zip(lists[0], lists[2], strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(mine.state[p][name], back.state[q][name])
    set_gradients(7, lists[2])
    back.step()
    assert back.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_same_bits(dtype: torch.dtype) -> None:
    lists = [parameters(dtype), parameters(dtype)]
    straight, resumed = (PathSwitchAdamW(p, lr=1e-2, average=0.9) for p in lists)
    for step in range(6):
        set_gradients(step, *lists)
        straight.step()
        if step == 3:
            state = resumed.state_dict()
            resumed = PathSwitchAdamW(lists[1], lr=1.0, average=0.9)
            resumed.load_state_dict(state)
        resumed.step()
    for left, right in zip(*lists, strict=True):
        assert torch.equal(left, right)
        for name, value in straight.state[left].items():
            assert value.dtype == torch.float32 and torch.equal(value, resumed.state[right][name]), name


def test_parameters_without_gradient_keep_their_count() -> None:
    lists = [parameters(), parameters()]
    mine, theirs = PathSwitchAdamW(lists[0], lr=1e-2), torch.optim.AdamW(lists[1], lr=1e-2)
    for step in range(6):
        set_gradients(step, *lists)
        if step % 2:
            lists[0][0].grad = lists[1][0].grad = None
        mine.step()
        theirs.step()
    assert float(mine.state[lists[0][0]]["step"]) == 3
    for p, q in zip(*lists, strict=True):
        assert torch.allclose(p, q, rtol=2e-6, atol=1e-7)


def test_groups_have_their_own_settings() -> None:
    lists = [parameters(), parameters()]

    def groups(p: list[Parameter]) -> list[dict[str, Any]]:
        return [
            {"params": p[:2], "lr": 1e-2, "weight_decay": 0.0},
            {"params": p[2:], "betas": (0.8, 0.99), "eps": 1e-5},
        ]

    mine, theirs = PathSwitchAdamW(groups(lists[0]), lr=1e-3), torch.optim.AdamW(groups(lists[1]), lr=1e-3)
    for step in range(5):
        set_gradients(step, *lists)
        mine.step()
        theirs.step()
    for p, q in zip(*lists, strict=True):
        assert torch.allclose(p, q, rtol=2e-6, atol=1e-7)


def test_gradient_scaler() -> None:
    lists = [parameters(), parameters()]
    plain, scaled = (PathSwitchAdamW(p, lr=1e-2) for p in lists)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    scaler.scale(torch.zeros(1))
    for step in range(4):
        set_gradients(step, lists[0])
        set_gradients(step, lists[1], scale=1024.0)
        if step == 2:
            assert lists[1][0].grad is not None
            lists[1][0].grad[0] = math.inf
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
        if step == 2:
            assert scaler.get_scale() == 512.0
            scaler.update(1024.0)
    assert scaled.skipped_steps() == 1
    for left, right in zip(*lists, strict=True):
        assert torch.equal(left, right)


def test_pieces_of_one_pass_equal_the_whole() -> None:
    lists = [parameters(), parameters()]
    whole, pieces = (PathSwitchAdamW(p, lr=1e-2) for p in lists)
    for step in range(4):
        set_gradients(step, *lists)
        sums = whole.sum_of_squares(p.grad for p in lists[0] if p.grad is not None)
        scale = torch.tensor([0.25])
        own = [ShardUpdate(p, 0, p.grad) for p in lists[0] if p.grad is not None]
        whole.one_pass(own, sums_of_squares=sums, inv_scale=scale, max_norm=0.5)
        updates = []
        for p in lists[1]:
            assert p.grad is not None
            flat, cut = p.grad.view(-1), p.numel() // 3
            updates += [ShardUpdate(p, cut, flat[cut:]), ShardUpdate(p, 0, flat[:cut])]
        pieces.one_pass(updates, sums_of_squares=sums, inv_scale=scale, max_norm=0.5)
    for p, q in zip(*lists, strict=True):
        assert torch.equal(p, q) and torch.equal(whole.state[p]["step"], pieces.state[q]["step"])


def test_norms_of_their_own() -> None:
    lists = [parameters(sizes=[(5,), (6,)]), parameters(sizes=[(5,), (6,)])]
    mine, theirs = PathSwitchAdamW(lists[0], lr=1e-2), torch.optim.AdamW(lists[1], lr=1e-2)
    for step in range(3):
        set_gradients(step, *lists)
        gradients = [p.grad for p in lists[0] if p.grad is not None]
        sums = torch.cat([mine.sum_of_squares([g]) for g in gradients])
        updates = [ShardUpdate(p, 0, g, norm=n) for n, (p, g) in enumerate(zip(lists[0], gradients, strict=True))]
        mine.one_pass(updates, sums_of_squares=sums, max_norm=[0.5, 2.0])
        torch.nn.utils.clip_grad_norm_(lists[1][:1], 0.5)
        torch.nn.utils.clip_grad_norm_(lists[1][1:], 2.0)
        theirs.step()
    for p, q in zip(*lists, strict=True):
        assert torch.allclose(p, q, rtol=2e-6, atol=1e-7)
