"""The report: one page that needs nothing but itself, with its figures beside it as files."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Any

from pathswitch.atomic import write_text_atomic
from pathswitch.errors import PathSwitchError
from pathswitch.report import plots, wording
from pathswitch.report.collect import Comparison, Quality, Spread, VersionResult, collect
from pathswitch.report.runs import Run
from pathswitch.report.style import BAND, COLOURS, DARK, INK, LINE, MUTED, PAPER
from pathswitch.versions import PARADIGMS

TEMPLATE = FilePath(__file__).parent / "templates" / "report.html.j2"
VARIABLES = {INK: "ink", MUTED: "muted", PAPER: "paper", BAND: "band", LINE: "line"} | {
    colour: paradigm for paradigm, colour in COLOURS.items()
}


@dataclass(frozen=True)
class Cell:
    """One value of the result table."""

    mean: str
    seed_range: str | None
    leads: bool


@dataclass(frozen=True)
class Row:
    """One paradigm's result for one version."""

    paradigm: str
    label: str
    n_seeds: int
    cells: tuple[Cell, ...]
    steps: str
    tokens: str
    ratio: str


def write_report(folders: Sequence[FilePath], out: FilePath) -> FilePath:
    """Write the page to ``out`` and its figures, as SVG and PNG, to the folder ``figures`` beside it; return ``out``.

    Raises:
        RunError: the folders do not belong together, or one of them is damaged.
        PathSwitchError: matplotlib or jinja2 is not installed.
    """
    comparisons = collect(folders)
    figures = {}
    for name, draw in _drawable(comparisons).items():
        file = out.parent / "figures" / f"{name}.svg"
        draw(file, file.with_suffix(".png"))
        figures[name] = file.read_text(encoding="utf-8")
    write_text_atomic(out, render(comparisons, figures))
    return out


def render(comparisons: Sequence[Comparison], figures: dict[str, str]) -> str:
    """Return the page as HTML, with a section per comparison where there are several.

    ``figures`` holds SVG text by figure name, and a missing one is left out.

    Raises:
        PathSwitchError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise PathSwitchError("the HTML report needs jinja2: pip install 'pathswitch[report]'") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    inlined = {name: Markup(inline_svg(svg, name)) for name, svg in figures.items()}
    return template.render(
        _facts(comparisons),
        views=[_view(comparison, _suffix(comparison, comparisons)) for comparison in comparisons],
        figures=inlined,
        light=[(name, colour) for colour, name in VARIABLES.items()],
        dark=[(name, DARK[colour]) for colour, name in VARIABLES.items()],
    )


def inline_svg(svg: str, name: str) -> str:
    """Make a figure part of a page: as wide as its place, in the page's colours, with ids that are its own."""
    body = svg[svg.index("<svg") :]
    opening, rest = body.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None, "matplotlib writes a viewBox"
    # matplotlib's own rule for all elements would apply to the whole page; the page has it for its figures.
    rest = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", rest)
    for colour, variable in VARIABLES.items():
        rest = rest.replace(colour, f"var(--{variable})")
    return f'<svg {view_box.group()} role="img" aria-labelledby="caption-{name}">{rest}'


def reproduce_commands(comparisons: Sequence[Comparison]) -> list[str]:
    """Return the commands that train these runs and write this page again."""
    trained = [
        f"pathswitch run plan{_suffix(comparison, comparisons)}.toml --out {shlex.quote(str(folder.folder))} "
        f"--paradigm {paradigm} --seed {folder.seed}"
        for comparison in comparisons
        for folder in comparison.folders
        for paradigm in folder.runs
    ]
    report = ["pathswitch", "report", *(str(folder.folder) for folder in _folders(comparisons))]
    return ["pip install 'pathswitch[report]'", *trained, shlex.join(report)]


def _folders(comparisons: Sequence[Comparison]) -> list[Run]:
    return [folder for comparison in comparisons for folder in comparison.folders]


def _suffix(comparison: Comparison, comparisons: Sequence[Comparison]) -> str:
    """Tell apart what exists once per comparison, where there are several."""
    return f"-{comparison.split}" if len(comparisons) > 1 else ""


def _drawable(comparisons: Sequence[Comparison]) -> dict[str, Callable[..., None]]:
    """Return the figures that there is something to draw for, in the order of the page."""
    first = comparisons[0]
    figures: dict[str, Callable[..., None]] = {
        "lr-paths": partial(plots.lr_paths, first.plan, tokens_per_step=first.tokens_per_step)
    }
    for comparison in comparisons:
        suffix = _suffix(comparison, comparisons)
        if plots.quality_points(comparison):
            figures[f"quality-cost{suffix}"] = partial(plots.quality_cost, comparison)
        if comparison.results:
            figures[f"perplexity-matrix{suffix}"] = partial(plots.perplexity_matrix, comparison)
        if any(run.losses for folder in comparison.folders for runs in folder.runs.values() for run in runs):
            figures[f"loss-curves{suffix}"] = partial(plots.loss_curves, comparison)
    return figures


def _facts(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Gather what the page shows of the plan and of all runs together, as text."""
    first, folders = comparisons[0], _folders(comparisons)
    cost = first.plan.cost
    return {
        "headline": _unbroken(wording.headline(first)),
        "splits": [comparison.split for comparison in comparisons],
        "seeds": sorted({folder.seed for folder in folders}),
        "path_switching_steps": f"{cost.path_switching_steps:,}",
        "ptfs_steps": f"{cost.ptfs_steps:,}",
        "ratio": wording.percent(cost.ratio_to_ptfs),
        "n_versions": len(first.plan.versions),
        "costs": [
            {
                "paradigm": paradigm,
                "label": wording.LABELS[paradigm],
                "meaning": wording.MEANINGS[paradigm],
                "steps": f"{cost.of(paradigm):,}",
                "tokens": _tokens(first, cost.of(paradigm)),
                "ratio": wording.percent(cost.of(paradigm) / cost.ptfs_steps),
                "run_with": [comparison.split for comparison in comparisons if paradigm in comparison.paradigms],
            }
            for paradigm in PARADIGMS
        ],
        "plan_text": first.folders[0].plan_text,
        "folders": folders,
        "environments": _environments(folders),
        "commands": reproduce_commands(comparisons),
    }


def _view(comparison: Comparison, suffix: str) -> dict[str, Any]:
    """Gather what the page shows of the runs of one split, as text."""
    versions = {version.name: _rows(comparison, version.name) for version in comparison.plan.versions}
    return {
        "split": comparison.split,
        "suffix": suffix,
        "title": wording.SPLIT_TITLES[comparison.split],
        "meaning": wording.SPLIT_MEANINGS[comparison.split],
        "columns": wording.heads(comparison),
        "summary": wording.summary(comparison),
        "findings": [_unbroken(sentence) for sentence in wording.findings(comparison)],
        "seeds_note": wording.seeds_note(comparison),
        "not_run_note": wording.not_run_note(comparison),
        "incomplete": [(wording.LABELS[i.paradigm], i.path, i.seed, i.status) for i in comparison.incomplete],
        "paths_drawn": "path_switching" in comparison.paradigms,
        "several_seeds": len(comparison.seeds) > 1,
        "versions": {name: rows for name, rows in versions.items() if rows},
    }


def _rows(comparison: Comparison, version: str) -> list[Row]:
    results = comparison.results_of(version)
    rankings = {column: wording.ranking(results, column) for column in wording.COLUMNS[comparison.split]}

    def cells(result: VersionResult, values_of: Callable[[Quality], Spread], number: Callable[[float], str]) -> Any:
        for column, ranked in rankings.items():
            values = values_of(wording.quality_of(result, column))
            leads = len(ranked.ordered) > 1 and result in ranked.leaders
            yield Cell(number(values.mean), wording.seed_range(values, number), leads)

    return [
        Row(
            paradigm=result.paradigm,
            label=wording.LABELS[result.paradigm],
            n_seeds=len(result.seeds),
            cells=(
                *cells(result, lambda quality: quality.perplexity, wording.perplexity),
                *cells(result, lambda quality: quality.bits_per_byte, wording.bits),
            ),
            steps=f"{result.steps:,}",
            tokens=_tokens(comparison, result.steps),
            ratio=wording.percent(result.ratio_to_ptfs),
        )
        for result in results
    ]


def _unbroken(sentence: str) -> str:
    """Keep a percentage on one line."""
    return sentence.replace(" %", "\N{NO-BREAK SPACE}%")


def _tokens(comparison: Comparison, steps: int) -> str:
    return "–" if comparison.tokens_per_step is None else wording.tokens(steps * comparison.tokens_per_step)


def _environments(folders: Sequence[Run]) -> list[tuple[list[str], dict[str, Any]]]:
    """Return each environment once, with the folders that were trained in it."""
    grouped: list[tuple[list[str], dict[str, Any]]] = []
    for folder in folders:
        same = next((names for names, environment in grouped if environment == folder.environment), None)
        if same is None:
            grouped.append(([str(folder.folder)], folder.environment))
        else:
            same.append(str(folder.folder))
    return grouped
