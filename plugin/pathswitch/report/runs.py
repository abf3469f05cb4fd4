"""One run folder, read and checked: what was trained, how far it came, and how its releases were scored."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isclose, isfinite
from pathlib import Path as FilePath
from typing import Any, Literal

from pathswitch.config import PlanFile, build_plan, load_plan_file
from pathswitch.errors import RunError
from pathswitch.run_folder import FORMAT, PLAN_FILE, RUN_FILE, PathFolder
from pathswitch.score import Score
from pathswitch.versions import PARADIGMS, Paradigm, Path, Plan

Split = Literal["temporal", "iid"]


@dataclass(frozen=True)
class PathRun:
    """One training job of a run folder."""

    path: Path
    losses: dict[int, float]
    """Training loss of every update on record, by step, in order."""
    complete: bool
    """Its completion record is there."""
    test_sets: dict[str, Score] | None
    """Score of its release on each version's test text, as far as it was evaluated; None without an evaluation."""


@dataclass(frozen=True)
class Run:
    """One run folder: one plan, one seed, one or more paradigms."""

    folder: FilePath
    seed: int
    ranks: int
    environment: dict[str, Any]
    split: Split
    """How the text was dealt to the versions."""
    plan_file: PlanFile
    plan_text: str
    runs: dict[Paradigm, tuple[PathRun, ...]]

    @cached_property
    def plan(self) -> Plan:
        """The plan, resolved into paths."""
        return build_plan(self.plan_file, str(self.folder / PLAN_FILE))


def read_run(folder: FilePath) -> Run:
    """Read one run folder; a paradigm counts as run when its folder is there.

    Raises:
        RunError: a file is missing, is not what the trainer writes, or disagrees with the plan.
        ConfigError: the folder's plan cannot be loaded.
    """
    record_file = folder / RUN_FILE
    record = _load(record_file)
    if record.get("format") != FORMAT:
        raise RunError(f"{record_file}: given format {record.get('format')!r}; allowed: {FORMAT}")
    plan_file = load_plan_file(folder / PLAN_FILE)
    if plan_file.data is None:
        raise RunError(f"{folder / 'plan.toml'}: [data] is missing; allowed: a plan that says how its text is split")
    split = plan_file.data.split
    plan = build_plan(plan_file, str(folder / PLAN_FILE))
    runs = {
        paradigm: tuple(_path_run(folder / paradigm, path, plan, split) for path in plan.paths(paradigm))
        for paradigm in PARADIGMS
        if (folder / paradigm).is_dir()
    }
    return Run(
        folder=folder,
        seed=_field(record, "seed", record_file),
        ranks=_field(record, "ranks", record_file),
        environment=_field(record, "environment", record_file),
        split=split,
        plan_file=plan_file,
        plan_text=(folder / PLAN_FILE).read_text(encoding="utf-8"),
        runs=runs,
    )


def trained_on(plan: Plan, split: Split, version: str) -> tuple[str, ...]:
    """Name the versions whose text a version has been trained on: those up to it, or with one pool of text all."""
    names = tuple(v.name for v in plan.versions)
    return names if split == "iid" else names[: names.index(version) + 1]


def _path_run(folder: FilePath, path: Path, plan: Plan, split: Split) -> PathRun:
    files = PathFolder(folder / path.name)
    losses = dict(sorted(_updates(files.metrics)))
    complete = _is_complete(files.completion, path)
    scored = path.release is not None and files.evaluation.is_file()
    return PathRun(path, losses, complete, _test_sets(files.evaluation, path, plan, split) if scored else None)


def _updates(file: FilePath) -> Iterator[tuple[int, float]]:
    """Yield (step, loss); a line without an end is still being written and does not count yet."""
    if not file.is_file():
        return
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return
        try:
            update = json.loads(line)
            yield int(update["step"]), float(update["loss"])
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{file}, line {number}: not an update with a step and a loss ({error})") from None


def _is_complete(file: FilePath, path: Path) -> bool:
    """Say whether the completion record reaches the path's end; the main path's end moves with every new version."""
    if not file.is_file():
        return False
    done = _load(file)
    start_step, end_step = _field(done, "start_step", file), _field(done, "end_step", file)
    if path.open_ended:
        return bool(end_step >= path.end_step)
    if (start_step, end_step) != (path.start_step, path.end_step):
        raise RunError(
            f"{file}: given steps {start_step} to {end_step}; allowed: {path.start_step} to {path.end_step}, "
            "as the plan has it"
        )
    return True


def _test_sets(file: FilePath, path: Path, plan: Plan, split: Split) -> dict[str, Score]:
    evaluation = _load(file)
    if (step := _field(evaluation, "step", file)) != path.end_step:
        raise RunError(f"{file}: given step {step}; allowed: {path.end_step}, where the plan releases the version")
    entries = _field(evaluation, "test_sets", file)
    names = [version.name for version in plan.versions]
    # Versions that were added to the plan after this release have no entry; all that it was trained on must be there.
    required = trained_on(plan, split, path.name)
    scored = [name for name in names if name in required or name in entries]
    return {name: _score(_field(entries, name, file), name, file) for name in scored}


def _score(entry: dict[str, Any], version: str, file: FilePath) -> Score:
    score = Score(
        float(_field(entry, "nll_nats", file)),
        int(_field(entry, "tokens", file)),
        int(_field(entry, "n_bytes", file)),
    )
    if score.tokens < 1 or score.n_bytes < 1:
        raise RunError(f"{file}: test set {version!r} is empty; allowed: at least one token")
    # A mean where the total belongs would pool to a wrong number without anybody noticing.
    stated = float(_field(entry, "perplexity", file))
    if isfinite(score.perplexity) and not isclose(score.perplexity, stated, rel_tol=1e-3):
        raise RunError(
            f"{file}: test set {version!r} has perplexity {stated}, but exp(nll_nats / tokens) = {score.perplexity:.6g}"
        )
    return score


def _load(file: FilePath) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file}: not a run folder's file that can be read ({error.strerror})") from None
    except ValueError as error:
        raise RunError(f"{file}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise RunError(f"{file}: given a {type(content).__name__}; allowed: a JSON object")
    return content


def _field(record: dict[str, Any], key: str, file: FilePath) -> Any:
    if key not in record:
        raise RunError(f"{file}: {key!r} is missing")
    return record[key]
