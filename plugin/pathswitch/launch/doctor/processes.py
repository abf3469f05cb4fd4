"""Which processes of a run are there, on this machine and on its hosts, and whether anybody looks after them."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

from pathswitch.launch.agent_lock import holder
from pathswitch.launch.doctor.findings import Finding, Subject, ok, problem, skipped
from pathswitch.launch.hostfile import Found, orphans
from pathswitch.launch.spec import run_id
from pathswitch.run_folder import PathFolder


def check(subject: Subject) -> Iterator[Finding]:
    """Look for the run's processes by the variable PATHSWITCH_JOB."""
    if subject.run is None:
        yield skipped("processes", "no run folder given")
        return
    names = [host.name for host in subject.hosts]
    machines = orphans(names, [run_id(subject.run)], python=subject.python, ssh=subject.ssh)
    count = sum(len(machine.processes) for machine in machines)
    left = [finding for machine in machines for finding in orphan_findings(subject.run, machine)]
    # A host that does not answer is the matter of the hosts' own check.
    yield from left or [ok("processes", f"{count} of this run, none without its agent")]


def orphan_findings(run: Path, machine: Found) -> Iterator[Finding]:
    """Report the processes of a machine whose jobs have no agent that lives."""
    jobs = sorted({str(process["job"]) for process in machine.processes})
    for job in (job for job in jobs if not has_agent(run, job)):
        pids = [str(process["pid"]) for process in machine.processes if process["job"] == job]
        path = job.rpartition(":")[2]
        found = f"{len(pids)} of path {path} on {machine.host}, and no agent looks after them"
        prefix = "" if machine.host == socket.gethostname() else f"ssh {machine.host} "
        yield problem("processes", found, f"{prefix}kill {' '.join(pids)}   # they would disturb the next job")


def has_agent(run: Path, job: str) -> bool:
    """Return whether an agent holds the lock of a job's path; a lock of another host counts where locks do."""
    _, paradigm, path = job.split(":")
    return holder(PathFolder(run / paradigm / path)) is not None
