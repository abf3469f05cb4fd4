"""The plan's LR inside the real OptimizerParamScheduler of the installed Megatron core."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from pathswitch.checkpoint import CheckpointSettings
from pathswitch.config import plan_from_params
from pathswitch.errors import ConfigError, ScheduleError
from pathswitch.integrations.megatron_settings import STATE_KEY
from pathswitch.integrations.scheduler import PathSwitchLR
from pathswitch.versions import Plan
from pathswitch_megatron.batches import constant_batches, rampup_batches
from pathswitch_megatron.hooks import MegatronBridgeHooks
from pathswitch_megatron.job import Job
from pathswitch_megatron.scheduler import follow_plan

MAX_LR, BATCH = 3e-4, 24
MEGATRONS_NAME = {"linear": "linear", "cosine": "cosine", "one_minus_sqrt": "minus_sqrt", "exponential": "exponential"}


def plan_of(shape: str = "cosine", **schedule: Any) -> Plan:
    versions = [{"name": "v1", "steps": 40, "decay_steps": 17}, {"name": "v2", "steps": 30, "decay_steps": 13}]
    return plan_from_params({"max_lr": MAX_LR, "shape": shape, "versions": versions, **schedule})


def optimizer_of(*groups: dict[str, Any]) -> Any:
    groups = groups or ({},)
    return SimpleNamespace(param_groups=[{"lr": 0.0, "weight_decay": 0.0, **group} for group in groups])


def scheduler_of(optimizer: Any, **values: Any) -> Any:
    """A stock scheduler, as Megatron's builder makes it from arguments that have nothing to do with the plan."""
    stock = {
        "init_lr": 0.0,
        "max_lr": MAX_LR,
        "min_lr": 1e-5,
        "lr_warmup_steps": 2 * BATCH,
        "lr_decay_steps": 1000 * BATCH,
        "lr_decay_style": "cosine",
        "start_wd": 0.1,
        "end_wd": 0.1,
        "wd_incr_steps": 1000 * BATCH,
        "wd_incr_style": "constant",
        "use_checkpoint_opt_param_scheduler": False,
    }
    return OptimizerParamScheduler(optimizer, **{**stock, **values})


def following(plan: Plan, path: str, optimizer: Any = None, **values: Any) -> Any:
    scheduler = scheduler_of(optimizer or optimizer_of(), **values)
    follow_plan(scheduler, plan, plan.path(path), constant_batches(BATCH))
    return scheduler


def used_lrs(scheduler: Any, updates: int, group: int = 0) -> list[float]:
    """The LR that stands in a param group at each update."""
    lrs = []
    for _ in range(updates):
        scheduler.before_update()
        lrs.append(scheduler.optimizer.param_groups[group]["lr"])
        scheduler.step(BATCH)
    return lrs


def at_step(scheduler: Any, step: int, plan: Plan, path: str = "main") -> Any:
    """Put a scheduler where a checkpoint of ``path`` at ``step`` would."""
    source = following(plan, path if plan.path(path).parent is None else "main")
    for _ in range(step):
        source.step(BATCH)
    scheduler.load_state_dict(source.state_dict())
    return scheduler


@pytest.mark.parametrize("shape", MEGATRONS_NAME)
@pytest.mark.parametrize("group", [{}, {"max_lr": 1e-4, "min_lr": 2e-5}], ids=["plain", "own max_lr"])
def test_branch_equals_megatrons_own_wsd(shape: str, group: dict[str, float]) -> None:
    plan = plan_of(shape)
    branch = plan.path("v2")
    wsd = scheduler_of(
        optimizer_of({**group, **({"min_lr": 0.0} if group else {})}),
        min_lr=0.0,
        lr_warmup_steps=0,
        lr_decay_style="WSD",
        lr_decay_steps=branch.end_step * BATCH,
        wsd_decay_steps=branch.steps * BATCH,
        lr_wsd_decay_style=MEGATRONS_NAME[shape],
    )
    stock = []
    for _ in range(branch.end_step):
        stock.append(wsd.optimizer.param_groups[0]["lr"])
        wsd.step(BATCH)
    scheduler = at_step(following(plan, "v2", optimizer_of(group)), branch.start_step, plan)
    assert used_lrs(scheduler, branch.steps) == stock[branch.start_step :]
    assert stock[branch.start_step] == group.get("max_lr", MAX_LR)
    assert scheduler.optimizer.param_groups[0]["lr"] == 0.0, "whatever the group's min_lr says"


@pytest.mark.parametrize("schedule", [{}, {"final_lr": 3e-5}, {"warmup_steps": 7, "init_lr": 1e-6}])
@pytest.mark.parametrize("shape", ["cosine", "knee", "polynomial"])
def test_same_bits_as_under_deepspeed(shape: str, schedule: dict[str, Any]) -> None:
    plan = plan_of(shape, **schedule)
    versions = [{"name": v.name, "steps": v.steps, "decay_steps": v.decay_steps} for v in plan.versions]
    params = {"max_lr": MAX_LR, "shape": shape, "versions": versions, **schedule}
    for path in ("main", "v1"):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([parameter], lr=MAX_LR)
        other = PathSwitchLR(optimizer, path=path, **params)
        start_step, steps = plan.path(path).start_step, 17
        state = PathSwitchLR(torch.optim.SGD([parameter], lr=MAX_LR), **params).state_dict()
        other.load_state_dict({**state, "step": start_step})
        expected = []
        for _ in range(steps):
            parameter.grad = torch.ones(1)
            optimizer.step()
            expected.append(other.get_last_update_lr()[0])
            other.step()
        assert used_lrs(at_step(following(plan, path), start_step, plan), steps) == expected


def test_groups_scale_as_a_whole() -> None:
    plan = plan_of("linear", final_lr=3e-5, init_lr=1e-5, warmup_steps=4)
    optimizer = optimizer_of({}, {"max_lr": MAX_LR / 2, "min_lr": 0.0}, {"max_lr": MAX_LR, "min_lr": 1e-9})
    scheduler = at_step(following(plan, "v1", optimizer), 23, plan)
    for _ in range(17):
        scheduler.before_update()
        base, half, same = (group["lr"] for group in optimizer.param_groups)
        assert base == same == pytest.approx(2 * half, rel=1e-15)
        scheduler.step(BATCH)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-5, 1.5e-5, 3e-5]


def test_lr_in_a_tensor_is_filled() -> None:
    plan = plan_of()
    optimizer = optimizer_of({"lr": torch.tensor(0.0, dtype=torch.float64)})
    tensor = optimizer.param_groups[0]["lr"]
    scheduler = following(plan, "main", optimizer)
    if optimizer.param_groups[0]["lr"] is not tensor:
        pytest.skip("needs Megatron core 0.18 or newer, whose own scheduler fills a tensor; older ones replace it")
    scheduler.step(BATCH)
    assert float(tensor) == plan.path("main").lr(1)


def test_weight_decay_stays_megatrons() -> None:
    values = {"start_wd": 0.0, "end_wd": 0.2, "wd_incr_style": "linear", "wd_incr_steps": 40 * BATCH}
    groups = ({}, {"wd_mult": 0.0})
    stock, ours = (
        scheduler_of(optimizer_of(*groups), **values),
        following(plan_of(), "main", optimizer_of(*groups), **values),
    )
    for _ in range(40):
        ours.before_update()
        assert [g["weight_decay"] for g in ours.optimizer.param_groups] == [
            g["weight_decay"] for g in stock.optimizer.param_groups
        ]
        stock.step(BATCH)
        ours.step(BATCH)


def test_weight_decay_of_a_checkpoint_is_compared_as_ever() -> None:
    state = following(plan_of(), "main").state_dict()
    with pytest.raises(AssertionError, match="weight decay"):
        following(plan_of(), "main", start_wd=0.2, end_wd=0.2).load_state_dict(state)
    following(plan_of(), "main", wd_incr_steps=7 * BATCH).load_state_dict(state)  # a constant has no end


class TestClock:
    """The LR of an iteration follows from the samples consumed before it."""

    def scheduler(self, consumed: list[int]) -> Any:
        plan, scheduler = plan_of(warmup_steps=10), scheduler_of(optimizer_of())
        follow_plan(scheduler, plan, plan.path("main"), constant_batches(BATCH), lambda: consumed[0])
        return scheduler

    def test_skipped_iterations_do_not_stop_the_clock(self) -> None:
        consumed = [0]
        scheduler, lr = self.scheduler(consumed), plan_of(warmup_steps=10).path("main").lr
        for iteration in range(10):
            scheduler.before_update()
            assert scheduler.optimizer.param_groups[0]["lr"] == lr(iteration)
            if iteration not in (2, 3, 7):  # Megatron does not step the scheduler where it skips the update
                scheduler.step(BATCH)
                assert scheduler.optimizer.param_groups[0]["lr"] == lr(iteration + 1)
            consumed[0] += BATCH

    def test_batch_size_rampup(self) -> None:
        consumed, plan, scheduler = [0], plan_of(warmup_steps=10), scheduler_of(optimizer_of())
        batches = rampup_batches(8, 8, 64, 24)
        follow_plan(scheduler, plan, plan.path("v1"), batches, lambda: consumed[0])
        consumed[0] = batches.samples_after(23)
        for step in range(23, 40):
            scheduler.before_update()
            assert scheduler.optimizer.param_groups[0]["lr"] == plan.path("v1").lr(step)
            size = batches.samples_after(step + 1) - batches.samples_after(step)
            scheduler.step(size)
            consumed[0] += size
        assert scheduler.optimizer.param_groups[0]["lr"] == 0.0

    def test_samples_between_two_steps_are_refused(self) -> None:
        with pytest.raises(ScheduleError, match=r"25 samples consumed: .* ends at 24 and at 48"):
            self.scheduler([25]).before_update()

    def test_a_branch_goes_no_further_than_its_end(self) -> None:
        scheduler = at_step(following(plan_of(), "v1"), 23, plan_of())
        used_lrs(scheduler, 17)
        with pytest.raises(ScheduleError, match="'v1' ends at step 40 by its plan, and was asked to go on to step 41"):
            scheduler.before_update()

    def test_a_branch_does_not_begin_before_its_fork(self) -> None:
        with pytest.raises(ScheduleError, match="'v1' starts from a checkpoint of 'main' at step 23"):
            following(plan_of(), "v1").before_update()


class TestState:
    """What a checkpoint keeps, and what may go on from it."""

    def test_resume_needs_no_override(self) -> None:
        """Megatron would refuse other decay arguments than the checkpoint's without --override-opt_param-scheduler."""
        plan = plan_of()
        state = at_step(following(plan, "main"), 31, plan).state_dict()
        other = following(
            plan, "main", lr_decay_style="linear", lr_decay_steps=7 * BATCH, min_lr=0.0, lr_warmup_steps=0
        )
        other.load_state_dict(json.loads(json.dumps(state)))
        assert other.last_epoch == 31 and other.num_steps == 31 * BATCH
        other.load_state_dict(state)
        assert other.num_steps == 31 * BATCH, "loading twice counts once"

    def test_stock_megatron_loads_it(self) -> None:
        plan = plan_of()
        ours = at_step(following(plan, "main"), 31, plan)
        stock, control = scheduler_of(optimizer_of()), scheduler_of(optimizer_of())
        stock.load_state_dict(ours.state_dict())
        control.step(31 * BATCH)
        assert stock.optimizer.param_groups == control.optimizer.param_groups
        assert ours.state_dict().keys() - stock.state_dict().keys() == {STATE_KEY}

    @pytest.mark.parametrize(
        ("path", "source", "step", "message"),
        [
            ("v1", "main", 22, "forks from 'main' at step 23, but the checkpoint stands at step 22"),
            ("v2", "main", 23, "forks from 'main' at step 57, but the checkpoint stands at step 23"),
            ("main", "v1", 30, "belongs to path 'v1'"),
            ("v2", "v1", 30, "belongs to path 'v1'"),
        ],
    )
    def test_other_checkpoints_are_refused(self, path: str, source: str, step: int, message: str) -> None:
        plan = plan_of()
        state = following(plan, "main").state_dict()
        ours = {**json.loads(state[STATE_KEY]), "step": step, "path": source, "schedule": plan.path(source).fields}
        with pytest.raises(ScheduleError, match=message):
            following(plan, path).load_state_dict({**state, STATE_KEY: json.dumps(ours)})

    def test_another_schedule_is_refused_field_by_field(self) -> None:
        state = following(plan_of(warmup_steps=3), "main").state_dict()
        with pytest.raises(ScheduleError, match="warmup_steps: checkpoint 3, plan 5"):
            following(plan_of(warmup_steps=5), "main").load_state_dict(state)

    def test_state_of_stock_megatron(self) -> None:
        stock = scheduler_of(optimizer_of())
        stock.step(23 * BATCH)
        scheduler = following(plan_of(), "v1")
        with pytest.raises(ScheduleError, match=r"the state of another scheduler .*num_steps.*adopt"):
            scheduler.load_state_dict(stock.state_dict())
        scheduler.vouched_step = 23  # by its manifest
        scheduler.load_state_dict(stock.state_dict())
        assert scheduler.last_epoch == 23

    def test_samples_of_another_batch_size_are_noticed(self) -> None:
        plan, scheduler, consumed = plan_of(), scheduler_of(optimizer_of()), [31 * 2 * BATCH]
        follow_plan(scheduler, plan, plan.path("main"), constant_batches(BATCH), lambda: consumed[0])
        state = following(plan, "main").state_dict()
        ours = {**json.loads(state[STATE_KEY]), "step": 31}
        scheduler.load_state_dict({**state, STATE_KEY: json.dumps(ours)})
        with pytest.raises(ScheduleError, match=r"step 31 .* has 744 samples behind it .* has consumed 1488"):
            scheduler.check_samples()


def test_another_lr_than_the_plans_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--lr: given 0.001; allowed: 0.0003, the plan's max_lr"):
        following(plan_of(), "main", max_lr=1e-3)


def test_megatron_bridge_gets_the_lr() -> None:
    plan = plan_of("linear")
    job = Job(plan, plan.path("v1"), Path("run"), CheckpointSettings(), None, global_batch_size=BATCH)
    scheduler = MegatronBridgeHooks(job).get_scheduler(lambda: scheduler_of(optimizer_of()), {})
    at_step(scheduler, 23, plan)
    lrs = []
    for _ in range(17):  # Bridge's loop knows nothing of the plan: it steps after each update
        lrs.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.step(BATCH)
    assert lrs == [plan.path("v1").lr(step) for step in range(23, 40)]
    with pytest.raises(ConfigError, match="global_batch_size: given None"):
        MegatronBridgeHooks(replace(job, global_batch_size=None)).get_scheduler(lambda: None, {})
