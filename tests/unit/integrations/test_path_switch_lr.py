"""PathSwitchLR on torch's own optimizers: the LR in every update, states, refusals."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pathswitch.config import plan_from_params
from pathswitch.errors import ConfigError, ScheduleError
from pathswitch.integrations.scheduler import PathSwitchLR
from pathswitch.schedule import SHAPES
from pathswitch.versions import PARADIGMS, Paradigm

PARAMS: dict[str, Any] = {
    "max_lr": 3e-3,
    "init_lr": 1e-5,
    "warmup_steps": 3,
    "versions": [{"name": "v1", "steps": 10}, {"name": "v2", "steps": 8, "alpha": 0.5, "shape": "linear"}],
}
PLAN = plan_from_params(PARAMS)


def sgd(*lrs: float, default: float = 0.1) -> torch.optim.SGD:
    """One double weight to a group, all with gradient 1: an update of a zero weight leaves exactly -lr in it."""
    groups = [
        {"params": [torch.zeros((), dtype=torch.float64, requires_grad=True)], "lr": lr} for lr in lrs or [default]
    ]
    return torch.optim.SGD(groups, lr=default)


def update(optimizer: torch.optim.Optimizer, gradient: float = 1.0) -> list[float]:
    """Run one update and return the LRs by what it did to the weights."""
    weights = [group["params"][0] for group in optimizer.param_groups]
    for weight in weights:
        weight.data.zero_()
        weight.grad = torch.full_like(weight, gradient)
    optimizer.step()
    return [-float(weight.detach()) for weight in weights]


def train(optimizer: torch.optim.Optimizer, scheduler: PathSwitchLR, count: int) -> list[float]:
    used = []
    for _ in range(count):
        used += update(optimizer)
        scheduler.step()
    return used


def planned(path: str, first: int, end: int, paradigm: Paradigm = "path_switching") -> list[float]:
    lr = PLAN.path(path, paradigm).lr
    return [lr(step) for step in range(first, end)]


def scheduler_at(step: int, path: str = "main", **changes: Any) -> tuple[torch.optim.SGD, PathSwitchLR]:
    """Return an optimizer and a scheduler that has been trained up to a step of its path."""
    optimizer = sgd()
    main = PathSwitchLR(optimizer, **PARAMS)
    fork_step = PLAN.path(path).start_step
    train(optimizer, main, step if path == "main" else fork_step)
    if path == "main":
        return optimizer, main
    branch = PathSwitchLR(optimizer, path=path, **(PARAMS | changes))
    branch.load_state_dict(main.state_dict())
    train(optimizer, branch, step - fork_step)
    return optimizer, branch


def test_every_update_of_main_and_branch_uses_the_plans_lr() -> None:
    optimizer = sgd()
    main = PathSwitchLR(optimizer, **PARAMS)
    assert train(optimizer, main, 14) == planned("main", 0, 14)
    branch = PathSwitchLR(optimizer, path="v2", **PARAMS)
    branch.load_state_dict(main.state_dict())
    assert train(optimizer, branch, 4) == planned("v2", 14, 18)
    assert branch.get_last_lr() == [0.0], "a complete decay"
    with pytest.raises(ScheduleError, match="'v2' ends at step 18 by its plan, and was asked to go on to step 19"):
        optimizer.step()


@pytest.mark.parametrize("paradigm", PARADIGMS[1:])
def test_every_update_of_the_baselines(paradigm: Paradigm) -> None:
    optimizer = sgd()
    first = PathSwitchLR(optimizer, path="v1", paradigm=paradigm, **PARAMS)
    assert train(optimizer, first, 10) == planned("v1", 0, 10, paradigm)
    second = PathSwitchLR(optimizer, path="v2", paradigm=paradigm, **PARAMS)
    start = PLAN.path("v2", paradigm).start_step
    if start:
        second.load_state_dict(first.state_dict())
    assert train(optimizer, second, 18 - start) == planned("v2", start, 18, paradigm)


@pytest.mark.parametrize("shape", SHAPES)
def test_inline_parameters_equal_the_plan_file(shape: str, tmp_path: Path) -> None:
    extra = {"final_lr": 1e-4} if shape == "harmonic" else {}
    inline = {"max_lr": 3e-3, "warmup_steps": 2, "shape": shape, "versions": [{"name": "v1", "steps": 9}]} | extra
    lines = [f"{key} = {json.dumps(value)}" for key, value in inline.items() if key != "versions"]
    plan = tmp_path / "plan.toml"
    plan.write_text("\n".join(["[schedule]", *lines, "[[versions]]", 'name = "v1"', "steps = 9"]))
    lrs = []
    for parameters in ({"plan": str(plan)}, inline):
        optimizer = sgd()
        scheduler = PathSwitchLR(optimizer, **parameters)
        before = train(optimizer, scheduler, 4)
        branch = PathSwitchLR(optimizer, path="v1", **parameters)
        branch.load_state_dict(scheduler.state_dict())
        lrs.append((before, train(optimizer, branch, 5)))
    assert lrs[0] == lrs[1]
    assert len(set(lrs[0][1])) > 1


def test_tensor_lr() -> None:
    weight = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=torch.tensor(0.1))
    scheduler = PathSwitchLR(optimizer, **PARAMS)
    tensor = optimizer.param_groups[0]["lr"]
    used = train(optimizer, scheduler, 5)
    assert used == [float(torch.tensor(lr)) for lr in planned("main", 0, 5)]
    assert optimizer.param_groups[0]["lr"] is tensor, "a captured graph reads this tensor"


@pytest.mark.filterwarnings("ignore:.*does not count")
def test_skipped_updates_do_not_count() -> None:
    """A real gradient scaler; the first update and one in the middle overflow."""
    weight = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scheduler = PathSwitchLR(optimizer, **PARAMS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    used = []
    for factor in (float("inf"), 1.0, 1.0, float("inf"), float("inf"), 1.0, 1.0):
        weight.data.zero_()
        optimizer.zero_grad()
        scaler.scale(weight * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        if factor == 1.0:
            used.append(-float(weight.detach()))
    assert used == [float(torch.tensor(lr)) for lr in planned("main", 0, 4)]
    assert scheduler.last_epoch == 4


def test_a_step_without_an_update_says_that_it_does_not_count() -> None:
    scheduler = PathSwitchLR(sgd(), **PARAMS)
    with pytest.warns(UserWarning, match="does not count"):
        scheduler.step()
    assert scheduler.last_epoch == 0


@pytest.mark.filterwarnings("ignore:.*does not count")
def test_stepped_several_times_an_update() -> None:
    """Accelerate steps a prepared scheduler once per process."""
    optimizer = sgd()
    scheduler = PathSwitchLR(optimizer, **PARAMS)
    used = []
    for _ in range(5):
        used += update(optimizer)
        for _ in range(4):
            scheduler.step()
    assert used == planned("main", 0, 5)


@pytest.mark.parametrize("order", ["optimizer first", "scheduler first", "optimizer before the scheduler is made"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_state_round_trip(order: str, kind: str) -> None:
    def make() -> torch.optim.Optimizer:
        return sgd() if kind == "sgd" else torch.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=7e-4)

    first = make()
    if kind == "adamw":
        first.param_groups[0]["params"][0].grad = torch.ones(2)
    main = PathSwitchLR(first, **PARAMS)
    for _ in range(2):
        first.step()
        main.step()
    buffer = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "scheduler": main.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)

    second = make()
    if order == "optimizer before the scheduler is made":
        second.load_state_dict(saved["optimizer"])
    resumed = PathSwitchLR(second, **PARAMS)
    if order == "optimizer first":
        second.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["scheduler"])
    if order == "scheduler first":
        saved["optimizer"]["param_groups"][0]["lr"] = 0.5
        second.load_state_dict(saved["optimizer"])
    expected = planned("main", 2, 3)
    assert resumed.get_last_lr() == expected == [second.param_groups[0]["lr"]]
    assert resumed.get_last_update_lr() == expected
    if kind == "sgd":
        assert train(second, resumed, 4) == planned("main", 2, 6)


def test_lr_written_by_others_does_not_last() -> None:
    optimizer, scheduler = scheduler_at(5)
    optimizer.param_groups[0]["lr"] = 0.7
    assert update(optimizer) == planned("main", 5, 6)
    assert scheduler.get_last_update_lr() == planned("main", 5, 6)


def test_groups_keep_their_multiples() -> None:
    optimizer = sgd(0.1, 0.01, 0.3)
    scheduler = PathSwitchLR(optimizer, **PARAMS)
    assert scheduler.base_lrs == [multiple * 3e-3 for multiple in (1.0, 0.01 / 0.1, 0.3 / 0.1)]
    for lr in planned("main", 0, 4):
        assert update(optimizer) == [multiple * lr for multiple in (1.0, 0.01 / 0.1, 0.3 / 0.1)]
        scheduler.step()
    again = PathSwitchLR(optimizer, **PARAMS)
    assert again.base_lrs == scheduler.base_lrs, "a second scheduler sees the groups' own LRs, not the scheduled ones"


def test_equal_groups_are_at_max_lr_whatever_the_optimizers_default() -> None:
    optimizer = sgd(0.5, 0.5, default=0.1)
    scheduler = PathSwitchLR(optimizer, **PARAMS)
    assert train(optimizer, scheduler, 2) == [lr for lr in planned("main", 0, 2) for _ in range(2)]


def test_every_group_may_have_a_multiple_of_max_lr() -> None:
    optimizer = sgd(6e-3, 1.5e-3, default=3e-3)
    scheduler = PathSwitchLR(optimizer, **PARAMS)
    assert train(optimizer, scheduler, 5) == [factor * lr for lr in planned("main", 0, 5) for factor in (2.0, 0.5)]


def test_groups_without_a_common_scale_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"default 0\.1 beside param groups with 0\.2, 0\.3"):
        PathSwitchLR(sgd(0.2, 0.3, default=0.1), **PARAMS)
    with pytest.raises(ConfigError, match=r"allowed: max_lr \(0\.003\), or the LR of one of the groups"):
        PathSwitchLR(sgd(0.0, 0.3, default=0.0), **PARAMS)


def test_group_added_afterwards_is_refused() -> None:
    optimizer, _ = scheduler_at(2)
    optimizer.add_param_group({"params": [torch.zeros((), requires_grad=True)]})
    with pytest.raises(ScheduleError, match=r"did not have when PathSwitchLR was made \(with 1 groups\)"):
        optimizer.step()


def test_new_scheduler_takes_the_optimizer_over() -> None:
    optimizer, branch = scheduler_at(7, path="v1")
    main = PathSwitchLR(optimizer, **PARAMS)
    assert train(optimizer, main, 12) == planned("main", 0, 12), "the branch ended at 10 and must not speak up"
    assert branch.last_epoch == 7


def test_step_takes_no_number() -> None:
    optimizer, scheduler = scheduler_at(3)
    update(optimizer)
    with pytest.raises(ScheduleError, match="takes no step number, given 16"):
        scheduler.step(16)
    assert scheduler.last_epoch == 3


def test_type_error_does_not_move_the_counter() -> None:
    class Broken(dict[str, Any]):
        def __setitem__(self, key: str, value: object) -> None:
            raise TypeError("this lr is not a number")

    optimizer, scheduler = scheduler_at(3)
    update(optimizer)
    optimizer.param_groups[0] = Broken(optimizer.param_groups[0])
    for _ in range(2):
        with pytest.raises(TypeError):
            scheduler.step()
        assert scheduler.last_epoch == 3
        assert scheduler.get_last_lr() == planned("main", 3, 4)


def test_branch_that_loads_nothing_is_refused_before_its_first_update() -> None:
    optimizer = sgd()
    PathSwitchLR(optimizer, path="v1", **PARAMS)
    with pytest.raises(ScheduleError, match="starts from a checkpoint of 'main' at step 4"):
        update(optimizer)
    assert not optimizer.param_groups[0]["params"][0].any()


def test_branch_that_forks_at_the_beginning_needs_no_checkpoint() -> None:
    optimizer = sgd()
    versions = [{"name": "v1", "steps": 4, "alpha": 1.0}]
    branch = PathSwitchLR(optimizer, path="v1", max_lr=1e-3, versions=versions)
    assert train(optimizer, branch, 1) == [1e-3]


def test_refused_state_changes_nothing() -> None:
    _, scheduler = scheduler_at(6, path="v1")
    states: list[Any] = [None, {"last_batch_iteration": 5}, "text", scheduler_at(5)[1].state_dict()]
    states += [scheduler.state_dict() | change for change in ({"step": 11}, {"step": 3}, {"format": 9})]
    states.append(scheduler.state_dict() | {"schedule": scheduler.path.fields | {"max_lr": 1.0}})
    for state in states:
        with pytest.raises(ScheduleError):
            scheduler.load_state_dict(state)
        assert scheduler.last_epoch == 6
        assert scheduler.get_last_lr() == planned("v1", 6, 7)


def test_finished_branch_loads_but_does_not_go_on() -> None:
    state = scheduler_at(10, path="v1")[1].state_dict()
    optimizer = sgd()
    again = PathSwitchLR(optimizer, path="v1", **PARAMS)
    again.load_state_dict(state)
    with pytest.raises(ScheduleError, match="give the version more steps in the plan"):
        update(optimizer)


def test_initial_step_stands_in_for_a_foreign_state() -> None:
    optimizer = sgd()
    branch = PathSwitchLR(optimizer, path="v1", initial_step=4, **PARAMS)
    branch.load_state_dict({"last_epoch": 77})
    assert train(optimizer, branch, 6) == planned("v1", 4, 10)
    branch.load_state_dict(branch.state_dict() | {"step": 8})
    assert branch.last_epoch == 8, "its own state is worth more"


def test_variable_selects_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHSWITCH_PATH", "v2")
    assert PathSwitchLR(sgd(), **PARAMS).path.name == "v2"
    monkeypatch.setenv("PATHSWITCH_PATH", "")
    assert PathSwitchLR(sgd(), path="v1", **PARAMS).path.name == "v1"
    monkeypatch.setenv("PATHSWITCH_PATH", "v22")
    with pytest.raises(ConfigError, match="environment variable PATHSWITCH_PATH: given 'v22'"):
        PathSwitchLR(sgd(), **PARAMS)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"plan": 5}, {"plan": ""}, {"max_lr": "1e-3"}, {"max_lr": 1e-3, "path": None}, {"max_lr": float("inf")}]
    + [{"max_lr": 1e-3, "initial_step": value} for value in (-1, 1.0, True, "4")]
    + [{"max_lr": 1e-3, "paradigm": value} for value in (None, 2, "PTFS")]
    + [{"max_lr": 1e-3, "versions": value} for value in (3, "v1", [{}], [{"name": "main", "steps": 3}])],
)
def test_bad_parameters(parameters: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PathSwitchLR(sgd(), **parameters)


def test_wrappers_are_opened() -> None:
    class Wrapper:
        def __init__(self, optimizer: object) -> None:
            self.optimizer = optimizer

    optimizer = sgd()
    assert PathSwitchLR(Wrapper(Wrapper(optimizer)), **PARAMS).optimizer is optimizer
    with pytest.raises(ConfigError, match="PathSwitchLR optimizer: given 'Wrapper'"):
        PathSwitchLR(Wrapper(None), **PARAMS)


def test_it_is_an_ordinary_torch_scheduler() -> None:
    optimizer = sgd()
    scheduler = PathSwitchLR(optimizer, **PARAMS)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)
    assert scheduler.get_lr() == scheduler.get_last_lr() == planned("main", 0, 1)
    scheduler._step_count += 1  # Accelerate, while it accumulates gradients
    compiled = torch.compile(optimizer.step, backend="eager")
    optimizer.param_groups[0]["params"][0].grad = torch.ones((), dtype=torch.float64)
    compiled()
    scheduler.step()
    assert scheduler.last_epoch == 1
