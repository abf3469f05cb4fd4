"""PathSwitchAdamW in the place of Megatron's Adam: Megatron core's on two ranks, and refusals.

The ranks are data-parallel, or share a model: tensor-, pipeline- or expert-parallel.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import core_ranks
import pytest
import torch

from pathswitch.config import build_plan, load_plan_file
from pathswitch.errors import CheckpointError, ConfigError, UpstreamError
from pathswitch_megatron.activation import hook_into
from pathswitch_megatron.job import job_from_environment
from pathswitch_megatron.optimizer import FusedAdam, owner_of
from pathswitch_megatron.optimizer_hooks import replace_optimizer

PLAN = """
[schedule]
max_lr = 1e-3
warmup_steps = 3

[[versions]]
name = "v1"
steps = 40
decay_steps = 17

[megatron]
optimizer = "pathswitch"
"""
Outcomes = dict[tuple[str, ...], list[dict[str, Any]]]
SAVE_AT, END = 5, 10
KINDS = ("fp32", "bf16", "distributed", "precision_aware")
STOCK = {"optimizer": "stock"}
# Job -> what it does; in this order, so that what is loaded has been saved. Megatron core has no precision-aware
# optimizer without Transformer Engine.
JOBS: dict[str, dict[str, Any]] = {
    "stock": {**STOCK, "save": "stock", "save_at": SAVE_AT},
    "ours": {"save": "ours", "save_at": SAVE_AT},
    "clipped by Megatron": {"clipping": "unknown"},
    "ours resumed": {"load": "ours"},
    "ours from stock": {"load": "stock"},
    "stock from ours": {**STOCK, "load": "ours", "save": "back", "save_at": 8},
    "ours from back": {"load": "back"},
    "resharded": {"sharding": "fully_reshardable", "save": "resharded", "save_at": SAVE_AT},
    "from resharded": {"sharding": "fully_reshardable", "load": "resharded"},
}
REFUSED = {
    "sgd": ({"kind_of_optimizer": "sgd"}, "--optimizer: given 'sgd'; allowed: adam"),
    "L2": ({"decoupled_weight_decay": False}, "adam_w_mode: given False; allowed: True"),
}
# Losses of ours and of torch's AdamW: weights differ by rounding, in bfloat16 by the last of 8 bits here and there.
BOUNDS = {"fp32": 2e-6, "bf16": 3e-4, "distributed": 3e-4}
# How two ranks share a model, and what they do with it. With tied embeddings the first and the last pipeline stage both
# hold the one weight.
LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"parallel": {"tensor": 2}},
    "pipeline": {"parallel": {"pipeline": 2}},
    "expert": {"parallel": {"expert": 2}, "experts": 2},
}
FP16 = ("fp16", "fp16 distributed")
SHARED_KINDS = ("fp32", "distributed", "precision_aware", *FP16)  # fp16's optimizer is bf16's, with a loss scale
CLIP = 0.25


def names_of(kind: str) -> list[str]:
    if kind == "precision_aware":
        return ["ours", "clipped by Megatron", "ours resumed"]
    # With the distributed optimizer, torch's AdamW shares one step tensor after any load, and counts in it for each
    # parameter: what it does then is nothing to compare with, and nothing to go on from.
    other = "ours from back" if kind == "distributed" else "resharded"
    return [name for name in JOBS if other not in name]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What all ranks say of each (kind, job)."""
    folder = tmp_path_factory.mktemp("optimizer")
    jobs: dict[tuple[str, ...], dict[str, Any]] = {}
    for kind in KINDS:
        for name in names_of(kind):
            job = JOBS[name]
            folders = {key: f"{kind} {job[key]}" for key in ("save", "load") if key in job}
            jobs[kind, name] = {"kind": kind, "until": END, **job, **folders}
    for name, (settings, _) in REFUSED.items():
        jobs["refused", name] = {"kind": "fp32", "until": END, **settings}
    precise = {"kind": "precision_aware", "until": 2}
    jobs["remainders", "saved"] = {**precise, "remainders": True, "save": "remainders", "save_at": 1}
    jobs["remainders", "loaded"] = {**precise, "load": "remainders"}
    return train(folder, jobs)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """What both ranks say of each (layout, kind, job)."""
    jobs: dict[tuple[str, ...], dict[str, Any]] = {}
    whole = {"tied": True, "until": END, "sharding": "fully_reshardable"}
    for kind in SHARED_KINDS[:3]:
        jobs["data", kind, "ours"] = {**whole, "kind": kind, "save": f"{kind} whole", "save_at": SAVE_AT}
    for layout, kind in product(LAYOUTS, SHARED_KINDS):
        common = {**LAYOUTS[layout], "kind": kind, "tied": True, "until": 5 if kind in FP16 else 4}
        jobs[layout, kind, "ours"] = {**common, "save": f"{layout} {kind}", "save_at": 2}
        jobs[layout, kind, "ours resumed"] = {**common, "load": f"{layout} {kind}"}
        jobs[layout, kind, "clipped by Megatron"] = {**common, "clipping": "unknown"}
        if kind != "precision_aware":
            jobs[layout, kind, "stock"] = {**common, **STOCK}
        if ("data", kind, "ours") in jobs and layout != "expert":
            jobs[layout, kind, "from data"] = {**whole, **LAYOUTS[layout], "kind": kind, "load": f"{kind} whole"}
    return train(tmp_path_factory.mktemp("shared"), jobs)


def train(folder: Path, jobs: dict[tuple[str, ...], dict[str, Any]]) -> Outcomes:
    """Return what both ranks say of each job."""
    (folder / "plan.toml").write_text(PLAN)
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    result = core_ranks.run(
        "worker_core_optimizer.py", "jobs.json", folder=folder, ranks=2, extra={"PATHSWITCH_PLAN": "plan.toml"}
    )
    assert result.returncode == 0, result.output[-4000:]
    ranks = [json.loads((folder / f"jobs-rank{rank}.json").read_text()) for rank in range(2)]
    return dict(zip(jobs, map(list, zip(*ranks, strict=True)), strict=True))


def losses(outcome: dict[str, Any]) -> list[float]:
    return [loss for _, loss, _, _ in outcome["steps"]]


def norms(outcome: dict[str, Any]) -> list[float]:
    return [norm for _, _, norm, success in outcome["steps"] if success]


def digests(ranks: list[dict[str, Any]], when: str) -> list[str]:
    return [rank["digests"][when] for rank in ranks]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_clipping_in_the_update_has_megatrons_bits(outcomes: Any, kind: str) -> None:
    assert_same_bits(outcomes[kind, "ours"], outcomes[kind, "clipped by Megatron"])


def assert_same_bits(ours: list[dict[str, Any]], apart: list[dict[str, Any]]) -> None:
    """Every update of both is clipped, ours in it, and nothing else tells them apart."""
    for rank in ours:
        expected = [CLIP / (norm + 1e-6) for norm in norms(rank)]
        assert 0 < max(expected) < 0.85
        assert rank["coefficients"] == [expected] * len(rank["coefficients"]) != []
    assert not any(coefficients for rank in apart for coefficients in rank["coefficients"])
    assert [rank["steps"] for rank in ours] == [rank["steps"] for rank in apart], "losses and norms"
    assert digests(ours, "end") == digests(apart, "end")


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOUNDS)
def test_losses_are_those_of_torchs_adamw(outcomes: Any, kind: str) -> None:
    stock, ours = outcomes[kind, "stock"][0], outcomes[kind, "ours"][0]
    assert (stock["optimizer"], ours["optimizer"]) == ("torch.optim.adamw", "pathswitch_megatron.optimizer")
    assert losses(ours) == pytest.approx(losses(stock), rel=BOUNDS[kind])
    assert losses(ours)[0] == losses(stock)[0], "before the first update"
    assert losses(ours) != pytest.approx([losses(ours)[0]] * END, rel=5e-4), "the loss moves by more than the bound"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_state_is_transformer_engines(outcomes: Any, kind: str) -> None:
    names = ["exp_avg", "exp_avg_sq"] + ["master_param"] * (kind == "precision_aware")
    for name in set(names_of(kind)) - {"stock", "stock from ours"}:
        assert [rank["state"] for rank in outcomes[kind, name]] == [names] * 2, name
        assert [rank["counted"] for rank in outcomes[kind, name]] == [[END]] * 2, name


@pytest.mark.slow
def test_precision_aware_has_the_bits_of_megatrons_own_master_weights(outcomes: Any) -> None:
    precise, usual = outcomes["precision_aware", "ours"], outcomes["distributed", "ours"]
    assert digests(precise, "end") == digests(usual, "end"), "weights, master weights and moments"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_update_uses_the_plans_lr(outcomes: Any, kind: str, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    lr = build_plan(load_plan_file(tmp_path / "plan.toml")).path("main").lr
    for name in names_of(kind):
        used = [lr for lr, _, _, _ in outcomes[kind, name][0]["steps"]]
        assert used == [lr(step) for step in range(END - len(used), END)], name


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_is_the_same_bits(outcomes: Any, kind: str) -> None:
    pairs = [("ours", "ours resumed")] + [("resharded", "from resharded")] * (kind == "distributed")
    for whole, resumed in pairs:
        assert digests(outcomes[kind, resumed], "loaded") == digests(outcomes[kind, whole], "saved")
        assert digests(outcomes[kind, resumed], "end") == digests(outcomes[kind, whole], "end")


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOUNDS)
def test_checkpoints_go_from_stock_to_ours_and_back(outcomes: Any, kind: str) -> None:
    pairs = {"ours from stock": "stock", "stock from ours": "ours", "ours from back": "stock from ours"}
    for loaded in pairs.keys() & names_of(kind):
        assert digests(outcomes[kind, loaded], "loaded") == digests(outcomes[kind, pairs[loaded]], "saved"), loaded
    stock = losses(outcomes[kind, "stock"][0])
    assert losses(outcomes[kind, "ours from stock"][0]) == pytest.approx(stock[SAVE_AT:], rel=BOUNDS[kind])
    if kind != "distributed":
        assert losses(outcomes[kind, "stock from ours"][0]) == pytest.approx(stock[SAVE_AT:], rel=BOUNDS[kind])
        assert losses(outcomes[kind, "ours from back"][0]) == pytest.approx(stock[8:], rel=BOUNDS[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED_KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_one_model_have_megatrons_bits(shared: Outcomes, layout: str, kind: str) -> None:
    ours, apart = shared[layout, kind, "ours"], shared[layout, kind, "clipped by Megatron"]
    assert_same_bits(ours, apart)
    assert [len(rank["coefficients"]) for rank in ours] == [2 if layout == "expert" else 1] * 2, "of chained optimizers"
    assert ours[0]["steps"] == ours[1]["steps"], "one norm for both"
    assert ours[0]["replicated"] == ours[1]["replicated"], "weights that both have"
    assert ours[0]["digests"] != ours[1]["digests"], "those that one has"
    resumed = shared[layout, kind, "ours resumed"]
    assert digests(resumed, "loaded") == digests(ours, "saved")
    assert digests(resumed, "end") == digests(ours, "end")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in SHARED_KINDS if kind != "precision_aware"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_of_one_model_have_stocks_norms(shared: Outcomes, layout: str, kind: str) -> None:
    stock, ours = shared[layout, kind, "stock"], shared[layout, kind, "ours"]
    assert stock[0]["replicated"] == stock[1]["replicated"] != ours[0]["replicated"]
    for theirs, own in zip(stock, ours, strict=True):
        assert (theirs["optimizer"], own["optimizer"]) == ("torch.optim.adamw", "pathswitch_megatron.optimizer")
        assert (losses(own)[0], norms(own)[0]) == (losses(theirs)[0], norms(theirs)[0]), "before the first update"
        assert losses(own) == pytest.approx(losses(theirs), rel=BOUNDS.get(kind, 3e-4))
        assert norms(own) == pytest.approx(norms(theirs), rel=10 * BOUNDS.get(kind, 3e-4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SHARED_KINDS[:3])
@pytest.mark.parametrize("layout", ["tensor", "pipeline"])
def test_ranks_of_one_model_go_on_as_data_parallel_ones(shared: Outcomes, layout: str, kind: str) -> None:
    """The norm counts each gradient once, whichever ranks have it."""
    whole, ours = shared["data", kind, "ours"][0], shared[layout, kind, "from data"][0]
    assert losses(ours) == pytest.approx(losses(whole)[SAVE_AT:], rel=BOUNDS.get(kind, 3e-4))
    assert norms(ours) == pytest.approx(norms(whole)[SAVE_AT:], rel=10 * BOUNDS.get(kind, 3e-4))
    assert ours["counted"] == [END]


@pytest.mark.slow
@pytest.mark.parametrize("kind", FP16)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_that_overflow_are_left_out(shared: Outcomes, layout: str, kind: str) -> None:
    (made,) = {tuple(success for *_, success in rank["steps"]) for rank in shared[layout, kind, "stock"]}
    assert False in made[made.index(True) :], "one behind an update"
    for rank in shared[layout, kind, "ours"]:
        assert tuple(success for *_, success in rank["steps"]) == made
        assert rank["counted"] == [made.count(True)]


@pytest.mark.slow
def test_remainders_in_a_checkpoint_are_refused_before_the_first_update(outcomes: Any) -> None:
    for rank in outcomes["remainders", "loaded"]:
        assert rank["error"].startswith("CheckpointError: master_param does not round to the model's weights")


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_other_optimizers_are_refused_on_all_ranks(outcomes: Any, name: str) -> None:
    for rank in outcomes["refused", name]:
        assert rank["error"].startswith("ConfigError: Megatron with [megatron] optimizer = 'pathswitch': ")
        assert rank["error"].endswith(REFUSED[name][1])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"amsgrad": True}, "amsgrad: given True; allowed: False"),
        ({"adam_w_mode": False}, "adam_w_mode: given False; allowed: True"),
        ({"bias_correction": False}, "bias_correction: given False; allowed: True"),
        ({"capturable": True}, "capturable: given True; allowed: False"),
        ({"exp_avg_dtype": torch.uint8}, r"exp_avg_dtype: given torch\.uint8; allowed: torch\.float32"),
        ({"exp_avg_sq_dtype": torch.float16}, r"exp_avg_sq_dtype: given torch\.float16; allowed: torch\.float32"),
        ({"master_weight_dtype": torch.float16}, r"master_weight_dtype: given torch\.float16; allowed: torch\.float32"),
        (
            {"store_param_remainders": True, "master_weights": True},
            "store_param_remainders: given True; allowed: False",
        ),
        ({"set_grad_none": True}, "set_grad_none: given True; allowed: None"),
        ({"fused": True}, "given 'fused'; allowed: lr, betas"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_are_refused(option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FusedAdam([torch.zeros(3, requires_grad=True)], **option)


def reference(**options: Any) -> tuple[torch.Tensor, FusedAdam]:
    p = torch.arange(5, dtype=options.pop("dtype", torch.float32)).requires_grad_()
    return p, FusedAdam([p], lr=0.1, weight_decay=0.01, backend="reference", **options)


def test_low_precision_needs_master_weights() -> None:
    p, optimizer = reference(dtype=torch.bfloat16)
    p.grad = torch.ones_like(p)
    with pytest.raises(ConfigError, match=r"given torch\.bfloat16; allowed: float32 parameters, or master_weights"):
        optimizer.step()


def test_remainders_of_master_weights_are_not_taken_for_weights() -> None:
    p, optimizer = reference(dtype=torch.bfloat16, master_weights=True, use_decoupled_grad=True)
    optimizer.initialize_state(p)
    with pytest.raises(CheckpointError, match=r"master_param of torch\.int16"):
        optimizer.set_scaled_state(p, "master_param", torch.zeros(5, dtype=torch.int16))


def test_coefficient_holds_for_one_update() -> None:
    (p, optimizer), (q, other) = reference(), reference()
    for step in range(2):
        p.grad, q.grad = torch.full_like(p, 3.0), torch.full_like(q, 3.0 * (0.5 if step == 0 else 1.0))
        if step == 0:
            optimizer.clip_next(0.5)
        optimizer.step()
        other.step()
    assert torch.equal(p, q)
    optimizer.clip_next(0.5)
    optimizer.clip_next(1.5)  # the gradients that 0.5 was for were dropped
    optimizer.step()
    other.step()
    assert torch.equal(p, q)
    optimizer.clip_next(0.5)
    optimizer.zero_grad()
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    optimizer.step()
    other.step()
    assert torch.equal(p, q)
    assert optimizer.param_groups[0]["step"] == 4


def test_decoupled_gradients_of_another_type_and_float32_parameters_beside() -> None:
    p, optimizer = reference(dtype=torch.bfloat16, master_weights=True, use_decoupled_grad=True)
    q, other = reference()
    f = torch.ones(3).requires_grad_()
    optimizer.add_param_group({"params": [f]})
    p.decoupled_grad, q.grad = torch.full((5,), 0.3), torch.full((5,), 0.3)  # type: ignore[attr-defined]
    f.decoupled_grad = torch.ones(3)  # type: ignore[attr-defined]
    optimizer.step()
    other.step()
    assert torch.equal(optimizer.get_unscaled_state(p, "master_param"), q)
    assert torch.equal(p, q.bfloat16())
    assert torch.equal(f, optimizer.get_unscaled_state(f, "master_param")) and f[0] < 1
    optimizer.zero_grad()
    assert p.decoupled_grad is None  # type: ignore[attr-defined]


def test_all_parameters_or_none_are_clipped_in_the_update() -> None:
    p, optimizer = reference()
    f = torch.ones(3).requires_grad_()
    optimizer.add_param_group({"params": [f]})
    assert owner_of([p, f]) is optimizer
    assert owner_of([p]) is owner_of([f, p]) is None


@pytest.mark.parametrize("module", ["megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"])
def test_unknown_megatron_is_refused_by_the_name_looked_for(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    symbols = ("Adam", "USING_PYTORCH_OPTIMIZER", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER")
    for name in ("megatron.core.optimizer", "megatron.core.optimizer.distrib_optimizer"):
        stub = ModuleType(name)
        vars(stub).update(dict.fromkeys(symbols if name != module else symbols[1:]))
        monkeypatch.setitem(sys.modules, name, stub)
    with pytest.raises(UpstreamError, match=rf"looked for {module}\.Adam, which is not there.*0\.15 to 0\.20"):
        replace_optimizer()


def test_the_plan_says_which(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATHSWITCH_PLAN", str(tmp_path))
    for text, optimizer in ((PLAN, "pathswitch"), (PLAN.replace("optimizer", "#"), "megatron")):
        (tmp_path / "plan.toml").write_text(text)
        assert job_from_environment().optimizer == optimizer
    (tmp_path / "plan.toml").write_text(PLAN.replace('"pathswitch"', '"adam"'))
    with pytest.raises(ConfigError, match="optimizer"):
        job_from_environment()


def test_under_deepspeed_the_ds_config_names_the_optimizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATHSWITCH_PLAN", str(tmp_path))
    (tmp_path / "plan.toml").write_text(PLAN)
    with pytest.raises(
        ConfigError, match=r"\[megatron\] optimizer: given 'pathswitch'; allowed: megatron: .*ds_config"
    ):
        hook_into(ModuleType("megatron.training"))
