"""``pathswitch fork``: find the checkpoint at the fork step, say what the branch takes from it, and fork it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path

from rich.console import Console

from pathswitch.checkpoint import (
    MEGATRON,
    Manifest,
    Policy,
    committed_checkpoints,
    layout_of,
    read_key,
    read_manifest,
)
from pathswitch.checkpoint.fork import CompareMode, Fork, fork_checkpoint
from pathswitch.checkpoint.manifest import SHORT_DIGEST
from pathswitch.cli.run_checkpoints import (
    ByteProgress,
    compare_mode,
    path_lock,
    recorded_checkpoints,
    records_of,
    say,
)
from pathswitch.errors import CheckpointError, ConfigError, RunError, choices
from pathswitch.launch.gate import record_fork
from pathswitch.run_folder import PLAN_FILE, RunFolder, tag
from pathswitch.versions import MAIN, Plan
from pathswitch.versions import Path as TrainingPath
from pathswitch.versions.records import CheckpointRecord


def fork_policy(
    reset_moments: bool, beta2: float | None, weight_decay: float | None, gradient_clipping: float | None
) -> Policy:
    """Return the checked changes of a fork.

    Raises:
        ConfigError: a value is out of range.
    """
    if beta2 is not None and not 0 < beta2 < 1:
        raise ConfigError("--beta2", given=beta2, allowed="0 < beta2 < 1")
    for option, value in (("--weight-decay", weight_decay), ("--gradient-clipping", gradient_clipping)):
        if value is not None and not (isfinite(value) and value >= 0):
            raise ConfigError(option, given=value, allowed="a finite number >= 0")
    return Policy(
        reset_moments=reset_moments, beta2=beta2, weight_decay=weight_decay, gradient_clipping=gradient_clipping
    )


def fork_branch(
    run: Path,
    source: str,
    to: str,
    policy: Policy,
    *,
    verify: str,
    key_file: Path | None,
    into: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Fork a branch of the run's plan from the checkpoint that ``source`` names, and record it in the ledger.

    Raises:
        ConfigError: the plan has no such branch, or it does not fork from there.
        CheckpointError: there is no such checkpoint, it cannot be used, or the branch has others.
        RunError: a job is training the branch.
    """
    folder = RunFolder(run)
    plan = folder.plan()
    branch = _branch(plan, to)
    parent = plan.path(branch.parent or MAIN)
    key = read_key(key_file)
    mode = compare_mode("--verify", verify, key)
    found = _find_source(folder, parent, branch, source, key)
    manifest = read_manifest(found, key)
    if manifest.schedule_digest != parent.digest:
        raise CheckpointError(
            f"{found}: trained by another schedule than path {parent.name!r} of {run / PLAN_FILE} (digest "
            f"{manifest.schedule_digest}, the plan's {parent.digest}): its branch would be refused"
        )
    _require_applicable(found, manifest, policy)
    target = (into or folder.path(branch).checkpoints) / found.name
    for line in _fork_lines(parent, branch, found, manifest, policy, target):
        say(console, line)
    if dry_run:
        return
    with path_lock(folder.path(branch), shared=True) as held:
        if held is False:
            raise RunError(f"{folder.path(branch).folder}: a job is training {to!r}; fork it before it is trained")
        fork = _fork(found, target, manifest, branch, policy, key, mode)
    record_fork(folder, branch, fork.folder, fork.manifest)
    how = f"forked by {fork.method}" if fork.created else "forked already"
    say(console, f"{to}: {how}: {fork.folder}")


def _require_applicable(found: Path, manifest: Manifest, policy: Policy) -> None:
    """Refuse changes that nothing would apply; raises ConfigError."""
    if layout_of(manifest) is MEGATRON and policy != Policy():
        given = ", ".join(f"--{name.replace('_', '-')}" for name in policy.changes())
        allowed = "none: the branch's job takes its settings from Megatron's own arguments; only the LR is the plan's"
        raise ConfigError(f"changes of a fork of Megatron's checkpoint {found.name}", given=given, allowed=allowed)


def _branch(plan: Plan, to: str) -> TrainingPath:
    names = [path.name for path in plan.paths("path_switching") if path.parent is not None]
    if to not in names:
        raise ConfigError("--to", given=to, allowed=f"a branch of the plan: {choices(names, to)}")
    branch = plan.path(to)
    if branch.start_step == 0:
        allowed = "a branch that forks after step 0: this one starts from scratch, with the settings of its own job"
        raise ConfigError("--to", given=to, allowed=allowed)
    return branch


def _find_source(folder: RunFolder, parent: TrainingPath, branch: TrainingPath, source: str, key: bytes | None) -> Path:
    """Return the checkpoint folder that ``main@STEP``, ``main@latest`` or ``latest`` means.

    Raises:
        ConfigError: it is written in another way, or is not the branch's fork.
        CheckpointError: there is no committed checkpoint at the fork step.
    """
    committed = _committed(folder, parent, key)
    steps = ", ".join(map(str, sorted({step for step, _ in committed}))) or "none"
    there = f"committed checkpoints of {parent.name}: {steps}"
    match = re.fullmatch(rf"(?:{re.escape(parent.name)}@)?latest|{re.escape(parent.name)}@(\d+)", source)
    if match is None:
        allowed = f"{parent.name}@STEP, {parent.name}@latest or latest; {there}"
        raise ConfigError("the checkpoint to fork", given=source, allowed=allowed)
    step = int(match[1]) if match[1] else max((step for step, _ in committed), default=branch.start_step)
    if step != branch.start_step:
        given = source if match[1] else f"{source} (step {step})"
        allowed = f"{parent.name}@{branch.start_step}, where {branch.name} forks by the plan; {there}"
        raise ConfigError("the checkpoint to fork", given=given, allowed=allowed)
    for committed_step, found in committed:
        if committed_step == step:
            return found
    if (damaged := folder.path(parent).checkpoints / tag(step)).is_dir():
        return damaged  # what is wrong with it is said where it is read
    raise CheckpointError(
        f"{folder.out}: {parent.name} has no committed checkpoint at step {step}, where {branch.name} forks; {there}"
    )


def _committed(folder: RunFolder, path: TrainingPath, key: bytes | None) -> list[tuple[int, Path]]:
    """Return (step, folder) of a path's committed checkpoints, those in the run folder first."""
    places = [found for found, _ in committed_checkpoints(folder.path(path).checkpoints, key)]
    records = [record for record in records_of(folder.out) if isinstance(record, CheckpointRecord)]
    places += recorded_checkpoints(folder.out, [r for r in records if (r.paradigm, r.path) == _identity(path)])
    found = []
    for place in places:
        try:
            manifest = read_manifest(place, key)
        except CheckpointError:
            continue
        if (manifest.paradigm, manifest.path) == _identity(path):
            found.append((manifest.step, place))
    return found


def _identity(path: TrainingPath) -> tuple[str, str]:
    return path.paradigm, path.name


def _fork_lines(
    parent: TrainingPath, branch: TrainingPath, found: Path, manifest: Manifest, policy: Policy, target: Path
) -> Iterator[str]:
    """Say what a fork takes, keeps and changes."""
    fork_step = branch.start_step
    cut = f"world size {manifest.parallelism.world_size}, ZeRO stage {manifest.parallelism.zero_stage}"
    tokens = "" if manifest.tokens_seen is None else f", {manifest.tokens_seen:,} tokens"
    yield f"fork        {branch.name} from {parent.name} at step {fork_step}, into {target}"
    yield f"checkpoint  {found}"
    yield f"            manifest {manifest.digest[:SHORT_DIGEST]}, {cut}"
    yield f"            step {manifest.step}, {manifest.samples_seen:,} samples{tokens}"
    yield f"LR at step  {'':>10}  {parent.name:<24}{branch.name}"
    for step in range(fork_step - 1, fork_step + 2):
        yield f"            {step:>10}  {parent.lr(step)!r:<24}{branch.lr(step)!r}"
    moments = "" if policy.reset_moments else "Adam's moments and step, "
    yield f"kept        weights, {moments}random states, place in the data"
    values = policy.model_dump(exclude_defaults=True, exclude={"reset_moments"})
    changes = ["path and LR schedule", *["Adam's moments and step begin at zero"] * policy.reset_moments]
    yield f"changed     {', '.join([*changes, *(f'{name} = {value}' for name, value in values.items())])}"


def _fork(
    found: Path,
    target: Path,
    manifest: Manifest,
    branch: TrainingPath,
    policy: Policy,
    key: bytes | None,
    mode: CompareMode,
) -> Fork:
    total = sum(entry.size for entry in manifest.files.values())
    with ByteProgress() as progress:
        return fork_checkpoint(
            found,
            target,
            policy=policy,
            paradigm=branch.paradigm,
            path=branch.name,
            key=key,
            verify=mode,
            verifying=progress.ticker("verifying", total),
            copying=progress.ticker("copying", total),
        )
