"""Train all paths of a paradigm, parents before children, each under the deepspeed launcher; safe to run again."""

from __future__ import annotations

import os

from rich.console import Console

from pathswitch.checkpoint import read_section
from pathswitch.config import PlanFile, build_plan
from pathswitch.errors import ConfigError, RunError
from pathswitch.launch.failure import failure_reason
from pathswitch.launch.local import deepspeed_command, free_port, job_environment, run_job
from pathswitch.launch.progress import PathProgress
from pathswitch.run_folder import RunFolder
from pathswitch.versions import Paradigm
from pathswitch.versions import Path as TrainingPath


def require_trainable(plan_file: PlanFile) -> None:
    """Raise ConfigError unless the plan has everything that the embedded trainer needs."""
    read_section(plan_file.deepspeed)
    for section in ("data", "train"):
        if getattr(plan_file, section) is None:
            raise ConfigError(f"[{section}]", given="nothing", allowed="this section is required for training")
    if not plan_file.versions:
        raise ConfigError("[[versions]]", given="nothing", allowed="at least one version for training")
    for version in plan_file.versions:
        for split in ("train", "test"):
            if not getattr(version, split):
                where = f"version {version.name!r} {split}"
                raise ConfigError(where, given="nothing", allowed="text files: training needs them")


def run_paradigm(
    plan_file: PlanFile, folder: RunFolder, paradigm: Paradigm, console: Console, on_damage: str | None = None
) -> None:
    """Train whatever the folder's completion records do not vouch for.

    ``on_damage`` ("refuse" or "previous") overrides what the plan says about damaged checkpoints.

    Raises:
        RunError: a job ended without its completion record.
    """
    for path in build_plan(plan_file).paths(paradigm):
        label = f"{paradigm}/{path.name}"
        if folder.is_complete(path):
            console.print(f"{label}: done already, up to step {path.end_step}", highlight=False)
        else:
            _run_path(plan_file, folder, path, console, on_damage)


def _run_path(
    plan_file: PlanFile, folder: RunFolder, path: TrainingPath, console: Console, on_damage: str | None
) -> None:
    label = f"{path.paradigm}/{path.name}"
    assert plan_file.train is not None and plan_file.tokens_per_step is not None
    files, ranks = folder.path(path), plan_file.train.ranks
    files.folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--out", str(folder.out.resolve()), "--paradigm", path.paradigm, "--path", path.name]
    if on_damage is not None:
        arguments += ["--on-damage", on_damage]
    command = deepspeed_command("pathswitch.trainer", arguments, ranks=ranks, port=free_port())
    log_start = files.log.stat().st_size if files.log.is_file() else 0
    progress = PathProgress(
        console,
        path,
        files.metrics,
        first_step=files.step() or path.start_step,
        tokens_per_step=plan_file.tokens_per_step,
    )
    with progress:
        code = run_job(command, job_environment(ranks, os.environ), files.log, progress.tick)
    if not folder.is_complete(path):
        # The launcher exits with 0 even when it was killed itself; only the record proves completion.
        raise RunError(f"{label} did not complete (launcher exit code {code}): {failure_reason(files.log, log_start)}")
