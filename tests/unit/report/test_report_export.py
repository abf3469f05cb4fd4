"""JSON: strict, with stable keys, one entry per split."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import inf
from pathlib import Path

from report_runs import scored, write_json

from pathswitch.report import collect, to_json
from pathswitch.report.runs import Score

MakeRun = Callable[..., Path]


def test_json_is_strict_json_with_stable_keys(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["path_switching", "wsd_s"])
    whole = json.loads(json.dumps(to_json(collect([root])), allow_nan=False))
    assert list(whole) == ["format", "comparisons"] and whole["format"] == 1
    (content,) = whole["comparisons"]
    assert list(content) == [
        "split",
        "seeds",
        "tokens_per_step",
        "versions",
        "paradigms",
        "results",
        "incomplete",
        "runs",
    ]
    assert content["paradigms"]["ptfs"] == {"run": False, "steps": 140, "tokens": 140 * 2048, "ratio_to_ptfs": 1.0}
    assert content["versions"][1] == {"name": "v2", "steps": 60, "fork_step": 64, "decay_steps": 36, "end_step": 100}
    result = content["results"][0]
    assert list(result) == [
        "paradigm",
        "version",
        "seeds",
        "steps",
        "ratio_to_ptfs",
        "all_so_far",
        "newest",
        "test_sets",
    ]
    assert list(result["newest"]) == ["perplexity", "bits_per_byte"]
    assert list(result["newest"]["perplexity"]) == ["mean", "min", "max", "values"]
    assert content["runs"][0]["environment"]["cores"] == 2


def test_a_diverged_run_is_null_in_json_and_does_not_overflow(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["path_switching"])
    sets = {
        name: scored(4.0 * 20_000) | {"nll_nats": float("nan"), "perplexity": float("nan")} for name in ("v1", "v2")
    }
    write_json(root / "path_switching/v2/evaluation.json", {"step": 100, "test_sets": sets})
    content = to_json(collect([root]))
    json.dumps(content, allow_nan=False)
    assert content["comparisons"][0]["results"][1]["newest"]["perplexity"]["mean"] is None
    assert Score(1e9, 10, 10).perplexity == inf


def test_each_split_has_an_entry(make_run: MakeRun) -> None:
    roots = [make_run(split, (40, 60), split=split, paradigms=["ptfs"]) for split in ("iid", "temporal")]
    (roots[0] / "ptfs/v2/done.json").unlink()
    temporal, iid = to_json(collect(roots))["comparisons"]
    assert (temporal["split"], iid["split"]) == ("temporal", "iid")
    assert [result["version"] for result in temporal["results"]] == ["v1", "v2"]
    assert [result["version"] for result in iid["results"]] == ["v1"]
    assert iid["incomplete"] == [
        {"paradigm": "ptfs", "path": "v2", "seed": 1, "done_steps": 100, "steps": 100, "trained": False}
    ]
