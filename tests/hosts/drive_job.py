"""Run one job of a plan under HostfileLauncher as an agent does, but once, and write down what happened.

python drive_job.py PLAN RUN PATH RESULT
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


def drive(plan: Path, run: Path, path: str) -> dict[str, Any]:
    specs = {spec.path: spec for spec in job_specs(load_plan_file(plan), plan.parent, run)}
    spec = specs[path]
    launcher = HostfileLauncher(spec)
    spec.files.folder.mkdir(parents=True, exist_ok=True)
    command = launcher.command(spec.command_from(spec.start_step))
    environment = {**os.environ, **launcher.environment()}
    failure = None
    with spec.files.log.open("ab") as log:
        job = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        while job.poll() is None and failure is None:
            failure = launcher.failure()
            time.sleep(POLL_SECONDS)
    failed_at = time.time()
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    ended = launcher.end()
    return {"code": job.returncode, "failure": failure, "failed_at": failed_at, "ended": ended}


if __name__ == "__main__":
    plan, run, path, result = sys.argv[1:]
    try:
        outcome = drive(Path(plan), Path(run), path)
    except PathSwitchError as error:
        outcome = {"error": str(error)}
    Path(result).write_text(json.dumps(outcome))
