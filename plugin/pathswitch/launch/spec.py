"""From a plan to jobs: what each path's job is, resolved, before anything is started."""

from __future__ import annotations

import hashlib
import shlex
import string
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pathswitch.checkpoint import CheckpointSettings, read_section
from pathswitch.config import PlanFile, build_plan
from pathswitch.config.fields import Section
from pathswitch.config.launch import LAUNCHERS, JobSection, LaunchSection, time_seconds
from pathswitch.errors import ConfigError, RunError, choices
from pathswitch.launch.megatron import megatron_parts
from pathswitch.run_folder import PLAN_FILE, PathFolder
from pathswitch.versions import Paradigm
from pathswitch.versions import Path as TrainingPath

# Ports of jobs: below the range that Linux gives to connections, above those of most services.
FIRST_PORT, PORTS = 20_000, 10_000
EARLY_SECONDS = 60  # SLURM's signal may come that much too early
MEGATRON_ARGS = "{megatron_args}"
SLURM_ONLY = ("partition", "account", "qos", "gres", "cpus_per_task", "time", "container", "modules", "setup", "sbatch")


class Part(Section):
    """A stretch of a path with a command of its own."""

    end_step: int
    command: tuple[str, ...]
    """What follows ``python``."""


class JobSpec(Section):
    """One path's job: all that its agent has to know."""

    run: str
    """The run folder, absolute."""
    paradigm: Paradigm
    path: str
    parent: str | None
    start_step: int
    end_step: int
    parts: tuple[Part, ...]
    """By their ends; only Megatron with data per version has more than one."""
    embedded: bool
    """Whether the command is the embedded trainer's, which has a completion record of its own."""
    working_folder: str
    python: str
    port: int
    signing_key_file: str | None
    """The key that signs the job's manifests."""
    launch: LaunchSection
    """As it holds for this path."""

    @property
    def id(self) -> str:
        """What marks the job's processes on every host."""
        return f"{run_id(Path(self.run))}:{self.paradigm}:{self.path}"

    @property
    def files(self) -> PathFolder:
        """The files of the path."""
        return PathFolder(Path(self.run) / self.paradigm / self.path)

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self.nodes * self.gpus_per_node

    @property
    def nodes(self) -> int:
        """Hosts of the job."""
        return self.launch.nodes or 1

    @property
    def gpus_per_node(self) -> int:
        """Ranks on each host."""
        return self.launch.gpus_per_node or 1

    def command_from(self, step: int) -> tuple[str, ...]:
        """Return the command of the part that begins with ``step`` updates done."""
        return next((part.command for part in self.parts if step < part.end_step), self.parts[-1].command)

    def environment(self) -> dict[str, str]:
        """Return what every rank has in its environment beside [launch] env."""
        files = self.files
        return {
            "PATHSWITCH_JOB": self.id,
            "PATHSWITCH_PATH": self.path,
            "PATHSWITCH_STOP_FILE": str(files.stop),
            "PATHSWITCH_STOP_SIGNALS": ",".join(dict.fromkeys(["SIGTERM", self.launch.signal])),
            "PATHSWITCH_PROGRESS_FILE": str(files.progress),
            # Megatron's hooks find their plan by it; nothing else looks at it.
            **({} if self.embedded else {"PATHSWITCH_PLAN": str(Path(self.run, PLAN_FILE))}),
        }


def run_id(run: Path) -> str:
    """Return what tells this run's jobs from another's: eight hexadecimal digits of its absolute folder's SHA-256."""
    return hashlib.sha256(str(run.absolute()).encode()).hexdigest()[:8]


def comment_prefix(run: str, paradigm: str) -> str:
    """Return what the comments of a run's SLURM jobs begin with; the path's name follows."""
    return f"pathswitch:{run_id(Path(run))}:{paradigm}:"


def load_spec(job_file: Path) -> JobSpec:
    """Return the job that a file describes.

    Raises:
        RunError: the file cannot be read, or another version of pathswitch has written it.
    """
    try:
        return JobSpec.model_validate_json(job_file.read_bytes())
    except OSError as error:
        raise RunError(f"{job_file}: cannot be read ({error.strerror}): `pathswitch submit` writes it") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RunError(f"{job_file}: {where}: {first['msg']}; `pathswitch submit` writes it anew") from None


def job_specs(
    plan_file: PlanFile,
    base: Path,
    run: Path,
    paradigm: Paradigm = "path_switching",
    ds_config: Mapping[str, Any] | None = None,
) -> list[JobSpec]:
    """Return the jobs of a paradigm's paths, parents before children.

    Args:
        plan_file: the plan.
        base: the plan file's folder, the working folder of all jobs.
        run: the run folder.
        paradigm: whose paths are trained.
        ds_config: the content of [launch] ds_config, where there is one.

    Raises:
        ConfigError: [launch] contradicts itself, the plan, or what its kind can do.
    """
    launch = plan_file.launch
    _check(launch)
    paths = [path for path in build_plan(plan_file).paths(paradigm) if path.steps > 0]
    if not paths:
        raise ConfigError("[[versions]]", given="nothing", allowed="at least one version: jobs train its steps")
    for name in launch.paths:
        if name not in (known := [path.name for path in paths]):
            raise ConfigError("[launch.paths]", given=name, allowed=choices(known, name))
    # One name for one folder: the jobs of a run are known by it, from wherever they are submitted.
    base, run = base.resolve(), run.resolve()
    _check_folders(plan_file.launch, {"plan's folder": base, "--out": run})
    first_port = int(run_id(run), 16)
    key_file = _checkpoint_settings(plan_file, ds_config).signing_key_file
    specs = [
        _spec(plan_file, path, base, run, FIRST_PORT + (first_port + index) % PORTS) for index, path in enumerate(paths)
    ]
    return [spec.model_copy(update={"signing_key_file": key_file and str(base / key_file)}) for spec in specs]


def _checkpoint_settings(plan_file: PlanFile, ds_config: Mapping[str, Any] | None) -> CheckpointSettings:
    if MEGATRON_ARGS in plan_file.launch.command:
        return plan_file.megatron.checkpoint
    if plan_file.launch.command:
        section = (ds_config or {}).get("pathswitch", {})
        if isinstance(section, Mapping) and isinstance(job := section.get("job"), Mapping):
            section = {**section, "job": {"save_dir": "{path}", **job}}  # which the job's own files fill in
        return read_section({"pathswitch": section}).checkpoint
    return read_section(plan_file.deepspeed).checkpoint


def _spec(plan_file: PlanFile, path: TrainingPath, base: Path, run: Path, port: int) -> JobSpec:
    launch = _resolved(plan_file.launch, path)
    embedded = not launch.command
    _check_time(path.name, launch)
    spec = JobSpec(
        run=str(run),
        paradigm=path.paradigm,
        path=path.name,
        parent=path.parent,
        start_step=path.start_step,
        end_step=path.end_step,
        parts=(),
        embedded=embedded,
        working_folder=str(base),
        # An image has an interpreter of its own.
        python=launch.python or (sys.executable if launch.container is None else "python"),
        port=port,
        signing_key_file=None,
        launch=launch,
    )
    if embedded:
        _check_ranks(plan_file, spec)
        trainer = ("-m", "pathswitch.trainer", "--out", str(run), "--paradigm", path.paradigm, "--path", path.name)
        parts = [Part(end_step=path.end_step, command=trainer)]
    elif MEGATRON_ARGS in launch.command:
        if path.paradigm != "path_switching":
            raise ConfigError("--paradigm", given=path.paradigm, allowed="path_switching, in Megatron jobs")
        jobs = megatron_parts(run / PLAN_FILE, plan_file, path.name, base, spec.files.checkpoints)
        parts = [Part(end_step=job.end_step, command=_command(spec, job.arguments)) for job in jobs]
    else:
        parts = [Part(end_step=path.end_step, command=_command(spec))]
    return spec.model_copy(update={"parts": tuple(parts)})


def _resolved(launch: LaunchSection, path: TrainingPath) -> LaunchSection:
    """Return the section as it holds for one path: its own keys over those of its kind over the common ones."""
    own = [launch.main if path.parent is None else launch.branches, launch.paths.get(path.name, JobSection())]
    changes: dict[str, object] = {"main": JobSection(), "branches": JobSection(), "paths": {}}
    for section in own:
        changes |= {key: getattr(section, key) for key in section.model_fields_set}
    changes["env"] = dict(launch.env) | own[0].env | own[1].env
    return launch.model_copy(update=changes)


def _check(launch: LaunchSection) -> None:
    allowed_launchers = LAUNCHERS[launch.kind]
    if launch.launcher not in (None, *allowed_launchers):
        allowed = f"{', '.join(allowed_launchers)}, with kind = {launch.kind!r}"
        raise ConfigError("[launch] launcher", given=launch.launcher, allowed=allowed)
    if (launch.kind == "hostfile") != (launch.hostfile is not None):
        allowed = "a file of lines 'host slots=N' with kind = 'hostfile', and only with it"
        raise ConfigError("[launch] hostfile", given=launch.hostfile, allowed=allowed)
    sections = {"": launch, " main": launch.main, " branches": launch.branches}
    sections |= {f" paths {name}": section for name, section in launch.paths.items()}
    for where, section in sections.items():
        for key in SLURM_ONLY:
            if launch.kind != "slurm" and key in section.model_fields_set:
                allowed = f"not with kind = {launch.kind!r}: only SLURM's jobs have it"
                raise ConfigError(f"[launch]{where} {key}", given=getattr(section, key), allowed=allowed)
        if launch.kind == "local" and (section.nodes or 1) > 1:
            raise ConfigError(f"[launch]{where} nodes", given=section.nodes, allowed="1 with kind = 'local'")
    launcher_words(launch)
    if launch.ds_config is not None and MEGATRON_ARGS in launch.command:
        allowed = f"none with {MEGATRON_ARGS}: Megatron-DeepSpeed's is the same for all paths, a word of the command"
        raise ConfigError("[launch] ds_config", given=launch.ds_config, allowed=allowed)
    if any("{ds_config}" in word for word in launch.command) != (launch.ds_config is not None):
        allowed = "a ds_config together with {ds_config} in the command, or neither"
        raise ConfigError("[launch] ds_config", given=launch.ds_config, allowed=allowed)


def _check_folders(launch: LaunchSection, folders: Mapping[str, Path]) -> None:
    sections = [launch, launch.main, launch.branches, *launch.paths.values()]
    mounted = any(section.container is not None for section in sections)
    for where, folder in folders.items():
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in str(folder)):
            allowed = "a name in one line of UTF-8, without control characters"
            raise ConfigError(where, given=str(folder), allowed=allowed)
        if mounted and any(sign in str(folder) for sign in ",:"):
            allowed = "a name without , and :, which part the mounts of a container"
            raise ConfigError(where, given=str(folder), allowed=allowed)


def _check_time(path: str, launch: LaunchSection) -> None:
    """Raise ConfigError if SLURM would ask the job to end as soon as it has started."""
    at_least = launch.signal_seconds + EARLY_SECONDS
    if launch.time is not None and time_seconds(launch.time) <= at_least:
        allowed = (
            f"more than {at_least} s: signal_seconds before its end, or {EARLY_SECONDS} s earlier, it is asked to end"
        )
        raise ConfigError(f"[launch] time of {path}", given=launch.time, allowed=allowed)


def launcher_words(launch: LaunchSection) -> list[str]:
    """Return the launcher's arguments as a shell splits them.

    Raises:
        ConfigError: a quotation does not end.
    """
    try:
        return [word for line in launch.launcher_args for word in shlex.split(line)]
    except ValueError as error:
        allowed = f"words as a shell splits them ({error})"
        raise ConfigError("[launch] launcher_args", given=list(launch.launcher_args), allowed=allowed) from None


def _check_ranks(plan_file: PlanFile, spec: JobSpec) -> None:
    """Raise ConfigError unless the embedded trainer can share its batch out among the job's ranks."""
    if plan_file.train is not None:
        try:
            _ = plan_file.train.model_copy(update={"ranks": spec.ranks}).micro_batch
        except ConfigError as error:
            where = f"[launch] nodes x gpus_per_node of {spec.path}"
            raise ConfigError(where, given=spec.ranks, allowed=f"{error.allowed} ({error.where})") from None


def _command(spec: JobSpec, megatron_arguments: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Fill the placeholders of the training command in; other braces are doubled, as in Python's formats."""
    values = {
        "run": spec.run,
        "plan": str(Path(spec.run, PLAN_FILE)),
        "path": spec.path,
        "paradigm": spec.paradigm,
        "checkpoints": str(spec.files.checkpoints),
        "ds_config": str(spec.files.ds_config),
        "start_step": str(spec.start_step),
        "end_step": str(spec.end_step),
        "nodes": str(spec.nodes),
        "gpus_per_node": str(spec.gpus_per_node),
        "ranks": str(spec.ranks),
    }
    words: list[str] = []
    for word in spec.launch.command:
        words += megatron_arguments if word == MEGATRON_ARGS else [_filled(word, values)]
    return tuple(words)


def _filled(word: str, values: Mapping[str, str]) -> str:
    where, names = "[launch] command", ", ".join(f"{{{name}}}" for name in values)
    try:
        pieces = list(string.Formatter().parse(word))
    except ValueError as error:
        allowed = f"the placeholders {names}; {{{{ and }}}} stand for braces ({error})"
        raise ConfigError(where, given=word, allowed=allowed) from None
    text = ""
    for literal, name, format_spec, conversion in pieces:
        text += literal
        if name is None:
            continue
        if name not in values or format_spec or conversion:
            allowed = f"the placeholders {names}; {MEGATRON_ARGS} as a word of its own; {{{{ and }}}} stand for braces"
            raise ConfigError(where, given=word, allowed=allowed)
        text += values[name]
    return text
