"""The laws that every shape obeys at every scale, and each shape's closed form."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathswitch.errors import ConfigError
from pathswitch.schedule import SHAPES, BranchPath, MainPath, Shape, make_shape

MAX_LR = st.floats(1e-7, 10.0)
STEPS = st.integers(1, 400)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    name = draw(st.sampled_from(sorted(SHAPES)))
    parameters: dict[str, object] = {}
    if name == "polynomial":
        parameters["power"] = draw(st.floats(0.1, 8.0))
    if name == "knee":
        parameters["explore"] = draw(st.floats(0.0, 0.99))
    if name == "multi_step":
        count = draw(st.integers(1, 4))
        inside = st.floats(0.01, 0.99)
        numbers = st.lists(inside, min_size=count, max_size=count, unique=True).map(sorted)
        parameters["milestones"] = tuple(draw(numbers))
        parameters["factors"] = tuple(reversed(draw(numbers)))
    return make_shape(name, parameters)


@st.composite
def branches(draw: st.DrawFn) -> BranchPath:
    max_lr, warmup_steps = draw(MAX_LR), draw(st.integers(0, 50))
    main = MainPath(max_lr, draw(st.floats(0.0, 1.0)) * max_lr, warmup_steps)
    shape = draw(shapes())
    share = draw(st.floats(0.001, 1.0))
    given_lr = (
        None
        if shape.name == "multi_step"
        else share * max_lr
        if shape.name == "harmonic"
        else draw(st.sampled_from([None, 0.0, share * max_lr]))
    )
    final_lr = shape.resolve_final_lr(max_lr, given_lr, "test")
    return BranchPath(main, warmup_steps + draw(st.integers(0, 100)), draw(STEPS), shape, final_lr)


@given(branches())
def test_a_branch_begins_at_the_main_paths_lr_and_ends_at_exactly_final_lr(branch: BranchPath) -> None:
    lr, main = branch.schedule(), branch.main.schedule()
    assert lr(branch.fork_step) == main(branch.fork_step) == branch.main.max_lr
    assert lr(branch.end_step) == branch.final_lr
    assert lr(branch.end_step + 12345) == branch.final_lr
    assert all(lr(step) == main(step) for step in range(branch.fork_step))


@given(branches())
def test_a_branch_never_rises_and_stays_between_its_ends(branch: BranchPath) -> None:
    lr = branch.schedule()
    values = [lr(step) for step in range(branch.fork_step, branch.end_step + 1)]
    assert all(a >= b for a, b in itertools.pairwise(values))
    assert all(branch.final_lr <= value <= branch.main.max_lr for value in values)


@given(shapes())
def test_the_multiplier_runs_from_one_to_zero(shape: Shape) -> None:
    if shape.name in ("harmonic", "multi_step"):
        return  # these two have no multiplier; their closed forms are tested below
    assert shape.multiplier()(0.0) == 1.0
    assert shape.multiplier()(1.0) == 0.0


def closed_forms(x: float) -> dict[str, float]:
    return {
        "linear": 1 - x,
        "cosine": (1 + math.cos(math.pi * x)) / 2,
        "one_minus_sqrt": 1 - x**0.5,
        "exponential": 2 * math.exp(-math.log(2) * x) - 1,
        "polynomial": (1 - x) ** 2,
        "knee": min(1.0, 2 * (1 - x)),
    }


@pytest.mark.parametrize("name", sorted(closed_forms(0.5)))
@pytest.mark.parametrize("final_lr", [0.0, 1e-4])
def test_closed_form(name: str, final_lr: float) -> None:
    lr = BranchPath(MainPath(3e-3), 1000, 64, make_shape(name, {}), final_lr).schedule()
    for step in range(1001, 1064):
        expected = final_lr + (3e-3 - final_lr) * closed_forms((step - 1000) / 64)[name]
        assert lr(step) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_harmonic_is_linear_in_the_inverse_lr() -> None:
    lr = BranchPath(MainPath(1e-2), 0, 10, make_shape("harmonic", {}), 1e-3).schedule()
    inverses = [1 / lr(step) for step in range(11)]
    assert inverses == pytest.approx([100 + 90 * step for step in range(11)], rel=1e-12)


def test_multi_step_drops_to_its_factors_at_its_milestones() -> None:
    lr = BranchPath(MainPath(1e-2), 0, 100, make_shape("multi_step", {}), 1e-3).schedule()
    assert lr(79) == 1e-2
    assert lr(80) == lr(89) == 1e-2 * 0.316
    assert lr(90) == lr(99) == lr(100) == 1e-2 * 0.1


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("cosine", {"power": 2.0}, "no parameters beside shape 'cosine'"),
        ("polynomial", {"power": 0.0}, "power > 0"),
        ("polynomial", {"power": math.nan}, "power > 0"),
        ("knee", {"explore": 1.0}, "0 <= explore < 1"),
        ("multi_step", {"milestones": (0.9, 0.8)}, "rising shares"),
        ("multi_step", {"milestones": (0.5, 1.0)}, "rising shares"),
        ("multi_step", {"factors": (0.1, 0.316)}, "falling factors"),
        ("multi_step", {"factors": (0.5,)}, "2 falling factors"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(name: str, parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_shape(name, parameters)


def test_final_lr_belongs_to_its_shape() -> None:
    with pytest.raises(ConfigError, match="cannot reach 0"):
        make_shape("harmonic", {}).resolve_final_lr(1e-3, None, "[schedule]")
    with pytest.raises(ConfigError, match="no final_lr"):
        make_shape("multi_step", {}).resolve_final_lr(1e-3, 1e-4, "[schedule]")
    with pytest.raises(ConfigError, match="final_lr <= max_lr"):
        make_shape("cosine", {}).resolve_final_lr(1e-3, 2e-3, "[schedule]")
