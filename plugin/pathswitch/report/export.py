"""Comparisons as JSON values, for whoever goes on computing with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite
from typing import Any

from pathswitch.report.collect import Comparison, Quality, Spread, VersionResult
from pathswitch.versions import PARADIGMS

JSON_FORMAT = 1


def to_json(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return ``{"format": 1, "comparisons": [...]}`` with one entry per split, "temporal" before "iid".

    Each entry has ``split``, ``seeds``, ``tokens_per_step``, ``versions``, ``paradigms`` (cost of the whole plan, by
    name), ``results`` (one per paradigm and released version), ``incomplete`` and ``runs``. Costs are in optimizer
    steps, qualities ``{"perplexity", "bits_per_byte"}`` of ``{"mean", "min", "max", "values"}`` over seeds. A result's
    ``all_so_far`` pools the test text of all versions that it was trained on: those up to it, with split "iid" all;
    ``newest`` is its own test text. A value that is not finite is null.
    """
    return {"format": JSON_FORMAT, "comparisons": [_comparison(comparison) for comparison in comparisons]}


def _comparison(comparison: Comparison) -> dict[str, Any]:
    plan, cost, tokens = comparison.plan, comparison.plan.cost, comparison.tokens_per_step
    return {
        "split": comparison.split,
        "seeds": list(comparison.seeds),
        "tokens_per_step": tokens,
        "versions": [
            {"name": v.name, "steps": v.steps, "fork_step": fork, "decay_steps": v.decay_steps, "end_step": end}
            for v, fork, end in zip(plan.versions, plan.fork_steps, plan.end_steps, strict=True)
        ],
        "paradigms": {
            paradigm: {
                "run": paradigm in comparison.paradigms,
                "steps": cost.of(paradigm),
                "tokens": None if tokens is None else cost.of(paradigm) * tokens,
                "ratio_to_ptfs": cost.of(paradigm) / cost.ptfs_steps,
            }
            for paradigm in PARADIGMS
        },
        "results": [_result(result) for result in comparison.results],
        "incomplete": [asdict(item) for item in comparison.incomplete],
        "runs": [
            {
                "folder": str(folder.folder),
                "seed": folder.seed,
                "ranks": folder.ranks,
                "paradigms": list(folder.runs),
                "environment": folder.environment,
            }
            for folder in comparison.folders
        ],
    }


def _result(result: VersionResult) -> dict[str, Any]:
    return {
        "paradigm": result.paradigm,
        "version": result.version,
        "seeds": list(result.seeds),
        "steps": result.steps,
        "ratio_to_ptfs": result.ratio_to_ptfs,
        "all_so_far": _quality(result.all_so_far),
        "newest": _quality(result.newest),
        "test_sets": {name: _quality(quality) for name, quality in result.test_sets.items()},
    }


def _quality(quality: Quality) -> dict[str, Any]:
    return {"perplexity": _spread(quality.perplexity), "bits_per_byte": _spread(quality.bits_per_byte)}


def _spread(spread: Spread) -> dict[str, Any]:
    numbers = {"mean": spread.mean, "min": spread.low, "max": spread.high}
    values = [_finite(value) for value in spread.values]
    return {key: _finite(value) for key, value in numbers.items()} | {"values": values}


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None
