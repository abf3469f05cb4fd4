"""From versions to paths: fork steps, costs, extension."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathswitch.errors import ConfigError
from pathswitch.schedule import MainPath, make_shape
from pathswitch.versions import PARADIGMS, Plan, Version
from pathswitch.versions.plan import decay_steps

COSINE = make_shape("cosine", {})


def make_plan(steps: list[int], alpha: float = 0.6, warmup_steps: int = 0) -> Plan:
    versions = [Version(f"v{i}", n, decay_steps(alpha, n), COSINE, 0.0) for i, n in enumerate(steps, 1)]
    return Plan(MainPath(1e-3, 0.0, warmup_steps), tuple(versions), 1e-4, 0.2)


@pytest.mark.parametrize(
    ("n_versions", "percent"), [(2, 86.7), (3, 70.0), (4, 58.0), (5, 49.3), (6, 42.9), (8, 33.9), (10, 28.0)]
)
def test_the_papers_cost_ratio(n_versions: int, percent: float) -> None:
    cost = make_plan([1000] * n_versions).cost
    assert round(100 * cost.ratio_to_ptfs, 1) == percent
    assert cost.cpt_steps == cost.wsd_s_steps == 1000 * n_versions


def test_fork_decay_and_end_steps() -> None:
    plan = make_plan([200, 100, 7])
    assert plan.end_steps == (200, 300, 307)
    assert plan.fork_steps == (80, 240, 303)  # round(0.6 * 7) = 4
    assert [(path.name, path.start_step, path.end_step) for path in plan.paths("path_switching")] == [
        ("main", 0, 303),
        ("v1", 80, 200),
        ("v2", 240, 300),
        ("v3", 303, 307),
    ]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.floats(0.01, 1.0))
def test_the_cost_is_what_the_paths_train(steps: list[int], alpha: float) -> None:
    plan = make_plan(steps, alpha)
    for paradigm in PARADIGMS:
        if paradigm == "cpt_rewarm" or min(steps) > 0:
            assert sum(path.steps for path in plan.paths(paradigm)) == plan.cost.of(paradigm)


@given(st.lists(st.integers(1, 500), min_size=1, max_size=6), st.floats(0.01, 1.0))
def test_each_path_starts_where_its_parent_passes_or_ends(steps: list[int], alpha: float) -> None:
    plan = make_plan(steps, alpha)
    for paradigm in PARADIGMS:
        paths = {path.name: path for path in plan.paths(paradigm)}
        for path in paths.values():
            parent_end = paths[path.parent].end_step if path.parent else 0
            assert path.start_step <= parent_end if path.parent == "main" else path.start_step == parent_end


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5), st.integers(1, 300))
def test_a_version_more_changes_nothing_of_what_was_planned(steps: list[int], more: int) -> None:
    before, after = make_plan(steps), make_plan([*steps, more])
    for paradigm in PARADIGMS:
        old = {path.name: path for path in before.paths(paradigm)}
        new = {path.name: path for path in after.paths(paradigm)}
        for name, path in old.items():
            assert new[name].digest == path.digest
            assert new[name].parent == path.parent
            assert new[name].start_step == path.start_step
            if name != "main":
                assert new[name].end_step == path.end_step


def test_the_baselines_lrs() -> None:
    plan = make_plan([10, 10], warmup_steps=2)
    rewarm = plan.path("v2", "cpt_rewarm")
    assert (rewarm.parent, rewarm.start_step) == ("v1", 10)
    assert [rewarm.lr(step) for step in (10, 11, 12)] == [5e-4, 1e-3, 1e-3]
    floor = plan.path("v2", "cpt_floor")
    assert {floor.lr(step) for step in range(10, 20)} == {1e-4}
    assert plan.path("v1", "cpt_floor").lr(10) == 1e-4
    wsd_s = plan.path("v2", "wsd_s")
    assert [wsd_s.lr(step) for step in (10, 17, 18, 20)] == [1e-3, 1e-3, 1e-3, 0.0]
    assert 0 < wsd_s.lr(19) < 1e-3
    scratch = plan.path("v2", "ptfs")
    assert (scratch.parent, scratch.start_step, scratch.end_step, scratch.lr(20)) == (None, 0, 20, 0.0)


@pytest.mark.parametrize(("steps", "message"), [([0], "at least 1 step"), ([5, -1], "at least 1 step")])
def test_a_version_without_steps_is_refused(steps: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_plan(steps)


def test_names_are_unique_and_not_main() -> None:
    version = Version("v1", 10, 5, COSINE, 0.0)
    with pytest.raises(ConfigError, match="stands twice"):
        Plan(MainPath(1e-3), (version, version), 1e-4, 0.2)
    with pytest.raises(ConfigError, match="main path's own"):
        Version("main", 10, 5, COSINE, 0.0)
    with pytest.raises(ConfigError, match="decay_steps"):
        Version("v1", 10, 11, COSINE, 0.0)


def test_an_unknown_path_or_paradigm_is_refused() -> None:
    plan = make_plan([10, 10])
    with pytest.raises(ConfigError, match="given 'v3'; allowed: main, v1, v2"):
        plan.path("v3")
    with pytest.raises(ConfigError, match="did you mean 'ptfs'"):
        plan.path("v1", "pfts")  # type: ignore[arg-type]
