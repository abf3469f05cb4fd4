"""What a check of the environment is asked about, and what it reports."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pathswitch.config import PlanFile
from pathswitch.config.launch import Kind, LaunchSection
from pathswitch.launch.doctor.programs import Programs
from pathswitch.launch.hosts import Host, Ssh
from pathswitch.launch.spec import JobSpec

Status = Literal["ok", "note", "problem", "skipped"]
PDSH_OPTIONS = "PDSH_SSH_ARGS_APPEND"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; a problem always says what to do."""

    name: str
    status: Status
    found: str
    todo: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the finding as JSON values."""
        return asdict(self)


def ok(name: str, found: str) -> Finding:
    """Return a finding of something that is as it should be."""
    return Finding(name, "ok", found)


def note(name: str, found: str, todo: str = "") -> Finding:
    """Return a finding that is worth knowing and stops nobody."""
    return Finding(name, "note", found, todo)


def problem(name: str, found: str, todo: str) -> Finding:
    """Return a finding that makes jobs fail, or makes their results wrong."""
    return Finding(name, "problem", found, todo)


def skipped(name: str, why: str) -> Finding:
    """Return a finding of something that was not looked at."""
    return Finding(name, "skipped", why)


@dataclass(frozen=True)
class Subject:
    """The environment in question: what would be trained, where, and with which programs and variables."""

    programs: Programs
    plan: PlanFile | None = None
    specs: tuple[JobSpec, ...] = ()
    """The plan's jobs."""
    run: Path | None = None
    """The run folder; it need not exist yet."""
    hosts: tuple[Host, ...] = ()
    """Those of the hostfile; a job takes the first ones, and the first of all is its master."""

    @property
    def environ(self) -> Mapping[str, str]:
        """The variables that jobs would inherit."""
        return self.programs.environ

    @property
    def launch(self) -> LaunchSection:
        """The plan's [launch], or its defaults."""
        return self.plan.launch if self.plan is not None else LaunchSection()

    @property
    def kind(self) -> Kind:
        """Where jobs would run."""
        return "hostfile" if self.hosts else self.launch.kind

    @property
    def several_nodes(self) -> bool:
        """Whether ranks of one job would have to find each other over a network."""
        return len(self.hosts) > 1 or any(spec.nodes > 1 for spec in self.specs)

    @property
    def folder(self) -> Path:
        """The run folder, or the working folder where none is given."""
        return (self.run or Path()).absolute()

    @property
    def working_folder(self) -> Path:
        """The folder that jobs are started in."""
        return Path(self.specs[0].working_folder) if self.specs else Path.cwd()

    @property
    def python(self) -> str:
        """The interpreter of the ranks."""
        return self.launch.python or sys.executable

    @property
    def ssh(self) -> Ssh:
        """How hosts are reached, with the user's own options where pdsh would take them from."""
        return Ssh(tuple(self.environ.get(PDSH_OPTIONS, "").split()))

    def which(self, program: str) -> str | None:
        """Return where a program is that jobs would find."""
        return shutil.which(program, path=self.environ.get("PATH"))


@dataclass(frozen=True)
class Check:
    """A part of the examination, which runs beside the others."""

    name: str
    run: Callable[[Subject], Iterator[Finding]]
    overdue: str
    """What to do when it does not end in time."""
