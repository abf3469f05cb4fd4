"""Ending the jobs of a run: those that run save first, those that wait are taken out of the queue."""

from __future__ import annotations

import getpass
import os
import re
import signal
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

from pathswitch.atomic import write_text_atomic
from pathswitch.launch import slurm
from pathswitch.launch.agent import CANCELLED
from pathswitch.launch.agent_lock import holder
from pathswitch.launch.journal import Journal
from pathswitch.launch.render import job_comment
from pathswitch.launch.spec import JobSpec, comment_prefix


def cancel_jobs(specs: Sequence[JobSpec], *, now: bool) -> Iterable[str]:
    """End jobs, and yield a line about each.

    Args:
        specs: the jobs.
        now: do not wait until those that run have saved.
    """
    by = f"{CANCELLED} by {getpass.getuser()} on {socket.gethostname()}"
    on_slurm = [spec for spec in specs if spec.launch.kind == "slurm"]
    live = slurm.live_jobs(comment_prefix(on_slurm[0].run, on_slurm[0].paradigm)) if on_slurm else {}
    # Children first: the end of a parent must not let them start.
    for spec in reversed(specs):
        if spec.launch.kind == "slurm":
            yield f"{spec.path}: {_cancel_slurm(spec, live.get(job_comment(spec)), by, now)}"
        else:
            yield f"{spec.path}: {_cancel_agent(spec, by, now)}"


def _cancel_slurm(spec: JobSpec, job: slurm.SlurmJob | None, by: str, now: bool) -> str:
    if job is None:
        return "no job waits or runs"
    if job.state == "RUNNING" and not now:
        write_text_atomic(spec.files.stop, by + "\n")
        slurm.signal_steps(job.job_id, spec.launch.signal)
        return f"job {job.job_id} is asked to save and end"
    slurm.cancel(job.job_id)
    Journal(Path(spec.run), spec.paradigm, spec.path).write("cancelled", job.job_id, None, by)
    return f"job {job.job_id} is cancelled"


def _cancel_agent(spec: JobSpec, by: str, now: bool) -> str:
    who = holder(spec.files)
    if who is None:
        return "no job runs"
    write_text_atomic(spec.files.stop, by + "\n")
    match = re.fullmatch(r"process (\d+) on (.*)", who)
    if now and match and match[2] == socket.gethostname():
        # Asked twice, an agent ends its ranks at once; of two signals of one kind it might see a single one.
        for signum in (signal.SIGTERM, signal.SIGINT):
            os.kill(int(match[1]), signum)
        return f"{who} ends at once"
    return f"{who} is asked to save and end"
