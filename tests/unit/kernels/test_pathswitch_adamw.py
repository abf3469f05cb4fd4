"""PathSwitchAdamW against torch.optim.AdamW in float64, its own reference, and the schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from pathswitch.errors import ConfigError
from pathswitch.integrations.scheduler import PathSwitchLR
from pathswitch.kernels.averaging import merge_weights
from pathswitch.kernels.layouts import StepScalars
from pathswitch.kernels.optimizer import PathSwitchAdamW, ShardUpdate
from pathswitch.schedule import BranchPath, ConstantRun, DecayRun, LRPath, MainPath, make_shape

SHAPES = {
    "linear": {},
    "cosine": {},
    "one_minus_sqrt": {},
    "exponential": {},
    "polynomial": {"power": 1.7},
    "knee": {"explore": 0.3},
    "harmonic": {},
    "multi_step": {"milestones": (0.3, 0.5, 0.9), "factors": (0.5, 0.2, 0.1)},
}
SIZES = [(300, 7), (7,), (1,), (16385,), (0,)]


def branch(name: str, decay_steps: int = 17) -> BranchPath:
    shape, main = make_shape(name, SHAPES[name]), MainPath(3e-3, 1e-4, warmup_steps=5)
    final_lr = {"harmonic": 3e-5, "multi_step": 3e-4}.get(name, 0.0)
    return BranchPath(main, fork_step=9, decay_steps=decay_steps, shape=shape, final_lr=final_lr)


def parameters(dtype: torch.dtype = torch.float32, sizes: Any = SIZES) -> list[Parameter]:
    torch.manual_seed(3)
    return [Parameter(torch.randn(size).to(dtype)) for size in sizes]


def set_gradients(step: int, *lists: list[Parameter], scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for same in zip(*lists, strict=True):
        gradient = torch.randn(same[0].shape, generator=generator) * 10.0 ** (step % 4 - 2) * scale
        for p in same:
            p.grad = gradient.to(p.dtype)


def lr_of_last_step(optimizer: PathSwitchAdamW) -> float:
    assert optimizer._device_state is not None
    return StepScalars.from_buffer_copy(optimizer._device_state.scalars[0].numpy().tobytes()).lr


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


@pytest.mark.parametrize("name", ["linear", "cosine", "one_minus_sqrt", "knee"])
def test_the_average_imitates_a_decay(name: str) -> None:
    """Merged weights equal the start plus every update times the multiplier that a branch would give it."""
    steps, start_step = 13, 4
    shape = make_shape(name, SHAPES[name])
    mine = parameters(sizes=[(50,)])
    choice = {"shape": name, "steps": steps, "start_step": start_step, **SHAPES[name]}
    optimizer = PathSwitchAdamW(mine, lr=1e-2, average=choice)
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
