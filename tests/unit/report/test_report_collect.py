"""Pooling, cost, seeds, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from math import exp, log
from pathlib import Path

import pytest
from report_runs import plan_text, scored, write_json, write_path, write_run

from pathswitch.config import build_plan, load_plan_file
from pathswitch.errors import ConfigError, RunError
from pathswitch.report.collect import collect, cost_up_to

MakeRun = Callable[..., Path]


def _evaluate(root: Path, path: str, step: int, scores: dict[str, tuple[float, int, int]]) -> None:
    sets = {name: scored(*values) for name, values in scores.items()}
    write_json(root / path / "evaluation.json", {"step": step, "test_sets": sets})


def test_pooled_perplexity_is_the_hand_calculation(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["path_switching"])
    # v2: 1000 tokens at 4 nats and 3000 tokens at 5 nats pool to exp(19000 / 4000), not to a mean of perplexities.
    _evaluate(root, "path_switching/v1", 40, {"v1": (4500.0, 1000, 3500), "v2": (18000.0, 3000, 9000)})
    _evaluate(root, "path_switching/v2", 100, {"v1": (4000.0, 1000, 3500), "v2": (15000.0, 3000, 9000)})
    (comparison,) = collect([root])
    first, second = comparison.results
    assert first.all_so_far.perplexity.values == pytest.approx([exp(4.5)])
    assert first.newest == first.all_so_far
    assert second.all_so_far.perplexity.values == pytest.approx([exp(4.75)])
    assert second.newest.perplexity.values == pytest.approx([exp(5)])
    assert second.all_so_far.bits_per_byte.values == pytest.approx([19000 / log(2) / 12500])
    assert second.newest.bits_per_byte.values == pytest.approx([15000 / log(2) / 9000])
    assert first.test_sets["v2"].perplexity.values == pytest.approx([exp(6)])
    assert list(second.test_sets) == ["v1", "v2"]


def test_cost_counts_versions_up_to_each_one(make_run: MakeRun) -> None:
    (comparison,) = collect([make_run(steps=(200, 200, 200, 200))])
    steps = {(r.paradigm, r.version): (r.steps, r.ratio_to_ptfs) for r in comparison.results}
    assert [steps["path_switching", f"v{v}"][0] for v in (1, 2, 3, 4)] == [200, 520, 840, 1160]
    assert steps["path_switching", "v4"][1] == pytest.approx(0.58)
    assert steps["path_switching", "v2"][1] == pytest.approx(520 / 600)
    assert [steps["ptfs", f"v{v}"][0] for v in (1, 2, 3, 4)] == [200, 600, 1200, 2000]
    assert [steps["cpt_rewarm", f"v{v}"][0] for v in (1, 2, 3, 4)] == [200, 400, 600, 800]
    assert steps["wsd_s", "v4"] == (800, 0.4)


def test_cost_of_unequal_versions(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(plan_text((100, 300, 50)), encoding="utf-8")
    plan = build_plan(load_plan_file(tmp_path / "plan.toml"))
    # Main path up to F_2 = 400 - 180, branches of 60 and 180.
    assert cost_up_to(plan, 2).path_switching_steps == 220 + 60 + 180
    assert cost_up_to(plan, 3) == plan.cost


def test_seeds_are_aggregated_and_paradigms_joined(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", plan_text((40, 60), seed=1), ["path_switching"], seed=1)
    two = write_run(tmp_path / "b", plan_text((40, 60), seed=7), ["path_switching"], seed=7)
    ptfs = write_run(tmp_path / "c", plan_text((40, 60), seed=1), ["ptfs"], seed=1)
    for root, nats in ((one, 4.0), (two, 4.4)):
        _evaluate(
            root, "path_switching/v1", 40, {"v1": (nats * 20_000, 20_000, 70_000), "v2": (90_000, 20_000, 70_000)}
        )
    (comparison,) = collect([two, one, ptfs])
    assert comparison.seeds == (1, 7)
    assert comparison.paradigms == ("path_switching", "ptfs")
    assert comparison.seeds_of("ptfs") == (1,)
    result = comparison.results_of("v1")[0]
    assert result.seeds == (1, 7)
    spread = result.newest.perplexity
    assert spread.values == pytest.approx([exp(4.0), exp(4.4)])
    assert (spread.mean, spread.low, spread.high) == pytest.approx(((exp(4.0) + exp(4.4)) / 2, exp(4.0), exp(4.4)))
    assert comparison.results_of("v1")[1].seeds == (1,)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"max_lr": 1e-3}, "[schedule] max_lr = 0.001"),
        ({"train": "other.txt"}, "[[versions]] number 1 train"),
        ({"steps": (40, 50)}, "[[versions]] number 2 steps = 50"),
        ({"steps": (40, 60, 60)}, "the number of [[versions]] = 3"),
    ],
)
@pytest.mark.parametrize("split", ["temporal", "iid"])
def test_folders_of_different_plans_are_refused(
    tmp_path: Path, change: dict[str, object], named: str, split: str
) -> None:
    one = write_run(tmp_path / "a", plan_text((40, 60)), ["ptfs"])
    other = plan_text(**{"steps": (40, 60), "seed": 2, "split": split} | change)  # type: ignore[arg-type]
    two = write_run(tmp_path / "b", other, ["ptfs"], seed=2)
    with pytest.raises(RunError) as caught:
        collect([one, two])
    assert named in str(caught.value)
    assert str(one) in str(caught.value) and str(two) in str(caught.value)


def test_the_same_paradigm_and_seed_twice_is_refused(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["ptfs"])
    with pytest.raises(RunError, match=r"ptfs with seed 1.*each paradigm and seed once"):
        collect([root, root])


def test_folders_are_grouped_by_split_temporal_first(make_run: MakeRun) -> None:
    iid, temporal, more = (
        make_run(name, (40, 60), split=name[:-1], seed=seed, paradigms=["ptfs"])
        for name, seed in (("iid1", 1), ("temporal1", 1), ("temporal2", 2))
    )
    first, second = collect([iid, temporal, more])
    assert (first.split, [folder.folder for folder in first.folders]) == ("temporal", [temporal, more])
    assert (second.split, [folder.folder for folder in second.folders]) == ("iid", [iid])
    assert first.results[0].seeds == (1, 2) and second.results[0].seeds == (1,)


def test_a_version_that_drew_from_one_pool_is_measured_on_all_text(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), split="iid", paradigms=["ptfs"])
    _evaluate(root, "ptfs/v1", 40, {"v1": (4500.0, 1000, 3500), "v2": (18000.0, 3000, 9000)})
    _evaluate(root, "ptfs/v2", 100, {"v1": (4000.0, 1000, 3500), "v2": (15000.0, 3000, 9000)})
    (comparison,) = collect([root])
    values = [result.all_so_far.perplexity.mean for result in comparison.results]
    assert values == pytest.approx([exp(22500 / 4000), exp(19000 / 4000)])
    _evaluate(root, "ptfs/v1", 40, {"v1": (4500.0, 1000, 3500)})
    with pytest.raises(RunError, match="'v2' is missing"):
        collect([root])


def test_how_often_a_run_is_saved_does_not_matter(tmp_path: Path) -> None:
    often = plan_text((40, 60), seed=2).replace("[train]", "[train]\nsave_every_steps = 7")
    one = write_run(tmp_path / "a", plan_text((40, 60)), ["ptfs"])
    two = write_run(tmp_path / "b", often, ["ptfs"], seed=2)
    (comparison,) = collect([one, two])
    assert comparison.seeds == (1, 2)


def test_a_plan_without_a_split_is_refused(make_run: MakeRun) -> None:
    root = make_run(steps=(40,), paradigms=[])
    text = (root / "plan.toml").read_text()
    (root / "plan.toml").write_text(text[: text.index("[data]")] + text[text.index("[train]") :], encoding="utf-8")
    with pytest.raises(RunError, match=r"plan\.toml: \[data\] is missing"):
        collect([root])


def test_splits_that_were_scored_on_different_text_are_refused(make_run: MakeRun) -> None:
    temporal, iid = (make_run(split, (40,), split=split, paradigms=["ptfs"]) for split in ("temporal", "iid"))
    _evaluate(iid, "ptfs/v1", 40, {"v1": (4500.0, 1000, 3500)})
    with pytest.raises(RunError, match="1000 tokens in 3500 bytes; allowed: 20000 in 70000"):
        collect([temporal, iid])


def test_no_folder_and_no_run_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run folder"):
        collect([])
    with pytest.raises(RunError, match=r"run\.json"):
        collect([tmp_path])
    write_json(tmp_path / "run.json", {"format": 2})
    with pytest.raises(RunError, match="given format 2; allowed: 1"):
        collect([tmp_path])
    write_json(tmp_path / "run.json", {"format": 1, "seed": 1, "ranks": 1, "environment": {}})
    with pytest.raises(ConfigError, match=r"plan\.toml"):
        collect([tmp_path])


def test_incomplete_paths_are_listed_and_left_out(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60, 80), paradigms=["path_switching", "cpt_rewarm"])
    plan = build_plan(load_plan_file(root / "plan.toml"))
    shutil.rmtree(root / "path_switching/v2")
    write_path(root, plan, plan.path("v2"), done_share=0.5)
    shutil.rmtree(root / "cpt_rewarm/v3")
    (root / "path_switching/v3/evaluation.json").unlink()
    (comparison,) = collect([root])
    listed = {(i.paradigm, i.path): i.status for i in comparison.incomplete}
    assert listed == {
        ("path_switching", "v2"): "not complete (18 of 36 steps)",
        ("path_switching", "v3"): "trained, not evaluated",
        ("cpt_rewarm", "v3"): "not complete (0 of 80 steps)",
    }
    assert [r.version for r in comparison.results if r.paradigm == "path_switching"] == ["v1"]
    assert comparison.focus == "v1"


def test_an_evaluation_without_a_completion_record_does_not_count(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["ptfs"])
    (root / "ptfs/v2/done.json").unlink()
    (comparison,) = collect([root])
    assert [r.version for r in comparison.results] == ["v1"]
    assert [(i.path, i.done_steps, i.trained) for i in comparison.incomplete] == [("v2", 100, False)]


def test_a_line_that_is_being_written_is_not_an_update_yet_but_a_broken_one_is_an_error(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["ptfs"])
    (root / "ptfs/v2/done.json").unlink()
    metrics = root / "ptfs/v2/metrics.jsonl"
    metrics.write_text('{"step": 0, "loss": 6.0}\n{"step": 1, "lo', encoding="utf-8")
    (comparison,) = collect([root])
    assert comparison.incomplete[0].done_steps == 1
    metrics.write_text('{"step": 0, "loss": 6.0}\n{"step": 1, "lo\n', encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.jsonl, line 2"):
        collect([root])


def test_a_version_added_to_the_plan_leaves_earlier_results_standing(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["path_switching"])
    (root / "plan.toml").write_text(plan_text((40, 60, 80)), encoding="utf-8")
    (comparison,) = collect([root])
    assert [list(r.test_sets) for r in comparison.results] == [["v1", "v2"], ["v1", "v2"]]
    assert [(i.path, i.done_steps, i.steps) for i in comparison.incomplete] == [("main", 64, 132), ("v3", 0, 48)]


def test_records_that_contradict_the_plan_are_refused(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["path_switching"])
    done = root / "path_switching/v2/done.json"
    write_json(done, json.loads(done.read_text()) | {"end_step": 99})
    with pytest.raises(RunError, match="given steps 64 to 99; allowed: 64 to 100"):
        collect([root])


def test_evaluations_that_cannot_be_compared_are_refused(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["path_switching"])
    good = {"v1": (4000.0, 1000, 3500), "v2": (15000.0, 3000, 9000)}
    _evaluate(root, "path_switching/v1", 40, good)
    _evaluate(root, "path_switching/v2", 100, good | {"v1": (4000.0, 1001, 3500)})
    with pytest.raises(RunError, match=r"'v1' has 1001 tokens in 3500 bytes; allowed: 1000 in 3500"):
        collect([root])
    _evaluate(root, "path_switching/v2", 100, {"v2": good["v2"]})
    with pytest.raises(RunError, match="'v1' is missing"):
        collect([root])
    _evaluate(root, "path_switching/v2", 80, good)
    with pytest.raises(RunError, match="given step 80; allowed: 100"):
        collect([root])
    mean_for_total = scored(4000.0, 1000, 3500) | {"nll_nats": 4.0}
    sets = {"v1": mean_for_total, "v2": scored(*good["v2"])}
    write_json(root / "path_switching/v2/evaluation.json", {"step": 100, "test_sets": sets})
    with pytest.raises(RunError, match=r"has perplexity 54\.59"):
        collect([root])
