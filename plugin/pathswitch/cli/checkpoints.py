"""``pathswitch verify``, ``gc`` and ``adopt``: whole runs, and checkpoints that no manifest vouches for yet."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from pathswitch.checkpoint import (
    MANIFEST_FILE,
    Finding,
    Manifest,
    check_files,
    check_names,
    checkpoint_folders,
    describe_findings,
    layout_of,
    read_key,
    read_manifest,
)
from pathswitch.checkpoint.commit import discard
from pathswitch.checkpoint.fork import CompareMode
from pathswitch.checkpoint.retention import (
    Decision,
    PlannedPath,
    Stored,
    decide,
    finish_pruning,
    freed_bytes,
    hidden_leftovers,
    prune,
    unfinished_prunings,
)
from pathswitch.cli.run_checkpoints import (
    ByteProgress,
    compare_mode,
    path_lock,
    recorded_checkpoints,
    records_of,
    say,
    trained_paths,
)
from pathswitch.config import build_plan, load_plan_file
from pathswitch.errors import CheckpointError, ConfigError, RunError
from pathswitch.run_folder import RunFolder
from pathswitch.versions import PARADIGMS
from pathswitch.versions.ledger import folder_name, run_ledger
from pathswitch.versions.records import BranchRecord, PrunedRecord, Record, ReleaseRecord


@dataclass(frozen=True)
class Verified:
    """What verification found in one folder."""

    folder: Path
    manifest: Manifest | None
    """None where there is none, or none that can be read."""
    findings: list[Finding]
    state: str | None = None
    """What the shards' optimizer state is against the manifest's digest of it; None where that was not asked."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        manifest = self.manifest
        known = {} if manifest is None else manifest.model_dump(include={"paradigm", "path", "step"})
        digest = None if manifest is None else manifest.digest
        problems = [asdict(finding) for finding in self.findings]
        state = {} if self.state is None else {"state": self.state}
        found = {"digest": digest, "whole": not problems, "problems": problems}
        return {"folder": str(self.folder), **known, **found, **state}


def verify_all(root: Path, mode_text: str, key_file: Path | None, *, state: bool) -> list[Verified]:
    """Verify every checkpoint in and below a folder, and those that the ledger of a run places elsewhere.

    With ``state``, shards that are whole are unpickled, and their optimizer state is compared as well.

    Raises:
        ConfigError: there is none, or an argument is not allowed.
    """
    key = read_key(key_file)
    mode = compare_mode("--mode", mode_text, key)
    if state and mode != "full":
        allowed = "full with --state: shards are unpickled, which nobody should do before their digests are compared"
        raise ConfigError("--mode", given=mode, allowed=allowed)
    folders = list(checkpoint_folders(root))
    recorded = recorded_checkpoints(root, records_of(root))
    folders += sorted(f for f in recorded if f.is_dir() and not f.is_relative_to(root.resolve()))
    if not folders:
        raise ConfigError("PATH", given=str(root), allowed="a checkpoint, or a folder that holds checkpoints")
    with ByteProgress() as progress:
        results = [_verify(folder, mode, key, progress) for folder in folders]
    if state:
        results = [_with_state(result) for result in results]
    return sorted(results, key=lambda r: (r.folder.parent, -1 if r.manifest is None else r.manifest.step, r.folder))


def _verify(folder: Path, mode: CompareMode, key: bytes | None, progress: ByteProgress) -> Verified:
    try:
        manifest = read_manifest(folder, key)
    except CheckpointError as error:
        said = str(error).removeprefix(f"{folder}: ").removeprefix(f"{folder / MANIFEST_FILE}: ")
        return Verified(folder, None, [Finding(MANIFEST_FILE, "the manifest of a whole checkpoint", said)])
    findings = check_names(folder, manifest)
    tick = progress.ticker(folder.name, sum(entry.size for entry in manifest.files.values()))
    for name, entry in manifest.files.items():
        findings += check_files(folder, {name: entry}, mode)
        tick(entry.size)
    return Verified(folder, manifest, findings)


def _with_state(result: Verified) -> Verified:
    manifest = result.manifest
    if manifest is None or result.findings:
        return replace(result, state="not compared")
    if manifest.state_digest is None:
        return replace(result, state="not recorded")
    from pathswitch.integrations.state_digest import differences
    from pathswitch.integrations.state_files import digest_of_files

    try:
        with redirect_stdout(sys.stderr):  # unpickling imports DeepSpeed, which has something to say
            found = digest_of_files(result.folder, manifest)
    except CheckpointError as error:
        return replace(result, state=str(error).removeprefix(f"{result.folder}: "))
    different = differences(manifest.state_digest, found)
    findings = [replace(finding, file=f"optimizer state, {finding.file}") for finding in different]
    return replace(result, findings=findings, state="differs" if findings else "same")


def show_verified(results: list[Verified], console: Console) -> None:
    """Print one row for each checkpoint, then every problem."""
    table = Table("path", "checkpoint", "step", "size", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for result in results:
        state = "whole" if not result.findings else "damaged" if result.manifest else "not committed"
        path, step, total = "–", "–", "–"
        if (manifest := result.manifest) is not None:
            size = sum(entry.size for entry in manifest.files.values())
            path, step, total = f"{manifest.paradigm}/{manifest.path}", f"{manifest.step:,}", decimal(size)
        table.add_row(path, result.folder.name, step, total, state)
    console.print(table)
    for result in results:
        for finding in result.findings:
            say(console, f"{result.folder}: {finding}")
        if result.state is not None and not result.findings:
            say(console, f"{result.folder}: optimizer state: {result.state}")


@dataclass(frozen=True)
class Unusable:
    """A folder that counts for nothing and is never deleted."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Garbage:
    """What a run can do without, and what it keeps."""

    run: Path
    decisions: list[Decision]
    unusable: list[Unusable]
    unfinished: list[Path]
    """What an earlier gc was removing when it was killed."""
    leftovers: list[Path]
    """Of killed saves, forks and conversions."""
    freed: int
    """In bytes."""

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        checkpoints = [
            {"folder": folder_name(d.checkpoint.folder, self.run), "step": d.checkpoint.step, "keep": d.keep}
            | {"paradigm": d.checkpoint.paradigm, "path": d.checkpoint.path, "reason": d.reason}
            for d in self.decisions
        ]
        return {
            "checkpoints": checkpoints,
            "unusable": [{"folder": folder_name(u.folder, self.run), "reason": u.reason} for u in self.unusable],
            "unfinished": [folder_name(folder, self.run) for folder in self.unfinished],
            "leftovers": [folder_name(folder, self.run) for folder in self.leftovers],
            "freed_bytes": self.freed,
        }


def collect_garbage(run: Path, keep_last: int, *, dry_run: bool) -> Garbage:
    """Prune what no path of the run needs, finish what killed processes began, and record it in the ledger.

    Raises:
        ConfigError: the folder is not a run with a plan.
        RunError: a file cannot be removed, or the ledger not be written.
    """
    run = run.resolve()
    records = records_of(run)
    stored, unusable = _inventory(run, records)
    pinned = {r.parent: f"{r.path} was forked from it" for r in records if isinstance(r, BranchRecord)}
    pinned |= {r.checkpoint: f"{r.path} was released from it" for r in records if isinstance(r, ReleaseRecord)}
    paths = _planned_paths(run, {checkpoint.paradigm for checkpoint in stored}, records)
    decisions = decide(paths, stored, keep_last, pinned)
    parents = {files.checkpoints.resolve() for _, _, files in trained_paths(run)}
    parents |= {folder.parent for folder in recorded_checkpoints(run, records)}
    unfinished = [hidden for parent in sorted(parents) for hidden in unfinished_prunings(parent)]
    pruned = [decision.checkpoint for decision in decisions if not decision.keep]
    with ExitStack() as locks:
        leftovers = _free_leftovers(run, locks)
        freed = freed_bytes([*(checkpoint.folder for checkpoint in pruned), *unfinished, *leftovers])
        if not dry_run:
            _remove(run, pruned, unfinished, leftovers)
    return Garbage(run, decisions, unusable, unfinished, leftovers, freed)


def _inventory(run: Path, records: list[Record]) -> tuple[list[Stored], list[Unusable]]:
    """Return the committed checkpoints of a run, as far as sizes tell, and everything that looks like one."""
    own = {f for _, _, files in trained_paths(run) for f in checkpoint_folders(files.checkpoints.resolve())}
    recorded = {folder: digests for folder, digests in recorded_checkpoints(run, records).items() if folder.is_dir()}
    stored, unusable = [], []
    for folder in sorted(own | recorded.keys()):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            unusable.append(Unusable(folder, str(error)))
            continue
        findings = check_names(folder, manifest) + check_files(folder, manifest.files, "sizes")
        if findings:
            unusable.append(Unusable(folder, describe_findings(folder, findings)))
        elif folder not in own and manifest.digest not in recorded[folder]:
            unusable.append(
                Unusable(folder, f"{folder}: replaced by a checkpoint that this run's ledger does not have")
            )
        else:
            place = folder, manifest.paradigm, manifest.path, manifest.step, manifest.digest
            layout = layout_of(manifest)
            is_latest = layout.latest(folder.parent) == folder.name
            stored.append(Stored(*place, latest_file=layout.latest_file if is_latest else None))
    return stored, unusable


def _planned_paths(run: Path, paradigms: set[str], records: list[Record]) -> list[PlannedPath]:
    """Return the plan's paths in the paradigms that the run has: a plan need not suit the others."""
    folder = RunFolder(run)
    plan = folder.plan()
    released = {(r.paradigm, r.path, r.step) for r in records if isinstance(r, ReleaseRecord)}
    paths = [path for paradigm in PARADIGMS if paradigm in paradigms for path in plan.paths(paradigm)]
    return [
        PlannedPath(
            path.paradigm,
            path.name,
            path.parent,
            path.start_step,
            path.end_step,
            complete=folder.is_complete(path) or (path.paradigm, path.name, path.end_step) in released,
        )
        for path in paths
    ]


def _free_leftovers(run: Path, locks: ExitStack) -> list[Path]:
    """Return what killed processes left in the folders of paths that no job trains, whose locks are then held."""
    paths = trained_paths(run)
    held = {(paradigm, name): locks.enter_context(path_lock(files, shared=False)) for paradigm, name, files in paths}

    def is_free(owner: tuple[str, str], leftover: Path) -> bool:
        # A branch's job converts its parent's checkpoint in the parent's folder.
        paradigm, dash, name = leftover.name.partition(".universal-")[2].partition("-")
        branch = (paradigm, name.rpartition(".")[0])
        return all(held.get(user) for user in {owner, branch if dash else owner})

    return [
        leftover
        for paradigm, name, files in paths
        for leftover in hidden_leftovers(files.checkpoints.resolve())
        if is_free((paradigm, name), leftover)
    ]


def _remove(run: Path, pruned: list[Stored], unfinished: list[Path], leftovers: list[Path]) -> None:
    ledger = run_ledger(run)

    def record(folder: Path, manifest: Manifest) -> None:
        ledger.append(PrunedRecord(manifest.digest, folder_name(folder, run)))

    try:
        for hidden in unfinished:
            finish_pruning(hidden, record)
        for checkpoint in pruned:
            prune(checkpoint.folder, checkpoint.digest, record)
        for leftover in leftovers:
            discard(leftover)
    except OSError as error:
        raise RunError(f"{error.filename}: cannot be removed ({error.strerror}); run gc again to go on") from None


def show_garbage(garbage: Garbage, console: Console, *, dry_run: bool) -> None:
    """Print every checkpoint with what becomes of it and why."""
    table = Table("path", "checkpoint", "step", "", "why", box=box.SIMPLE_HEAD, pad_edge=False)
    for decision in garbage.decisions:
        checkpoint = decision.checkpoint
        path, what = f"{checkpoint.paradigm}/{checkpoint.path}", "keep" if decision.keep else "prune"
        table.add_row(path, checkpoint.folder.name, f"{checkpoint.step:,}", what, decision.reason)
    console.print(table)
    for unusable in garbage.unusable:
        say(console, f"left alone: {unusable.reason}")
    for folder in (*garbage.unfinished, *garbage.leftovers):
        say(console, f"leftover of a killed process: {folder}")
    say(console, f"{'would free' if dry_run else 'freed'} {decimal(garbage.freed)}")


def adopt_folder(
    folder: Path, step: int | None, path: str | None, plan_path: Path | None, key_file: Path | None, console: Console
) -> None:
    """Commit a checkpoint that another program wrote.

    Raises:
        CheckpointError: it has a manifest, is incomplete, or does not say what its manifest has to.
    """
    say(
        console, f"{folder}: what it says of itself is unpickled now, which runs whatever code it holds. That its files"
    )
    say(console, "are whole and as they were written is yours to know: the manifest vouches for them as they are")
    from pathswitch.integrations.adopt import adopt_checkpoint

    plan = None if plan_path is None else build_plan(load_plan_file(plan_path))
    manifest = adopt_checkpoint(folder, step=step, path=path, plan=plan, key=read_key(key_file))
    size = decimal(sum(entry.size for entry in manifest.files.values()))
    place = f"step {manifest.step} of {manifest.paradigm}/{manifest.path}"
    say(console, f"{folder}: committed as {place}: {len(manifest.files)} files, {size}, manifest {manifest.digest}")
