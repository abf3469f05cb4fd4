"""Run one job of a plan under HostfileLauncher, as an agent does, and print what happened as one JSON line.

    python drive_job.py PLAN RUN PATH RESULT [NAME=VALUE ...]     the job's environment beside the plan's
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pathswitch.config import load_plan_file
from pathswitch.errors import PathSwitchError
from pathswitch.launch.hostfile import HostfileLauncher
from pathswitch.launch.spec import job_specs

POLL_SECONDS = 0.2


def drive(plan: Path, run: Path, path: str, extra: dict[str, str]) -> dict[str, Any]:
    specs = {spec.path: spec for spec in job_specs(load_plan_file(plan), plan.parent, run)}
    spec = specs[path]
    launcher = HostfileLauncher(spec, {**spec.environment(), **spec.launch.env, **extra})
    spec.files.folder.mkdir(parents=True, exist_ok=True)
    command = launcher.command(spec.command_from(spec.start_step))
    environment = {**os.environ, **spec.environment(), **spec.launch.env, **extra, **launcher.environment()}
    failure = None
    with spec.files.log.open("ab") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while job.poll() is None and failure is None:
            failure = launcher.failure()
            time.sleep(POLL_SECONDS)
    began = time.monotonic()
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    ended = launcher.end()
    return {"code": job.returncode, "failure": failure, "ended": ended, "end_seconds": time.monotonic() - began}


if __name__ == "__main__":
    plan, run, path, result, *pairs = sys.argv[1:]
    extra = dict(pair.split("=", 1) for pair in pairs)
    try:
        outcome = drive(Path(plan), Path(run), path, extra)
    except PathSwitchError as error:
        outcome = {"error": str(error)}
    Path(result).write_text(json.dumps(outcome))
