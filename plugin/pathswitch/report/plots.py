"""Figures: the LR paths of a plan, and loss, quality and cost of its runs; the only file that imports matplotlib.

Each function draws once and writes the picture to every given file, .svg or .png by its suffix. Output is
deterministic: no dates, no random ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from math import isfinite, log
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any

from pathswitch.atomic import write_bytes_atomic
from pathswitch.errors import ConfigError, PathSwitchError
from pathswitch.report.collect import Comparison, Spread, VersionResult
from pathswitch.report.curves import bucketed, smoothed
from pathswitch.report.runs import PathRun
from pathswitch.report.style import BAND, COLOURS, INK, LINE, MUTED, PAPER, STYLE
from pathswitch.report.wording import (
    COLUMNS,
    LABELS,
    SHORT_LABELS,
    Column,
    compact,
    learning_rate,
    perplexity,
    spread_of,
    tokens,
)
from pathswitch.versions import MAIN, Paradigm, Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 9.0
# Letters of the usual size that fit side by side into a picture of that width.
LETTERS_ACROSS = 100
# Room behind the last release, where the main path goes on.
RIGHT_MARGIN = 0.05
# Text in a cell lighter than this (luminance, 0 to 1) is black, else white.
LIGHT_CELL = 0.5


def lr_paths(plan: Plan, *files: FilePath, tokens_per_step: int | None = None) -> None:
    """Draw the main path at the maximum LR, the branches that leave it and decay, and whose data each step is.

    Raises:
        ConfigError: the plan has no version, or a file is neither .svg nor .png.
        PathSwitchError: matplotlib is not installed.
    """
    if not plan.versions:
        raise ConfigError("figure of the LR paths", given="a plan without versions", allowed="at least one version")
    with _figure("lr-paths", 4.4, files) as figure:
        axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[13, 1])
        _draw_main_path(axes, plan)
        _draw_branches(axes, plan)
        _draw_versions(axes, strip, plan)
        axes.set_xlim(0, plan.end_steps[-1] * (1 + RIGHT_MARGIN))
        axes.set_ylabel("learning rate")
        axes.locator_params(axis="y", nbins=4)
        axes.yaxis.set_major_formatter(lambda value, _: learning_rate(value))
        axes.tick_params(labelbottom=False, bottom=False)
        axes.grid(axis="x", visible=False)
        strip.set_xlabel("optimizer step")
        strip.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        if tokens_per_step is not None:
            _draw_token_axis(axes, tokens_per_step)


def loss_curves(comparison: Comparison, *files: FilePath) -> None:
    """Draw training loss over steps, one panel per paradigm on shared axes, for the first seed of each.

    Raises:
        ConfigError: a file is neither .svg nor .png.
        PathSwitchError: no update is on record, or matplotlib is not installed.
    """
    of_first_seed = [(paradigm, _first_runs(comparison, paradigm)) for paradigm in comparison.paradigms]
    drawn = [(paradigm, runs) for paradigm, runs in of_first_seed if any(run.losses for run in runs)]
    if not drawn:
        raise PathSwitchError("figure of the loss curves: no update of any path is on record yet")
    n_columns = min(2, len(drawn))
    n_rows = -(-len(drawn) // n_columns)
    with _figure("loss-curves", 0.5 + 2.7 * n_rows, files) as figure:
        panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).flatten()
        for axes, (paradigm, runs) in zip(panels, drawn, strict=False):
            _draw_losses(axes, paradigm, runs)
            axes.set_title(LABELS[paradigm], color=COLOURS[paradigm])
        for axes in panels[len(drawn) :]:
            axes.set_visible(False)
        # The last panel of each column carries the ticks, also above an empty place.
        for axes in panels[max(0, len(drawn) - n_columns) : len(drawn)]:
            axes.set_xlabel("optimizer step")
            axes.tick_params(labelbottom=True)
        panels[0].set_xlim(0, comparison.plan.end_steps[-1] * 1.1)
        panels[0].set_ylim(*_loss_limits([run for _, runs in drawn for run in runs]))
        panels[0].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for axes in panels[::n_columns]:
            axes.set_ylabel("training loss (nats per token)")


def quality_points(comparison: Comparison) -> tuple[VersionResult, ...]:
    """Return the results at the version to look at first, without those that diverged."""
    results = comparison.results_of(comparison.focus) if comparison.focus is not None else ()
    columns = COLUMNS[comparison.split]
    return tuple(r for r in results if all(isfinite(spread_of(r, c).mean) for c in columns))


def quality_cost(comparison: Comparison, *files: FilePath) -> None:
    """Draw perplexity against cost in % of PTFS, one point per paradigm, at the version to look at first.

    Raises:
        ConfigError: a file is neither .svg nor .png.
        PathSwitchError: no version has a finite result, or matplotlib is not installed.
    """
    results = quality_points(comparison)
    if not results:
        raise PathSwitchError("figure of quality against cost: no version has been released and evaluated yet")
    columns = COLUMNS[comparison.split]
    with _figure("quality-cost", 3.6, files) as figure:
        panels = figure.subplots(1, len(columns), squeeze=False).flatten()
        for axes, (column, text) in zip(panels, columns.items(), strict=True):
            _draw_quality(axes, results, column, LETTERS_ACROSS / len(columns) - 2)
            axes.set_title(f"{results[0].version} on {text}")
            axes.set_xlabel("steps, % of pre-training from scratch")
            axes.set_xlim(0, 145)
            axes.set_xticks([0, 20, 40, 60, 80, 100])
        figure.axes[0].set_ylabel("perplexity (lower is better)")


def perplexity_matrix(comparison: Comparison, *files: FilePath) -> None:
    """Draw heat maps version x test set, one per paradigm on one colour scale; hatched: not trained on yet.

    Raises:
        ConfigError: a file is neither .svg nor .png.
        PathSwitchError: no version has a result, or matplotlib is not installed.
    """
    rows_of = {p: [r for r in comparison.results if r.paradigm == p] for p in comparison.paradigms}
    drawn = [(paradigm, rows) for paradigm, rows in rows_of.items() if rows]
    if not drawn:
        raise PathSwitchError("figure of the perplexity matrix: no version has been released and evaluated yet")
    names = [version.name for version in comparison.plan.versions]
    n_columns = min(len(drawn), 3 if len(names) <= 6 else 2)
    n_rows = -(-len(drawn) // n_columns)
    cell = WIDTH_INCHES / max(n_columns, 2) / (len(names) + 1.6)
    with _figure("perplexity-matrix", n_rows * (min(cell, 0.5) * len(names) + 0.95), files) as figure:
        panels = figure.subplots(n_rows, n_columns, squeeze=False).flatten()
        scale = _colour_scale([rows for _, rows in drawn])
        for axes, (paradigm, rows) in zip(panels, drawn, strict=False):
            _draw_matrix(axes, rows, names, scale)
            axes.set_title(LABELS[paradigm], color=COLOURS[paradigm])
        for axes in panels[len(drawn) :]:
            axes.set_visible(False)


@contextmanager
def _figure(name: str, height: float, files: Sequence[FilePath]) -> Iterator[Figure]:
    """Open a figure in the house style, and write it to the files when it is drawn."""
    for file in files:
        if file.suffix not in (".svg", ".png"):
            raise ConfigError("figure file", given=str(file), allowed="a name that ends in .svg or .png")
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise PathSwitchError("figures need matplotlib: pip install 'pathswitch[report]'") from None
    # "default" first: nobody's matplotlibrc changes a report.
    with style.context(["default", STYLE | {"svg.hashsalt": name}]):
        figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
        yield figure
        for file in files:
            content = BytesIO()
            kind = file.suffix[1:]
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",))
            figure.savefig(content, format=kind, metadata=nothing)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(file, content.getvalue())


def _draw_main_path(axes: Axes, plan: Plan) -> None:
    max_lr, warmup, last_fork = plan.main.max_lr, plan.main.warmup_steps, plan.fork_steps[-1]
    lr = plan.main.schedule()
    # One point per corner is exact: the warm-up is a straight line, the rest constant.
    steps = [0, max(warmup - 1, 0), last_fork]
    axes.plot(steps, [lr(step) for step in steps], color=INK, linewidth=3.2, zorder=4)
    # It never decays: behind the last fork it waits, at the same LR, for the next version's data.
    end = plan.end_steps[-1] * (1 + RIGHT_MARGIN)
    axes.plot([last_fork, end], [max_lr, max_lr], color=INK, linewidth=1.6, linestyle=(0, (1, 2.5)), zorder=3)
    axes.annotate(
        "main path: maximum LR, never decays",
        (steps[1], max_lr),
        xytext=(6, 7),
        textcoords="offset points",
        fontweight="bold",
    )


def _draw_branches(axes: Axes, plan: Plan) -> None:
    colour = COLOURS["path_switching"]
    for path in plan.paths("path_switching")[1:]:
        n_points = min(path.steps, 240)
        steps = [path.start_step + round(path.steps * i / n_points) for i in range(n_points + 1)]
        axes.plot(steps, [path.lr(step) for step in steps], color=colour, linewidth=2, zorder=3)
        axes.plot([path.start_step], [plan.main.max_lr], "o", color=INK, markersize=6, zorder=5)
        axes.plot([path.end_step], [path.lr(path.end_step)], "o", color=colour, markersize=6, zorder=5)
    n_levels = _label_releases(axes, plan)
    axes.set_ylim(-plan.main.max_lr * (0.05 + 0.07 * n_levels), plan.main.max_lr * 1.14)
    axes.axhline(0, color=MUTED, linewidth=0.8, zorder=1)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_bounds(0, plan.main.max_lr)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= plan.main.max_lr])


def _label_releases(axes: Axes, plan: Plan) -> int:
    """Name each release below its branch's end, lower where its neighbour is in the way; return the lines used."""
    total = plan.end_steps[-1] * (1 + RIGHT_MARGIN)
    taken_up_to: list[float] = []
    for version, end_step in zip(plan.versions, plan.end_steps, strict=True):
        name = _shortened(version.name, 14)
        half = (len(name) + 1) / 2 / LETTERS_ACROSS * total
        level = next((i for i, taken in enumerate(taken_up_to) if taken <= end_step - half), len(taken_up_to))
        taken_up_to[level : level + 1] = [end_step + half]
        axes.annotate(
            name,
            (end_step, version.final_lr),
            xytext=(0, -7 - 14 * level),
            textcoords="offset points",
            ha="center",
            va="top",
            color=COLOURS["path_switching"],
            fontweight="bold",
            zorder=6,
        )
    return len(taken_up_to)


def _draw_versions(axes: Axes, strip: Axes, plan: Plan) -> None:
    """Shade every other version's data, and name them in a strip below."""
    start_step, total = 0, plan.end_steps[-1] * (1 + RIGHT_MARGIN)
    for index, (version, end_step) in enumerate(zip(plan.versions, plan.end_steps, strict=True)):
        shade = BAND if index % 2 == 0 else "none"
        axes.axvspan(start_step, end_step, facecolor=shade, edgecolor="none", zorder=0)
        strip.axvspan(start_step, end_step, facecolor=BAND if index % 2 == 0 else PAPER, edgecolor=LINE, zorder=0)
        letters = int((end_step - start_step) / total * LETTERS_ACROSS)
        name = version.name if len(version.name) <= letters - 1 else ""
        long_name = f"{version.name}: {version.steps:,} steps"
        text = long_name if len(long_name) <= letters - 2 else name
        strip.text((start_step + end_step) / 2, 0.5, text, ha="center", va="center", fontsize=9)
        start_step = end_step
    strip.set_ylim(0, 1)
    strip.set_yticks([])
    strip.set_ylabel("data", rotation=0, ha="right", va="center")
    strip.grid(visible=False)
    strip.spines[["left", "bottom"]].set_visible(False)


def _draw_token_axis(axes: Axes, tokens_per_step: int) -> None:
    def to_tokens(steps: Any) -> Any:
        return steps * tokens_per_step

    def to_steps(count: Any) -> Any:
        return count / tokens_per_step

    top = axes.secondary_xaxis("top", functions=(to_tokens, to_steps))
    top.set_xlabel("tokens of the main path", color=MUTED, fontsize=9)
    top.tick_params(labelsize=9, labelcolor=MUTED, color=MUTED)
    top.spines["top"].set_visible(False)
    top.xaxis.set_major_formatter(lambda value, _: tokens(value))


def _first_runs(comparison: Comparison, paradigm: Paradigm) -> tuple[PathRun, ...]:
    folders = sorted(comparison.folders, key=lambda folder: folder.seed)
    return next(folder.runs[paradigm] for folder in folders if paradigm in folder.runs)


def _draw_losses(axes: Axes, paradigm: Paradigm, runs: Sequence[PathRun]) -> None:
    for run in runs:
        if not run.losses:
            continue
        main = run.path.name == MAIN
        colour = INK if main else COLOURS[paradigm]
        raw = bucketed(run.losses)
        axes.plot(*raw, color=colour, linewidth=0.5, alpha=0.22, zorder=2)
        steps, losses = smoothed(run.losses)
        axes.plot(steps, losses, color=colour, linewidth=2.6 if main else 1.6, zorder=3 if main else 4)
        if not main:
            axes.plot(steps[-1:], losses[-1:], "o", color=colour, markersize=4, zorder=5)
        axes.annotate(
            "main path" if main else _shortened(run.path.name, 12),
            (steps[-1], losses[-1]),
            xytext=(4, 4 if main else -3),
            textcoords="offset points",
            va="bottom" if main else "top",
            fontsize=9,
            color=colour,
            fontweight="bold" if main else "normal",
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            zorder=6,
        )


def _loss_limits(runs: Sequence[PathRun]) -> tuple[float, float]:
    """Leave out the fall of the first steps, which would flatten all the rest."""
    last = max(max(run.losses, default=0) for run in runs)
    seen = [loss for run in runs for step, loss in zip(*smoothed(run.losses), strict=True) if step >= last * 0.06]
    finite = [loss for loss in seen if isfinite(loss)] or [0.0, 1.0]
    margin = 0.08 * (max(finite) - min(finite)) or 0.1
    return min(finite) - margin, max(finite) + margin


def _draw_quality(axes: Axes, results: Sequence[VersionResult], column: Column, letters: float) -> None:
    lows, highs = zip(*((spread_of(r, column).low, spread_of(r, column).high) for r in results), strict=True)
    middle, span = (min(lows) + max(highs)) / 2, max(max(highs) - min(lows), 0.1 * max(highs))
    axes.set_ylim(middle - 0.62 * span, middle + 0.62 * span)
    labels: list[tuple[float, float, float]] = []
    for result in sorted(results, key=lambda result: spread_of(result, column).mean):
        values, colour = spread_of(result, column), COLOURS[result.paradigm]
        cost, error = 100 * result.ratio_to_ptfs, [[values.mean - values.low], [values.high - values.mean]]
        axes.errorbar([cost], [values.mean], yerr=error, fmt="o", color=colour, markersize=8, capsize=4, zorder=3)
        text = f"{SHORT_LABELS[result.paradigm]} {perplexity(values.mean)}"
        # About that many letters fit across the panel, and 14 lines: labels that would overlap move up by a line.
        end, line, height = cost + 145 * len(text) / letters, 1.24 * span / 14, values.mean
        for left, right, other in labels:
            if left < end and cost < right and height < other + line:
                height = other + line
        labels.append((cost, end, height))
        axes.annotate(
            text,
            (cost, height),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            zorder=4,
        )


def _seen(row: VersionResult) -> dict[str, Spread]:
    """Return the perplexities on the text of the versions that it has been trained on."""
    return {name: row.test_sets[name].perplexity for name in row.trained_on}


def _colour_scale(tables: Sequence[Sequence[VersionResult]]) -> tuple[Any, Any]:
    """One scale for all maps, over the logarithm, as loss is: light is low."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    values = [values.mean for rows in tables for row in rows for values in _seen(row).values()]
    logs = [log(value) for value in values if isfinite(value)] or [0.0]
    # Without the darkest fifth, black text stays readable over most of the scale.
    shades = colormaps["YlGnBu"]([0.8 * i / 63 for i in range(64)])
    colour_map = LinearSegmentedColormap.from_list("perplexity", list(shades))
    return colour_map, Normalize(min(logs), max(max(logs), min(logs) + 1e-9))


def _draw_matrix(axes: Axes, rows: Sequence[VersionResult], names: Sequence[str], scale: tuple[Any, Any]) -> None:
    from matplotlib.patches import Rectangle

    colour_map, norm = scale
    size = 9 if len(names) <= 6 else 7.5
    for row in rows:
        y, seen = names.index(row.version), _seen(row)
        for name, quality in row.test_sets.items():
            x, value = names.index(name), quality.perplexity.mean
            if name in seen and isfinite(value):
                fill = colour_map(norm(log(value)))
                light = 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] > LIGHT_CELL
                ink, edge, hatch = "#000000" if light else "#ffffff", PAPER, None
            else:
                fill, ink, edge, hatch = BAND, MUTED, LINE, None if name in seen else "////"
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=fill, edgecolor=edge, hatch=hatch))
            plate = None if name in seen else {"facecolor": BAND, "edgecolor": "none", "pad": 1.5}
            axes.text(x, y, compact(value), ha="center", va="center", fontsize=size, color=ink, bbox=plate)
    labels = [_shortened(name, 10) for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=size)
    if max(map(len, labels)) > 4:
        axes.tick_params(axis="x", rotation=35)
    axes.set_yticks(range(len(names)), labels, fontsize=size)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("test text of", fontsize=9)
    axes.set_ylabel("version", fontsize=9)


def _shortened(name: str, n_letters: int) -> str:
    return name if len(name) <= n_letters else f"{name[: n_letters - 1]}…"
