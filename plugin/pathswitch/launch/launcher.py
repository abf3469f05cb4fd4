"""How the ranks of a job are started and ended: here on this machine, elsewhere on hosts or by SLURM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from pathswitch.errors import RunError
from pathswitch.launch import job_processes
from pathswitch.launch.local import GRACE_SECONDS, job_environment
from pathswitch.launch.spec import JobSpec, launcher_words


class Launcher(Protocol):
    """Starts and ends the ranks of one job, for its agent."""

    def command(self, training: Sequence[str]) -> list[str]:
        """Return what the agent runs, given what follows ``python``."""

    def environment(self) -> dict[str, str]:
        """Return what that process has in its environment beside the job's."""

    def ask_to_stop(self) -> None:
        """Ask the ranks to save and end, beside the stop file, which is there already; may be called repeatedly."""

    def failure(self) -> str | None:
        """Return why the job cannot go on, None while it can; called every second, it must not block."""

    def end(self) -> list[str]:
        """End whatever is left of the job anywhere, and return lines about what was found."""


class LocalLauncher:
    """The deepspeed launcher on this machine."""

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec

    def command(self, training: Sequence[str]) -> list[str]:
        """End what an earlier start has left, and return the launch line."""
        spec = self._spec
        for line in self.end():
            print(f"pathswitch: {spec.path}: before the start: {line}", flush=True)
        runner = [spec.python, "-m", "deepspeed.launcher.runner", "--num_gpus", str(spec.ranks)]
        return [*runner, "--master_port", str(spec.port), *launcher_words(spec.launch), *module_or_script(training)]

    def environment(self) -> dict[str, str]:
        """Return this environment, with this machine's cores shared out among the ranks."""
        return job_environment(self._spec.gpus_per_node, os.environ)

    def ask_to_stop(self) -> None:
        """Leave it to the stop file: a launcher that gets SIGTERM kills its ranks half a minute later."""

    def failure(self) -> str | None:
        """Return None: the launcher's end says it all."""
        return None

    def end(self) -> list[str]:
        """End the ranks that outlived their launcher, or an agent that was killed."""
        return end_processes_here(self._spec)


def end_processes_here(spec: JobSpec) -> list[str]:
    """End what is left of a job's processes on this machine, and return a line about them if there were any."""
    found, left = job_processes.end([spec.id], GRACE_SECONDS)
    if not found:
        return []
    pids = ", ".join(str(process["pid"]) for process in found)
    still = f"; still there: {', '.join(str(process['pid']) for process in left)}" if left else ""
    return [f"processes that outlived the launcher, ended: {pids}{still}"]


def launcher_of(spec: JobSpec, slurm_job: str | None) -> Launcher:
    """Return what starts the ranks of a job.

    Args:
        spec: the job.
        slurm_job: the id of the SLURM job that this process runs in.

    Raises:
        RunError: the job is SLURM's, and this process is not in one.
    """
    if spec.launch.kind == "slurm":
        from pathswitch.launch.slurm_launcher import SlurmLauncher

        if slurm_job is None:
            raise RunError(f"{spec.path}: its job is SLURM's: start it with sbatch {spec.files.batch_script}")
        return SlurmLauncher(spec, slurm_job)
    if spec.launch.kind == "hostfile":
        from pathswitch.launch.hostfile import HostfileLauncher

        return HostfileLauncher(spec)
    return LocalLauncher(spec)


def module_or_script(training: Sequence[str]) -> list[str]:
    """Return what follows ``python`` as the deepspeed launcher wants it: ``--module NAME`` for ``-m NAME``."""
    return ["--module", *training[1:]] if training[0] == "-m" else list(training)
