"""SLURM's commands, as pathswitch uses them; a controller that restarts is waited for."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pathswitch.errors import RunError

# Options that sites have users set in their environment.
DEFAULTS = ("account", "partition", "qos", "reservation")
COMMAND_SECONDS = 60
RETRY_SECONDS = 120.0
UNREACHABLE = ("Unable to contact slurm controller", "Connection refused", "Socket timed out", "connect failure")
LIVE_STATES = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "STOPPED", "COMPLETING", "SIGNALING", "STAGE_OUT"}
LIVE_STATES |= {"REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING", "SPECIAL_EXIT"}


@dataclass(frozen=True)
class SlurmJob:
    """A job as squeue shows it."""

    job_id: str
    state: str
    reason: str
    time_left: str
    node_list: str
    comment: str

    @property
    def is_live(self) -> bool:
        """Whether the job waits or runs."""
        return self.state in LIVE_STATES

    @property
    def is_held(self) -> bool:
        """Whether the job waits to be released."""
        return self.state == "PENDING" and self.reason == "JobHeldUser"


def command_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of SLURM's commands without what they would take for options.

    Those of sbatch are stronger than the lines of a script, and those of a job are the parent's within it.
    """
    options = ("SBATCH_", "SQUEUE_", "SCANCEL_", *(["SLURM_"] if "SLURM_JOB_ID" in environ else []))
    return {k: v for k, v in environ.items() if k == "SLURM_CONF" or not k.startswith(options)}


def _defaults(script: Path, environ: Mapping[str, str], prefix: str) -> list[str]:
    """Return options that variables with a prefix give to a job whose script has none of its own."""
    text = script.read_text()
    found = {name: environ.get(f"{prefix}{name.upper()}") for name in DEFAULTS if f"\n#SBATCH --{name}=" not in text}
    return [f"--{name}={value}" for name, value in found.items() if value]


def submit(script: Path, comment: str, *, held: bool = False, after: str | None = None, prefix: str = "SBATCH_") -> str:
    """Submit a batch script and return the job's id; a job that a broken answer hides is found by its comment.

    Args:
        script: the file.
        comment: tells this job from all others; it stands in the script.
        held: whether the job waits until it is released.
        after: a dependency, such as ``afterok:12``; the job is cancelled if it cannot be met any more.
        prefix: of the variables that name account, partition, QOS and reservation, where the script does not: those
            of whoever submits, or ``SLURM_JOB_``, those of the job that this process runs in.

    Raises:
        RunError: SLURM refuses the job, or does not answer.
    """
    command = ["sbatch", "--parsable", *_defaults(script, os.environ, prefix), *(["--hold"] if held else [])]
    if after is not None:
        command += [f"--dependency={after}", "--kill-on-invalid-dep=yes"]
    deadline = time.monotonic() + RETRY_SECONDS
    while True:
        result = _run([*command, str(script)])
        job_id = result.stdout.strip().partition(";")[0]
        if result.returncode == 0 and job_id.isdecimal():
            return job_id
        if not _is_unreachable(result) or time.monotonic() > deadline:
            raise _error(f"sbatch {script}", result)
        time.sleep(1)
        # The controller may have taken the job and died before it answered.
        if (known := live_jobs(comment)) and comment in known:
            return known[comment].job_id


def live_jobs(comment_prefix: str) -> dict[str, SlurmJob]:
    """Return this user's waiting and running jobs by their comments, of those that begin with a prefix."""
    return {job.comment: job for job in jobs(comment_prefix) if job.is_live}


def jobs(comment_prefix: str) -> list[SlurmJob]:
    """Return this user's jobs that the controller still knows, finished ones too, by rising id.

    Raises:
        RunError: SLURM does not answer.
    """
    output = run("squeue", "--noheader", "--me", "--states=all", "--format=%i|%T|%r|%L|%N|%k")
    found = (SlurmJob(*line.strip().split("|", 5)) for line in output.splitlines() if line.count("|") >= 5)
    return sorted((job for job in found if job.comment.startswith(comment_prefix)), key=lambda job: int(job.job_id))


def release(job_id: str) -> None:
    """Let a held job start."""
    run("scontrol", "release", job_id)


def clear_dependency(job_id: str) -> None:
    """Let a job wait for no other."""
    run("scontrol", "update", f"JobId={job_id}", "Dependency=")


def requeue(job_id: str) -> None:
    """Put a running job, which may be the caller's own, back into the queue.

    SLURM may have done that already, as it lost one of the job's nodes, and not have ended the batch script yet.
    """
    try:
        run("scontrol", "requeue", job_id)
    except RunError as error:
        if "pending execution" not in str(error):
            raise


def is_preempted(job_id: str) -> bool:
    """Return whether SLURM takes a running job's nodes for another job; its steps have got SIGTERM then."""
    return re.search(r"\bPreemptTime=\d", run("scontrol", "show", "job", "--oneliner", job_id)) is not None


def cancel(job_id: str) -> None:
    """End a job for good."""
    run("scancel", job_id)


def signal_steps(job_id: str, name: str) -> None:
    """Send a signal to every process of a job's steps, not to its batch script; a job without steps is none."""
    _run(["scancel", f"--signal={name.removeprefix('SIG')}", job_id])


def end_steps(job_id: str) -> None:
    """End a job's steps; SIGKILL by scancel would end the whole job."""
    for step in _run(["squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i"]).stdout.split():
        if step.rpartition(".")[2].isdecimal():  # not the batch script, nor what a site has beside it
            _run(["scancel", step])


def host_names(node_list: str) -> list[str]:
    """Return the hosts of a list such as ``n[1-4]``."""
    return run("scontrol", "show", "hostnames", node_list).split()


def run(*command: str) -> str:
    """Run one of SLURM's commands and return what it prints.

    Raises:
        RunError: it fails, or the controller stays away for longer than RETRY_SECONDS.
    """
    deadline = time.monotonic() + RETRY_SECONDS
    while (result := _run(list(command))).returncode != 0:
        if not _is_unreachable(result) or time.monotonic() > deadline:
            raise _error(" ".join(command), result)
        time.sleep(1)
    return result.stdout


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=COMMAND_SECONDS,
            env=command_environment(os.environ),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise RunError(
            f"{command[0]}: not found: [launch] kind = 'slurm' needs SLURM's commands on PATH, on the nodes too"
        ) from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"Socket timed out after {COMMAND_SECONDS} s")


def _is_unreachable(result: subprocess.CompletedProcess[str]) -> bool:
    return any(text in result.stderr for text in UNREACHABLE)


def _error(command: str, result: subprocess.CompletedProcess[str]) -> RunError:
    return RunError(f"{command} failed (exit code {result.returncode}): {result.stderr.strip() or result.stdout}")
