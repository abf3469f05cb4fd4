"""Tables for the terminal; they fit 80 columns and read well in a plain log."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pathswitch.report.collect import Comparison, Spread, VersionResult
from pathswitch.report.wording import (
    LABELS,
    SHORT_LABELS,
    Ranking,
    compact,
    not_run_note,
    percent,
    perplexity,
    ranking,
    seed_range,
    seeds_note,
    tokens,
)
from pathswitch.versions import MAIN, PARADIGMS, Paradigm, Plan


def plan_table(plan: Plan, tokens_per_step: int | None) -> RenderableType:
    """Show the paths of path switching, and what every paradigm costs in steps, tokens and against PTFS."""
    if not plan.versions:
        return Text("The plan has no versions yet: one main path, open-ended.")
    return Group(*_paths_table(plan, tokens_per_step), *_cost_table(plan, tokens_per_step))


def comparison_tables(comparison: Comparison) -> RenderableType:
    """Show quality and cost of every version by paradigm, the matrix version x test set, and what is missing."""
    parts: list[RenderableType] = []
    if comparison.results:
        parts += _summary_table(comparison)
        names = [version.name for version in comparison.plan.versions]
        for paradigm in comparison.paradigms:
            rows = [result for result in comparison.results if result.paradigm == paradigm]
            parts += _matrix_table(paradigm, rows, names) if rows else []
        parts.append(Text("(…) text newer than the version. * the best of its version; where several have a star,"))
        parts.append(Text("the seeds do not tell them apart. Lower is better."))
    else:
        parts.append(Text("No version has been released and evaluated yet."))
    for item in comparison.incomplete:
        parts.append(Text(f"{LABELS[item.paradigm]}, {item.path}, seed {item.seed}: {item.status}", style="yellow"))
    parts.append(Text(seeds_note(comparison)))
    parts += [Text(note) for note in [not_run_note(comparison)] if note is not None]
    return Group(*parts)


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
    columns = ["version", "paradigm", "all text so far", "newest text", "steps", "of PTFS"]
    table = _table(columns, names=2)
    for version in comparison.plan.versions:
        results = comparison.results_of(version.name)
        so_far, newest = ranking(results, "all_so_far"), ranking(results, "newest")
        for index, result in enumerate(results):
            table.add_row(
                version.name if index == 0 else "",
                SHORT_LABELS[result.paradigm],
                _marked(result, so_far, result.all_so_far.perplexity),
                _marked(result, newest, result.newest.perplexity),
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
        seen = names[: names.index(result.version) + 1]
        cells = [values.get(name, "–") if name in seen else f"({values.get(name, '–')})" for name in names]
        table.add_row(result.version, *cells)
    return _titled(f"{LABELS[paradigm]}: perplexity on each version’s test text", table)


def _tokens(steps: int, tokens_per_step: int | None) -> str:
    return "–" if tokens_per_step is None else tokens(steps * tokens_per_step)
