"""Tables for the terminal; they fit 80 columns and read well in a plain log."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from pathswitch.report.collect import Comparison, Spread, VersionResult
from pathswitch.report.wording import (
    COLUMNS,
    LABELS,
    SHORT_LABELS,
    SPLIT_TITLES,
    Ranking,
    compact,
    heads,
    not_run_note,
    percent,
    perplexity,
    ranking,
    seed_range,
    seeds_note,
    spread_of,
    tokens,
)
from pathswitch.versions import MAIN, PARADIGMS, Paradigm, Plan


def plan_table(plan: Plan, tokens_per_step: int | None) -> RenderableType:
    """Show the paths of path switching, and what every paradigm costs in steps, tokens and against PTFS."""
    if not plan.versions:
        return Text("The plan has no versions yet: one main path, open-ended.")
    return Group(*_paths_table(plan, tokens_per_step), *_cost_table(plan, tokens_per_step))


def comparison_tables(comparisons: Sequence[Comparison]) -> RenderableType:
    """Show quality and cost of every version by paradigm, the matrix version x test set, and what is missing."""
    return Group(*(part for comparison in comparisons for part in _comparison(comparison)))


def _comparison(comparison: Comparison) -> list[RenderableType]:
    parts: list[RenderableType] = [Rule(SPLIT_TITLES[comparison.split], align="left", style="none"), Text()]
    if comparison.results:
        parts += _summary_table(comparison)
        names = [version.name for version in comparison.plan.versions]
        for paradigm in comparison.paradigms:
            rows = [result for result in comparison.results if result.paradigm == paradigm]
            parts += _matrix_table(paradigm, rows, names) if rows else []
        parts.append(Text(_legend(comparison)))
    else:
        parts.append(Text("No version has been released and evaluated yet."))
    for item in comparison.incomplete:
        parts.append(Text(f"{LABELS[item.paradigm]}, {item.path}, seed {item.seed}: {item.status}", style="yellow"))
    parts.append(Text(seeds_note(comparison)))
    parts += [Text(note) for note in [not_run_note(comparison)] if note is not None]
    return [*parts, Text()]


def _legend(comparison: Comparison) -> str:
    legend = "Lower is better. * the best of its version"
    if len(comparison.seeds) > 1:
        legend += "; where several have a star, the seeds do not tell them apart"
    unseen = any(set(result.test_sets) > set(result.trained_on) for result in comparison.results)
    return f"{legend}. (…) text newer than the version." if unseen else f"{legend}."


def _table(columns: Iterable[str], *, names: int, tight: bool = False) -> Table:
    """Lay out one table whose first ``names`` columns are words and the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0) if tight else (0, 1))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < names else "right", no_wrap=index >= names)
    return table


def _titled(title: str, table: Table) -> list[RenderableType]:
    # Not the table's own title, which rich would wrap to the width of the table.
    return [Text(title, style="bold"), table]


def _paths_table(plan: Plan, tokens_per_step: int | None) -> list[RenderableType]:
    columns = ["path", "fork step", "decay steps", "end step", "steps", "tokens"]
    table = _table(columns, names=1)
    decays = {version.name: f"{version.decay_steps:,}" for version in plan.versions}
    for path in plan.paths("path_switching"):
        fork = "–" if path.name == MAIN else f"{path.start_step:,}"
        size = _tokens(path.steps, tokens_per_step)
        style = "bold" if path.name == MAIN else None
        decay = decays.get(path.name, "–")
        table.add_row(path.name, fork, decay, f"{path.end_step:,}", f"{path.steps:,}", size, style=style)
    return _titled("Path switching", table)


def _cost_table(plan: Plan, tokens_per_step: int | None) -> list[RenderableType]:
    table = _table(["paradigm", "steps", "tokens", "of PTFS"], names=1)
    cost = plan.cost
    for paradigm in PARADIGMS:
        steps = cost.of(paradigm)
        style = "bold" if paradigm == "path_switching" else None
        size, ratio = _tokens(steps, tokens_per_step), percent(steps / cost.ptfs_steps)
        table.add_row(LABELS[paradigm], f"{steps:,}", size, ratio, style=style)
    return _titled("Cost of all versions", table)


def _summary_table(comparison: Comparison) -> list[RenderableType]:
    columns = COLUMNS[comparison.split]
    table = _table(["version", "paradigm", *heads(comparison), "steps", "of PTFS"], names=2)
    for version in comparison.plan.versions:
        results = comparison.results_of(version.name)
        rankings = {column: ranking(results, column) for column in columns}
        for index, result in enumerate(results):
            table.add_row(
                version.name if index == 0 else "",
                SHORT_LABELS[result.paradigm],
                *(_marked(result, ranked, spread_of(result, column)) for column, ranked in rankings.items()),
                f"{result.steps:,}",
                percent(result.ratio_to_ptfs),
                end_section=index == len(results) - 1,
            )
    return _titled("Perplexity, and cost up to and including the version", table)


def _marked(result: VersionResult, ranked: Ranking, values: Spread) -> Text:
    """Show the mean, below it the range over seeds, and mark a leader with a star too: a log has no bold."""
    leads = len(ranked.ordered) > 1 and result in ranked.leaders
    text = Text(perplexity(values.mean) + (" *" if leads else "  "), style="bold" if leads else "")
    between = seed_range(values)
    return text if between is None else Text.assemble(text, (f"\n{between}  ", "dim"))


def _matrix_table(paradigm: Paradigm, rows: list[VersionResult], names: list[str]) -> list[RenderableType]:
    table = _table(["version", *names], names=1, tight=len(names) > 6)
    for result in rows:
        values = {name: compact(quality.perplexity.mean) for name, quality in result.test_sets.items()}
        cells = [values.get(name, "–") if name in result.trained_on else f"({values.get(name, '–')})" for name in names]
        table.add_row(result.version, *cells)
    return _titled(f"{LABELS[paradigm]}: perplexity on each version’s test text", table)


def _tokens(steps: int, tokens_per_step: int | None) -> str:
    return "–" if tokens_per_step is None else tokens(steps * tokens_per_step)
