"""Main path, from-scratch runs, and what identifies a path."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathswitch.errors import ConfigError
from pathswitch.schedule import BranchPath, ConstantRun, DecayRun, MainPath, digest, make_shape

COSINE = make_shape("cosine", {})


@given(st.floats(1e-6, 1.0), st.floats(0.0, 1.0), st.integers(0, 300))
def test_warm_up_rises_to_exactly_max_lr_and_stays(max_lr: float, share: float, warmup_steps: int) -> None:
    lr = MainPath(max_lr, share * max_lr, warmup_steps).schedule()
    values = [lr(step) for step in range(warmup_steps)]
    assert values == sorted(values)
    assert [lr(step) for step in (max(0, warmup_steps - 1), warmup_steps, 10**12)] == [max_lr] * 3
    for step, value in enumerate(values):
        expected = share * max_lr + (max_lr - share * max_lr) * (step + 1) / warmup_steps
        assert value == pytest.approx(expected, rel=1e-12)


def test_a_run_from_scratch_warms_up_on_its_own_clock_and_decays_to_its_end() -> None:
    lr = DecayRun(MainPath(1.0, 0.0, 4), 100, 112, COSINE, 0.0).schedule()
    assert [lr(step) for step in range(100, 105)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr(108) == 0.5
    assert lr(111) == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert lr(112) == 0.0


def test_a_constant_run_is_constant() -> None:
    assert {ConstantRun(2e-4).schedule()(step) for step in range(100)} == {2e-4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "max_lr"),
        ((math.nan,), "max_lr"),
        ((math.inf,), "max_lr"),
        ((1.0, -0.1), "init_lr"),
        ((1.0, 2.0), "init_lr"),
        ((1.0, 0.0, -1), "warmup_steps"),
    ],
)
def test_a_main_path_that_cannot_be_is_refused(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MainPath(*arguments)  # type: ignore[arg-type]


def test_a_branch_cannot_leave_inside_the_warm_up() -> None:
    BranchPath(MainPath(1.0, 0.0, 10), 10, 5, COSINE)
    with pytest.raises(ConfigError, match=r"given 10; allowed: at most the first fork step \(9\)"):
        BranchPath(MainPath(1.0, 0.0, 10), 9, 5, COSINE)
    with pytest.raises(ConfigError, match="warmup_steps"):
        DecayRun(MainPath(1.0, 0.0, 10), 0, 10, COSINE)


def test_the_digest_follows_every_field() -> None:
    main = MainPath(1.0, 0.0, 2)
    knee = make_shape("knee", {"explore": 0.25})
    paths = [
        main,
        MainPath(1.0, 0.0, 3),
        BranchPath(main, 5, 5, COSINE),
        BranchPath(main, 6, 5, COSINE),
        BranchPath(main, 5, 6, COSINE),
        BranchPath(main, 5, 5, COSINE, 0.1),
        BranchPath(main, 5, 5, knee),
        BranchPath(main, 5, 5, make_shape("knee", {"explore": 0.5})),
        DecayRun(main, 0, 10, COSINE),
    ]
    assert len({digest(path.fields()) for path in paths}) == len(paths)
    assert digest(BranchPath(main, 5, 5, knee).fields()) == digest(BranchPath(main, 5, 5, knee).fields())
