"""How numbers and findings are put into words: one wording for the terminal, the figures and the page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from pathswitch.report.collect import Comparison, Quality, Spread, VersionResult
from pathswitch.report.runs import Split
from pathswitch.versions import Paradigm

LABELS: dict[Paradigm, str] = {
    "path_switching": "path switching",
    "ptfs": "from scratch (PTFS)",
    "cpt_rewarm": "CPT re-warmed",
    "cpt_floor": "CPT at the floor LR",
    "wsd_s": "WSD-S",
}
SHORT_LABELS: dict[Paradigm, str] = {**LABELS, "ptfs": "PTFS", "cpt_floor": "CPT at floor"}
MEANINGS: dict[Paradigm, str] = {
    "path_switching": "One main path at the maximum LR; a branch forks for each version and decays the LR completely.",
    "ptfs": "Pre-training from scratch: each version is trained anew on all data so far.",
    "cpt_rewarm": "Continual pre-training: each version continues from the one before, with its own warm-up and decay.",
    "cpt_floor": "Continual pre-training: each version continues from the one before at a constant low LR.",
    "wsd_s": "One path: each version decays at its end; the next goes on from there at the maximum LR.",
}
_NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten")
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))

SPLIT_TITLES: dict[Split, str] = {"temporal": "Text split by time", "iid": "Text split i.i.d."}
SPLIT_MEANINGS: dict[Split, str] = {
    "temporal": "A version’s steps see that version’s text alone, which is newer than the text of the versions before "
    "it, as in real updates. Text drifts, so there is forgetting: pre-training from scratch, which sees all text so "
    "far in mixed order, can win on old text, while path switching and continual pre-training, which see the newest "
    "text last, can win on the newest.",
    "iid": "Every step of every version draws from one pool, the shuffled text of all versions: the setting of the "
    "method’s paper. No text is older or newer, so there is nothing to forget; what is compared is what each paradigm "
    "makes of its steps. Every version is measured on the test text of all versions.",
}

Column = Literal["all_so_far", "newest"]
# With one pool of text for all versions none of it is new.
COLUMNS: dict[Split, dict[Column, str]] = {
    "temporal": {"all_so_far": "all text so far", "newest": "the newest text"},
    "iid": {"all_so_far": "all text"},
}


@dataclass(frozen=True)
class Ranking:
    """The results of one version on one kind of text, best first."""

    ordered: tuple[VersionResult, ...]
    leaders: tuple[VersionResult, ...]
    """The best, and whoever follows it up to the last whose range over seeds touches its range."""


def spread_of(result: VersionResult, column: Column) -> Spread:
    """Return the perplexities of one column of the result table."""
    return quality_of(result, column).perplexity


def quality_of(result: VersionResult, column: Column) -> Quality:
    """Return what one column of the result table is about."""
    return result.all_so_far if column == "all_so_far" else result.newest


def ranking(results: Iterable[VersionResult], column: Column) -> Ranking:
    """Order results by their mean perplexity, lowest first; those that diverged do not take part."""
    finite = [result for result in results if isfinite(spread_of(result, column).mean)]
    ordered = tuple(sorted(finite, key=lambda result: spread_of(result, column).mean))
    last = max((i for i, result in enumerate(ordered) if _touch(result, ordered[0], column)), default=-1)
    return Ranking(ordered, ordered[: last + 1])


def headline(comparison: Comparison) -> str:
    """Say what the plan costs: a fact of the plan, whatever has been run."""
    n_versions, cost = len(comparison.plan.versions), comparison.plan.cost
    number = _NUMBERS[n_versions] if n_versions < len(_NUMBERS) else f"{n_versions}"
    return (
        f"{number} version{'s' if n_versions != 1 else ''} by path switching: {percent(cost.ratio_to_ptfs)} of "
        f"pre-training from scratch’s steps"
    )


def findings(comparison: Comparison) -> list[str]:
    """Say who is best at the last version that can be compared, whoever it is."""
    version = comparison.focus
    if version is None:
        return ["No version has been released and evaluated yet."]
    results, columns = comparison.results_of(version), COLUMNS[comparison.split]
    sentences = [_verdict(f"{version} on {text}", ranking(results, column), column) for column, text in columns.items()]
    return [*sentences, *_against_cpt(results, columns["all_so_far"])]


def summary(comparison: Comparison) -> str:
    """Name the best at the last version that can be compared, in one line."""
    results = comparison.results_of(comparison.focus) if comparison.focus is not None else ()
    if len(results) < 2:
        return "no two paradigms have released the same version yet."
    best = [_leaders(ranking(results, column), text) for column, text in COLUMNS[comparison.split].items()]
    return f"at {comparison.focus}, {', '.join(best)}."


def seeds_note(comparison: Comparison) -> str:
    """Say what a difference between two numbers is worth."""
    seeds = comparison.seeds
    if len(seeds) == 1:
        return (
            f"One seed ({seeds[0]}): there is no range to judge differences by. Two runs that differ in nothing but "
            "their seed can be several percent apart."
        )
    listed = ", ".join(map(str, seeds))
    return (
        f"{len(seeds)} seeds ({listed}): the mean, and below it the lowest and the highest value. Differences within "
        "these ranges mean nothing." + _fewer_seeds(comparison)
    )


def not_run_note(comparison: Comparison) -> str | None:
    """Name the paradigms that are missing from the comparison."""
    missing = comparison.not_run
    return f"Not run: {', '.join(LABELS[paradigm] for paradigm in missing)}." if missing else None


def heads(comparison: Comparison) -> list[str]:
    """Name what quality is measured on, for the heads of narrow columns."""
    return [text.removeprefix("the ") for text in COLUMNS[comparison.split].values()]


def percent(ratio: float) -> str:
    """Format a ratio with one decimal: 58.0 %."""
    return f"{100 * ratio:.1f} %"


def perplexity(value: float) -> str:
    """Format a perplexity with about three digits that matter."""
    if not isfinite(value):
        return "diverged"
    if value < 10:
        return f"{value:.2f}"
    return f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def compact(value: float) -> str:
    """Format a perplexity in at most four characters, for the cells of a matrix."""
    if not isfinite(value):
        return "div."
    for size, unit in _UNITS:
        if value >= size:
            short = value / size
            return f"{short:.1f}{unit}" if short < 9.95 else f"{short:.0f}{unit}" if short < 1000 else "huge"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def bits(value: float) -> str:
    """Format bits per byte."""
    return f"{value:.3f}" if isfinite(value) else "diverged"


def seed_range(values: Spread, number: Callable[[float], str] = perplexity) -> str | None:
    """Format the range over seeds, or None where there is one seed."""
    if len(values.values) == 1 or not isfinite(values.mean):
        return None
    return f"{number(values.low)}–{number(values.high)}"


def tokens(count: float) -> str:
    """Format a number of tokens: 1.19 M."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"


def learning_rate(value: float) -> str:
    """Format an LR without padding: 0.003, 2.5e-5."""
    return f"{value:.4g}".replace("e-0", "e-")


def _fewer_seeds(comparison: Comparison) -> str:
    """Name the paradigms that were run with some of the seeds only."""
    seeds_of = {paradigm: comparison.seeds_of(paradigm) for paradigm in comparison.paradigms}
    fewer = [
        f"{LABELS[paradigm]} with seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))} only"
        for paradigm, seeds in seeds_of.items()
        if seeds != comparison.seeds
    ]
    return f" Run {'; '.join(fewer)}." if fewer else ""


def _touch(a: VersionResult, b: VersionResult, column: Column) -> bool:
    one, other = spread_of(a, column), spread_of(b, column)
    return one.low <= other.high and other.low <= one.high


def _leaders(ranked: Ranking, text: str) -> str:
    names = " and ".join(LABELS[result.paradigm] for result in ranked.leaders)
    verb = {0: "every run diverged", 1: f"{names} is best"}
    return f"{verb.get(len(ranked.leaders), f'{names} are best')} on {text}"


def _verdict(where: str, ranked: Ranking, column: Column) -> str:
    if not ranked.ordered:
        return f"{where}: every run diverged."
    names = [LABELS[result.paradigm] for result in ranked.ordered]
    values = [perplexity(spread_of(result, column).mean) for result in ranked.ordered]
    listed = [f"{name} {value}" for name, value in zip(names, values, strict=True)]
    if len(listed) == 1:
        return f"{where}: {names[0]} has perplexity {values[0]}, and nothing to compare with."
    if (n_leaders := len(ranked.leaders)) > 1:
        rest = f"; behind them {', '.join(listed[n_leaders:])}" if listed[n_leaders:] else ""
        together = " and ".join(listed[:n_leaders])
        return f"{where}: perplexity {together} cannot be told apart within the range over seeds{rest}."
    return f"{where}: {names[0]} is best with perplexity {values[0]}, before {', '.join(listed[1:])}."


def _against_cpt(results: tuple[VersionResult, ...], text: str) -> list[str]:
    """Weigh path switching against the usual way to update a model, which is cheaper."""
    of = {result.paradigm: result for result in results}
    if "path_switching" not in of or "cpt_rewarm" not in of:
        return []
    ours, theirs = of["path_switching"], of["cpt_rewarm"]
    here, there = (spread_of(result, "all_so_far").mean for result in (ours, theirs))
    if not (isfinite(here) and isfinite(there)):
        return []
    change = here / there - 1
    if _touch(ours, theirs, "all_so_far"):
        quality = f"a perplexity on {text} within the range over seeds"
    else:
        quality = f"a perplexity on {text} {percent(abs(change))} {'lower' if change < 0 else 'higher'}"
    more = ours.steps / theirs.steps - 1
    return [f"Path switching against {LABELS['cpt_rewarm']}: {quality}, for {percent(more)} more steps."]
