"""The arguments of one Megatron job of a plan, so that a branch sees exactly the samples of the main path.

Megatron shuffles a dataset for the number of samples that it is asked for, so another --train-iters is another order.
With data per version, Megatron's phase transitions begin each version's data at its first sample, and every job of a
version asks for that version's samples alone. With one dataset for all versions, every job asks for the same horizon.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pathswitch.config import PlanFile, build_plan, is_weighted
from pathswitch.errors import ConfigError, choices
from pathswitch.versions import MAIN, Plan

PLAN_NAME = "plan.toml"


@dataclass(frozen=True)
class MegatronJob:
    """One job of a plan: from its first start to its last step, through every resume, the same line."""

    path: str
    version: str
    """The version with whose data the job ends."""
    start_step: int
    end_step: int
    """The step at which Megatron saves and ends."""
    environment: dict[str, str]
    arguments: tuple[str, ...]
    checkpoints: str
    """The folder that the job saves into and goes on from."""
    fork: tuple[str, ...]
    """The command that makes a branch's first checkpoint; empty for a job that has no parent."""

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def as_shell(self) -> str:
        """Return lines for bash that export the environment and set variables of the same names as the fields."""
        exported = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        lines = [
            f"# {self.path}, steps {self.start_step} to {self.end_step}, data of {self.version}",
            f"export {exported}",
            "PATHSWITCH_ARGS=(",
            *(f"  {line}" for line in _lines(self.arguments)),
            ")",
            f"PATHSWITCH_START_STEP={self.start_step} PATHSWITCH_END_STEP={self.end_step}",
            f"PATHSWITCH_CHECKPOINTS={shlex.quote(self.checkpoints)}",
        ]
        if self.fork:
            lines.append("# Once, before the branch's first start:")
        return "\n".join([*lines, f"PATHSWITCH_FORK=({shlex.join(self.fork)})"])


def megatron_parts(plan_path: Path, plan_file: PlanFile, path: str, base: Path, checkpoints: Path) -> list[MegatronJob]:
    """Return the jobs that train a path one after the other: one for each version's data on the main path.

    ``base`` is the folder that relative prefixes are taken from, ``checkpoints`` where the path saves.
    """
    plan = build_plan(plan_file, str(plan_path))
    versions: list[str | None] = [None]
    if path == MAIN and _has_own_data(plan_file):
        bounds = [(v.name, *_bounds(plan_file, plan, MAIN, index)) for index, v in enumerate(plan.versions)]
        versions = [name for name, start_step, end_step in bounds if start_step < end_step]
    return [megatron_job(plan_path, plan_file, path, version, base, checkpoints) for version in versions]


def megatron_job(
    plan_path: Path,
    plan_file: PlanFile,
    path: str,
    version: str | None = None,
    base: Path | None = None,
    checkpoints: Path | None = None,
) -> MegatronJob:
    """Render the job of a branch, or of the main path on one version's data (the last one's by default).

    ``plan_path`` is absolute; relative prefixes and folders of the plan are taken from its folder, or from ``base``;
    the job saves into the plan's folder for checkpoints, or into ``checkpoints``.

    Raises:
        ConfigError: the plan has no such job, or does not say what Megatron needs.
    """
    if plan_path.name != PLAN_NAME:
        allowed = f"a file named {PLAN_NAME}: its folder is the run that `pathswitch fork` reads"
        raise ConfigError("the plan of Megatron jobs", given=plan_path.name, allowed=allowed)
    plan = build_plan(plan_file, str(plan_path))
    index = _version_index(plan, path, version)
    start_step, end_step = _bounds(plan_file, plan, path, index)
    if end_step <= start_step:
        given = f"{path} on the data of {plan.versions[index].name!r}"
        allowed = f"a job with steps: until a version is added, the main path ends at step {end_step}"
        raise ConfigError(str(plan_path), given=given, allowed=allowed)
    base = base or plan_path.parent
    folder = checkpoints or plan_path.parent / plan_file.megatron.checkpoints / path
    data = _data_of_version if _has_own_data(plan_file) else _data_of_all
    fork: tuple[str, ...] = ()
    if path != MAIN and start_step > 0:
        source = ("pathswitch", "fork", str(plan_path.parent), f"{MAIN}@{start_step}")
        fork = (*source, "--to", path, "--into", str(folder))
    return MegatronJob(
        path=path,
        version=plan.versions[index].name,
        start_step=start_step,
        end_step=end_step,
        environment={"PATHSWITCH_PLAN": str(plan_path), "PATHSWITCH_PATH": path},
        arguments=(
            *data(plan_path, plan_file, plan, index, end_step),
            "--data-path",
            *_resolved(base, plan_file.versions[index].megatron_data or plan_file.megatron.data),
            *_lr_arguments(plan),
            *_checkpoint_arguments(folder, start_step),
        ),
        checkpoints=str(folder),
        fork=fork,
    )


def _version_index(plan: Plan, path: str, version: str | None) -> int:
    names = [entry.name for entry in plan.versions]
    if not names:
        raise ConfigError("[[versions]]", given="nothing", allowed="at least one version: a job trains on its data")
    plan.path(path)  # raises for a path that the plan does not have
    if path != MAIN and version not in (None, path):
        raise ConfigError(
            "--version", given=version, allowed=f"nothing: branch {path} trains on its own version's data"
        )
    wanted = path if path != MAIN else names[-1] if version is None else version
    if wanted not in names:
        raise ConfigError("--version", given=wanted, allowed=choices(names, wanted))
    return names.index(wanted)


def _has_own_data(plan_file: PlanFile) -> bool:
    return any(version.megatron_data for version in plan_file.versions)


def _bounds(plan_file: PlanFile, plan: Plan, path: str, index: int) -> tuple[int, int]:
    """Return the first and last step of a job."""
    whole = plan.path(path)
    if path != MAIN:
        return whole.start_step, whole.end_step
    first_step = plan.end_steps[index] - plan.versions[index].steps if _has_own_data(plan_file) else 0
    # The main path needs no tail behind the last fork until the next version's data arrives.
    return first_step, min(plan.end_steps[index], whole.end_step)


def _data_of_version(plan_path: Path, plan_file: PlanFile, plan: Plan, index: int, end_step: int) -> list[str]:
    """Return what lets Megatron begin the version's data with the version's first step, and end at ``end_step``."""
    for key in ("data", "horizon_steps"):
        if given := getattr(plan_file.megatron, key):
            allowed = "either data for all versions in [megatron], or megatron_data for each version"
            raise ConfigError(f"{plan_path}: [megatron] {key}", given=given, allowed=allowed)
    version = plan_file.versions[index]
    if not version.megatron_data:
        raise _missing(plan_path, f"version {version.name!r} megatron_data", "prefixes of Megatron's data files")
    batch_size = _global_batch_size(plan_path, plan_file)
    arguments = ["--global-batch-size", str(batch_size), "--train-samples", str(plan.end_steps[index] * batch_size)]
    if index > 0:
        arguments += ["--phase-transition-iterations", ",".join(map(str, plan.end_steps[:index]))]
    # Where the version's samples end, Megatron ends by itself, with a last evaluation.
    if end_step < plan.end_steps[index]:
        arguments += ["--exit-interval", str(end_step)]
    return arguments


def _data_of_all(plan_path: Path, plan_file: PlanFile, plan: Plan, index: int, end_step: int) -> list[str]:
    """Return what lets every job of the plan see one and the same order of samples, and end at ``end_step``."""
    arguments = ["--global-batch-size", str(_global_batch_size(plan_path, plan_file))]
    return [*arguments, "--train-iters", str(_horizon(plan_path, plan_file, plan)), "--exit-interval", str(end_step)]


def _global_batch_size(plan_path: Path, plan_file: PlanFile) -> int:
    if plan_file.megatron.global_batch_size is None:
        raise _missing(plan_path, "[megatron] global_batch_size", "the samples of one step")
    return plan_file.megatron.global_batch_size


def _horizon(plan_path: Path, plan_file: PlanFile, plan: Plan) -> int:
    section = plan_file.megatron
    if not section.data:
        allowed = "megatron_data for each version, or data and horizon_steps in [megatron] for all of them"
        raise _missing(plan_path, "megatron_data", allowed)
    if section.horizon_steps is None:
        allowed = "the most steps that all versions, also future ones, will have: it fixes the order of samples"
        raise _missing(plan_path, "[megatron] horizon_steps", allowed)
    if section.horizon_steps < plan.end_steps[-1]:
        allowed = f"at least {plan.end_steps[-1]}, the end of version {plan.versions[-1].name!r}"
        raise ConfigError(f"{plan_path}: [megatron] horizon_steps", given=section.horizon_steps, allowed=allowed)
    return section.horizon_steps


def _lr_arguments(plan: Plan) -> list[str]:
    # The plan decides the LR. Megatron wants these all the same, and newer ones tell parameter groups apart by them,
    # so that a checkpoint loads only into a job with the same two.
    return ["--lr", repr(plan.main.max_lr), "--min-lr", "0", "--lr-decay-style", "constant"]


def _checkpoint_arguments(folder: Path, start_step: int) -> list[str]:
    arguments = ["--save", str(folder), "--load", str(folder)]
    # Without it, Megatron starts from random weights where the checkpoint to go on from is missing.
    return [*arguments, "--exit-on-missing-checkpoint"] if start_step > 0 else arguments


def _resolved(base: Path, blend: tuple[str, ...]) -> list[str]:
    """Take relative prefixes from ``base``; weights and addresses of object stores stay as they are."""
    weights = range(0, len(blend), 2) if is_weighted(blend) else ()
    return [entry if place in weights or "://" in entry else str(base / entry) for place, entry in enumerate(blend)]


def _missing(plan_path: Path, where: str, allowed: str) -> ConfigError:
    return ConfigError(f"{plan_path}: {where}", given="nothing", allowed=allowed)


def _lines(arguments: tuple[str, ...]) -> list[str]:
    """Put each option on a line with its values."""
    lines: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--"):
            lines.append([])
        lines[-1].append(argument)
    return [shlex.join(line) for line in lines]
