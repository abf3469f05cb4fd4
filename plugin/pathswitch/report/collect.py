"""From run folders to comparisons, one per split: quality and cost of every version, by paradigm, over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any

from pathswitch.config import PlanFile
from pathswitch.errors import RunError
from pathswitch.report.runs import PathRun, Run, Split, read_run, trained_on
from pathswitch.score import Score
from pathswitch.versions import PARADIGMS, Cost, Paradigm, Plan

# The order in which comparisons stand: as text comes in reality, then as in the paper.
SPLITS: tuple[Split, ...] = ("temporal", "iid")
# [deepspeed] says how a machine computes, not what; everything else must agree for numbers to stand side by side.
COMPARED_SECTIONS = ("schedule", "versions", "baselines", "model", "data", "train")
# What may differ: the two views of one plan, its repetitions, and how often it is saved, which changes nothing trained.
FREE_SETTINGS = (("data", "split"), ("train", "seed"), ("train", "save_every_steps"))


@dataclass(frozen=True)
class Spread:
    """One value per seed: a mean, and the range that seeds alone explain."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Return the mean over seeds."""
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        """Return the lowest value."""
        return min(self.values)

    @property
    def high(self) -> float:
        """Return the highest value."""
        return max(self.values)


@dataclass(frozen=True)
class Quality:
    """How well a version knows some text, over seeds; lower is better in both units."""

    perplexity: Spread
    bits_per_byte: Spread


@dataclass(frozen=True)
class VersionResult:
    """One released version of one paradigm: what it cost up to here, and what it knows."""

    paradigm: Paradigm
    version: str
    seeds: tuple[int, ...]
    steps: int
    """Steps that the paradigm trains for all versions up to and including this one."""
    ratio_to_ptfs: float
    """These steps over those of pre-training every version so far from scratch."""
    trained_on: tuple[str, ...]
    """Versions whose text it has seen: those up to this one, or with split = "iid" all of them."""
    all_so_far: Quality
    """On the test text of the versions in ``trained_on``, pooled."""
    newest: Quality
    """On this version's own test text."""
    test_sets: dict[str, Quality]
    """A row of the matrix version x test set: every version's test text, later ones too where they were evaluated."""


@dataclass(frozen=True)
class Incomplete:
    """A planned path without a complete result."""

    paradigm: Paradigm
    path: str
    seed: int
    done_steps: int
    steps: int
    trained: bool
    """Training is complete; only the evaluation of the release is missing."""

    @property
    def status(self) -> str:
        """Say how far it is."""
        if self.trained:
            return "trained, not evaluated"
        return f"not complete ({self.done_steps:,} of {self.steps:,} steps)"


@dataclass(frozen=True)
class Comparison:
    """All that a report shows of the runs of one split."""

    folders: tuple[Run, ...]
    results: tuple[VersionResult, ...]
    incomplete: tuple[Incomplete, ...]

    @property
    def plan_file(self) -> PlanFile:
        """The plan file that all folders share, but for FREE_SETTINGS."""
        return self.folders[0].plan_file

    @property
    def plan(self) -> Plan:
        """The plan that all folders share."""
        return self.folders[0].plan

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one optimizer step, or None where the plan does not say."""
        return self.plan_file.tokens_per_step

    @property
    def split(self) -> Split:
        """How the text was dealt to the versions."""
        return self.folders[0].split

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """All seeds, in order."""
        return tuple(sorted({folder.seed for folder in self.folders}))

    @cached_property
    def paradigms(self) -> tuple[Paradigm, ...]:
        """Paradigms that were run or begun, in the order of PARADIGMS."""
        return tuple(p for p in PARADIGMS if any(p in folder.runs for folder in self.folders))

    def seeds_of(self, paradigm: Paradigm) -> tuple[int, ...]:
        """Seeds that a paradigm was run with, or begun."""
        return tuple(sorted(folder.seed for folder in self.folders if paradigm in folder.runs))

    @property
    def not_run(self) -> tuple[Paradigm, ...]:
        """Paradigms that no folder holds."""
        return tuple(p for p in PARADIGMS if p not in self.paradigms)

    def results_of(self, version: str) -> tuple[VersionResult, ...]:
        """Return the results of one version, in the order of PARADIGMS."""
        return tuple(result for result in self.results if result.version == version)

    @cached_property
    def focus(self) -> str | None:
        """The last version that two paradigms have released, or else the last released one: what to look at first."""
        released = [v.name for v in self.plan.versions if self.results_of(v.name)]
        compared = [name for name in released if len(self.results_of(name)) > 1]
        candidates = compared or released
        return candidates[-1] if candidates else None


def collect(folders: Sequence[FilePath]) -> tuple[Comparison, ...]:
    """Read run folders of one plan (other paradigms, seeds, splits) into one comparison per split, in order of SPLITS.

    Raises:
        RunError: no folder, folders whose plans differ, or one split, paradigm and seed twice.
        ConfigError: a folder's plan cannot be loaded.
    """
    if not folders:
        raise RunError("report: given no run folder; allowed: at least one")
    read = tuple(read_run(folder) for folder in folders)
    if not read[0].plan.versions:
        raise RunError(f"{read[0].folder / 'plan.toml'}: given no [[versions]]; allowed: at least one to report on")
    for other in read[1:]:
        _check_same_plan(read[0], other)
    _check_same_text(read)
    groups = (tuple(folder for folder in read if folder.split == split) for split in SPLITS)
    return tuple(_comparison(group) for group in groups if group)


def cost_up_to(plan: Plan, n_versions: int) -> Cost:
    """Return what the first ``n_versions`` versions of a plan cost on their own."""
    return replace(plan, versions=plan.versions[:n_versions]).cost


def _comparison(read: tuple[Run, ...]) -> Comparison:
    _check_disjoint(read)
    paradigms = [p for p in PARADIGMS if any(p in folder.runs for folder in read)]
    rows = [_result(read, p, index) for index in range(len(read[0].plan.versions)) for p in paradigms]
    incomplete = [
        Incomplete(paradigm, run.path.name, folder.seed, len(run.losses), run.path.steps, run.complete)
        for folder in read
        for paradigm, runs in folder.runs.items()
        for run in runs
        if not _finished(run)
    ]
    return Comparison(read, tuple(row for row in rows if row is not None), tuple(incomplete))


def _finished(run: PathRun) -> bool:
    return run.complete and (run.path.release is None or run.test_sets is not None)


def _result(folders: tuple[Run, ...], paradigm: Paradigm, index: int) -> VersionResult | None:
    plan = folders[0].plan
    version = plan.versions[index].name
    of_seed = {
        folder.seed: run.test_sets
        for folder in sorted(folders, key=lambda folder: folder.seed)
        for run in folder.runs.get(paradigm, ())
        if run.path.release == version and run.complete and run.test_sets is not None
    }
    if not of_seed:
        return None
    seen = trained_on(plan, folders[0].split, version)
    cost = cost_up_to(plan, index + 1)
    return VersionResult(
        paradigm=paradigm,
        version=version,
        seeds=tuple(of_seed),
        steps=cost.of(paradigm),
        ratio_to_ptfs=cost.of(paradigm) / cost.ptfs_steps,
        trained_on=seen,
        all_so_far=_quality([Score.pooled(sets[name] for name in seen) for sets in of_seed.values()]),
        newest=_quality([sets[version] for sets in of_seed.values()]),
        test_sets={
            v.name: _quality([sets[v.name] for sets in of_seed.values()])
            for v in plan.versions
            if all(v.name in sets for sets in of_seed.values())
        },
    )


def _quality(scores: list[Score]) -> Quality:
    return Quality(Spread(tuple(s.perplexity for s in scores)), Spread(tuple(s.bits_per_byte for s in scores)))


def _check_same_plan(first: Run, other: Run) -> None:
    ours, theirs = (folder.plan_file.model_dump() for folder in (first, other))
    for plan in (ours, theirs):
        for section, key in FREE_SETTINGS:
            if plan[section] is not None:
                del plan[section][key]
    allowed = ", ".join(f"[{section}] {key}" for section, key in FREE_SETTINGS)
    for section in COMPARED_SECTIONS:
        difference = _difference(ours[section], theirs[section], f"[{section}]")
        if difference is not None:
            field, here, there = difference
            raise RunError(
                f"{other.folder}: given {field} = {there!r}; allowed: {here!r}, as in {first.folder} "
                f"(a comparison needs one plan; only {allowed} may differ)"
            )


def _difference(ours: Any, theirs: Any, where: str) -> tuple[str, Any, Any] | None:
    """Return the first field that differs, with both values."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = list(ours)
        pairs = [(f"{where} {key}", ours[key], theirs[key]) for key in keys]
    elif where == "[versions]" and len(ours) == len(theirs):
        pairs = [(f"[[versions]] number {i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True), 1)]
    elif where == "[versions]":
        return "the number of [[versions]]", len(ours), len(theirs)
    else:
        return None if ours == theirs else (where, ours, theirs)
    found = (_difference(a, b, place) for place, a, b in pairs)
    return next((difference for difference in found if difference is not None), None)


def _check_disjoint(folders: tuple[Run, ...]) -> None:
    holder: dict[tuple[Paradigm, int], FilePath] = {}
    for folder in folders:
        for paradigm in folder.runs:
            key = (paradigm, folder.seed)
            if key in holder:
                raise RunError(
                    f"{folder.folder}: given {paradigm} with seed {folder.seed}, which {holder[key]} holds too; "
                    "allowed: each paradigm and seed once"
                )
            holder[key] = folder.folder


def _check_same_text(folders: tuple[Run, ...]) -> None:
    """Refuse to compare models of one seed that were scored on different text, or in different tokens."""
    sizes: dict[tuple[int, str], tuple[int, int]] = {}
    for folder in folders:
        for runs in folder.runs.values():
            for run in runs:
                for name, score in (run.test_sets or {}).items():
                    size = (score.tokens, score.n_bytes)
                    expected = sizes.setdefault((folder.seed, name), size)
                    if size != expected:
                        raise RunError(
                            f"{folder.folder / run.path.paradigm / run.path.name}: test set {name!r} has {size[0]} "
                            f"tokens in {size[1]} bytes; allowed: {expected[0]} in {expected[1]}, as in the other paths"
                        )
