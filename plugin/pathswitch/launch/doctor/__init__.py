"""``pathswitch doctor``: looks at the environment that a job would run in, and says what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from pathswitch.launch.doctor import accelerator, folders, hosts, machine, network, packages, processes, slurm
from pathswitch.launch.doctor.apart import examine_apart
from pathswitch.launch.doctor.findings import Check, Finding, Status, Subject, problem
from pathswitch.launch.doctor.programs import Programs, in_parallel
from pathswitch.launch.doctor.request import Request

__all__ = ["CHECKS", "SECONDS", "Check", "Finding", "Programs", "Request", "Status", "Subject", "diagnose", "examine"]

SECONDS = 24.0
# Between the end of the checks and the end of patience: for the findings on their way.
SPARE_SECONDS = 3.0

CHECKS = (
    Check("packages", packages.check, "is the disk of the Python environment slow or gone?"),
    Check("torch", accelerator.check, "time python -c 'import torch'; nvidia-smi"),
    Check("JIT locks", machine.check_builds, "ls the folder of TORCH_EXTENSIONS_DIR: its file system hangs"),
    Check("run folder", folders.check, "ls the run folder: its file system hangs; choose another, or ask its operator"),
    Check("hosts", hosts.check, "ls the run folder, and ssh to each host: one of them hangs"),
    Check("processes", processes.check, "ssh to each host: one of them hangs"),
    Check("SLURM", slurm.check, "scontrol ping; squeue: the controller hangs"),
    Check("network", network.check, "getent hosts $(hostname): the name server hangs"),
    Check("limits", machine.check_limits, "ls /dev/shm"),
    Check("variables", machine.check_variables, "ls the files that PATHSWITCH_* name: a file system hangs"),
)


def diagnose(request: Request, environ: Mapping[str, str], seconds: float = SECONDS) -> list[Finding]:
    """Return the findings of all checks, within ``seconds`` and a little more whatever hangs.

    Raises:
        PathSwitchError: the plan cannot be read.
    """

    def examination() -> list[Finding]:
        subject, findings = request.subject(environ, seconds)
        return findings + examine(subject)

    return examine_apart(examination, seconds + SPARE_SECONDS)


def examine(subject: Subject, checks: tuple[Check, ...] = CHECKS) -> list[Finding]:
    """Run all checks beside each other, for as long as there is time, and return their findings in order."""
    found: list[list[Finding]] = [[] for _ in checks]
    try:
        outcomes = in_parallel(subject.programs, partial(_run, subject, checks, found), range(len(checks)))
    finally:
        subject.programs.end_all()
    findings = []
    for check, outcome, of_check in zip(checks, outcomes, found, strict=True):
        findings += list(of_check)
        if isinstance(outcome, Exception):
            reason = f"cannot be checked: {type(outcome).__name__}: {outcome}"
            findings.append(problem(check.name, reason, check.overdue))
        elif outcome is None:
            findings.append(problem(check.name, f"not checked within {subject.programs.seconds:.0f} s", check.overdue))
    return findings


def _run(subject: Subject, checks: tuple[Check, ...], found: list[list[Finding]], place: int) -> bool:
    for finding in checks[place].run(subject):
        found[place].append(finding)
    return True
