"""Curves that a figure can carry: thinned, and smoothed so that paths can be told apart."""

from __future__ import annotations

from collections.abc import Mapping

MAX_POINTS = 300


def bucketed(losses: Mapping[int, float], max_points: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Return steps and losses, averaged over equal runs of updates when there are more than ``max_points``."""
    size = -(-len(losses) // max_points) or 1
    steps, values = list(losses), list(losses.values())
    groups = [slice(start, start + size) for start in range(0, len(values), size)]
    return [_mean(steps[group]) for group in groups], [_mean(values[group]) for group in groups]


def smoothed(losses: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Return steps and a local straight-line fit over up to a twentieth of the path on either side.

    A line, not a mean: at the ends, where the window is one-sided, a mean would lag behind the curve.
    """
    steps, values = bucketed(losses)
    reach = max(1, min(len(values) // 20, 12))
    windows = [slice(max(0, i - reach), i + reach + 1) for i in range(len(values))]
    return steps, [_fit(steps[w], values[w], at) for w, at in zip(windows, steps, strict=True)]


def _fit(x: list[float], y: list[float], at: float) -> float:
    """Return the value at ``at`` of the least-squares line through the points."""
    x_mean, y_mean = _mean(x), _mean(y)
    variance = sum((a - x_mean) ** 2 for a in x)
    if variance == 0:
        return y_mean
    slope = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True)) / variance
    return y_mean + slope * (at - x_mean)


def _mean(values: list[int] | list[float]) -> float:
    return sum(values) / len(values)
