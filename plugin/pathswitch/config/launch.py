"""The section [launch]: on what, and with which command, the paths of a plan are trained."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from pathswitch.config.fields import Count, Name, Section, as_tuple

Kind = Literal["local", "hostfile", "slurm"]
Launcher = Literal["deepspeed", "pdsh", "openmpi", "srun", "torchrun"]
# The first is the default.
LAUNCHERS: dict[Kind, tuple[Launcher, ...]] = {
    "local": ("deepspeed",),
    "hostfile": ("pdsh", "openmpi"),
    "slurm": ("srun", "torchrun", "deepspeed"),
}
# Options of sbatch that pathswitch decides, by the key that decides them ("" where none does).
SBATCH_KEYS = {
    "nodes": "nodes",
    "ntasks": "gpus_per_node",
    "ntasks-per-node": "gpus_per_node",
    "gpus-per-node": "gpus_per_node",
    "gres": "gres",
    "cpus-per-task": "cpus_per_task",
    "time": "time",
    "partition": "partition",
    "account": "account",
    "qos": "qos",
    "signal": "signal, signal_seconds",
    **dict.fromkeys(("job-name", "comment", "output", "error", "open-mode", "chdir", "requeue", "no-requeue"), ""),
    **dict.fromkeys(("dependency", "hold", "kill-on-invalid-dep", "array", "wait", "wrap", "parsable"), ""),
    **dict.fromkeys(("clusters", "test-only", "help", "usage", "version"), ""),
}
_TIME = re.compile(r"(?:(\d+)-)?(\d{1,4}):([0-5]\d):([0-5]\d)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTION = re.compile(r"--([a-z][a-z-]*)(=[^\x00-\x1f\x7f]+)?")


def time_seconds(text: str) -> int:
    """Return a time limit, ``HH:MM:SS`` or ``D-HH:MM:SS``, in seconds.

    Raises:
        ValueError: it is written in another way, or is 0.
    """
    match = _TIME.fullmatch(text)
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(text)
    return total


def _checked_time(text: str) -> str:
    time_seconds(text)
    return text


def _checked_option(line: str) -> str:
    match = _OPTION.fullmatch(line)
    if match is None:
        raise ValueError("one long option of sbatch in each, such as '--exclusive' or '--mem=0'")
    if match[1] in SBATCH_KEYS:
        instead = f"the key {SBATCH_KEYS[match[1]]}" if SBATCH_KEYS[match[1]] else "pathswitch itself"
        raise ValueError(f"other options of sbatch: --{match[1]} is decided by {instead}")
    return line


def _checked_variable(name: str) -> str:
    if not _VARIABLE.fullmatch(name) or name.startswith(("PATHSWITCH_", "SLURM_", "SBATCH_")):
        raise ValueError(name)
    return name


# What a description says is allowed. No text of this section may hold a control character: one line stays one line.
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", description="text in one line, without control characters")]
Text = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", description="text in one line, without control characters")]
Word = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.,:+@=/*-]*$",
        description="letters, digits and _ . , : + @ = / * -, not beginning with a sign",
    ),
]
EnvironmentName = Annotated[
    str,
    AfterValidator(_checked_variable),
    Field(
        description="names of variables; not PATHSWITCH_*, SLURM_*, SBATCH_*, which pathswitch and SLURM set",
    ),
]
TimeLimit = Annotated[str, AfterValidator(_checked_time), Field(description="'HH:MM:SS' or 'D-HH:MM:SS', above 0")]
Lines = Annotated[
    tuple[Line, ...], BeforeValidator(as_tuple), Field(description="a list of texts in one line each, or one text")
]
Options = Annotated[tuple[Annotated[str, AfterValidator(_checked_option)], ...], BeforeValidator(as_tuple)]
Seconds = Annotated[float, Field(gt=0, description="a number of seconds > 0")]
StopSignal = Literal["SIGUSR1", "SIGUSR2", "SIGINT", "SIGTERM", "SIGHUP"]


class ContainerSection(Section):
    """The image that the ranks run in."""

    runtime: Literal["pyxis", "apptainer"]
    image: Line
    mounts: Lines = ()
    """Folders to mount, as the runtime writes them (``/data:/data``); the run and the plan's folder always are."""


class JobSection(Section):
    """What may differ from one path's job to another's."""

    nodes: Count | None = None
    gpus_per_node: Count | None = None
    """Ranks on each node, one to a GPU; on CPUs, ranks all the same."""
    time: TimeLimit | None = None
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    gres: Word | None = None
    """Instead of ``--gpus-per-node``; "none" asks for no GPUs."""
    cpus_per_task: Count | None = None
    container: ContainerSection | None = None
    modules: Lines = ()
    setup: Lines = ()
    """Lines of bash before the job, such as ``source env.sh``."""
    env: dict[EnvironmentName, Text] = Field(default={})
    sbatch: Options = ()
    """More options of sbatch, such as ``--exclusive``."""


class LaunchSection(JobSection):
    """What all jobs of a plan have in common, and what differs on the main path, on branches, or on one path."""

    kind: Kind = "local"
    launcher: Launcher | None = None
    launcher_args: Lines = ()
    """More arguments of the launcher, in words as a shell splits them."""
    command: Annotated[tuple[Text, ...], BeforeValidator(as_tuple)] = ()
    """What follows ``python``: the training script and its arguments; without it, the embedded trainer."""
    ds_config: Line | None = None
    """A ds_config; each path gets it with its own scheduler and job section, as ``{ds_config}`` in the command."""
    python: Line | None = None
    """The interpreter of the ranks; if absent, the one that submits, or ``python`` in a container."""
    hostfile: Line | None = None
    host_timeout_seconds: Seconds = 60.0
    signal: StopSignal = "SIGUSR2"
    """What SLURM sends when the time is nearly up."""
    signal_seconds: Annotated[int, Field(ge=30, description="a whole number of seconds >= 30")] = 300
    """How long before the end of the time; a save must fit in."""
    restart_budget: Annotated[int, Field(ge=0, description="a whole number >= 0")] = 3
    """Restarts without a new checkpoint before a job gives up."""
    parallel: Count = 1
    """Jobs that `submit` runs at a time where SLURM does not decide: on this machine, or on a hostfile's."""
    seconds_per_step: Seconds | None = None
    """For the estimate, until a step has been measured."""
    main: JobSection = JobSection()
    branches: JobSection = JobSection()
    paths: dict[Name, JobSection] = Field(default={})
