"""Jobs of a plan on two hosts, started from host hA as an agent does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from two_hosts import LINK, TwoHosts

from pathswitch.launch.spec import run_id

HERE = Path(__file__).parent
PLAN = """
[schedule]
max_lr = 2e-3
final_lr = 1e-5
shape = "linear"
alpha = 0.5
[[versions]]
name = "v1"
steps = 40
[launch]
kind = "hostfile"
hostfile = "hostfile"
host_timeout_seconds = {timeout}
launcher = "{launcher}"
launcher_args = {launcher_args}
nodes = 2
command = {command}
[launch.env]
{env}
"""
COMMON = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "GLOO_SOCKET_IFNAME": LINK}
ROOT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass
class Jobs:
    """A plan and its run folder in a folder that both hosts share."""

    hosts: TwoHosts
    folder: Path
    launcher: str
    command: Sequence[str]
    timeout: float = 60
    env: Mapping[str, str] = field(default_factory=dict)
    """What the ranks get."""

    def __post_init__(self) -> None:
        (self.folder / "home").mkdir()
        (self.folder / "hostfile").write_text("hA slots=1  # both\nhB slots=1\n")
        arguments = [f"--mca orte_tmpdir_base {self.folder}"] if self.launcher == "openmpi" else []
        values = {"launcher": self.launcher, "launcher_args": json.dumps(arguments), "timeout": self.timeout}
        values |= {"env": "\n".join(f"{name} = {_toml(value)}" for name, value in {**COMMON, **self.env}.items())}
        text = PLAN.format(**values, command=_toml(list(self.command)))
        (self.folder / "plan.toml").write_text(text)

    def start(self, path: str) -> subprocess.Popen[Any]:
        """Start a path's job."""
        (self.folder / f"{path}.json").unlink(missing_ok=True)
        arguments = [self.folder / "plan.toml", self.folder / "run", path, self.folder / f"{path}.json"]
        command = [sys.executable, str(HERE / "drive_job.py"), *map(str, arguments)]
        return self.hosts.popen("hA", command, cwd=self.folder, env={**ROOT, "HOME": str(self.folder / "home")})

    def prepare(self, path: str) -> str:
        """Do what comes before a path's start, and return what is said about it."""
        code = "import sys; from pathlib import Path; from pathswitch.config import load_plan_file; "
        code += (
            "from pathswitch.launch.hostfile import HostfileLauncher; from pathswitch.launch.spec import job_specs; "
        )
        code += "specs = job_specs(load_plan_file('plan.toml'), Path.cwd(), Path('run')); "
        code += "(spec,) = (spec for spec in specs if spec.path == sys.argv[1]); "
        code += "HostfileLauncher(spec).command(spec.parts[0].command)"
        return self.hosts.check("hA", sys.executable, "-c", code, path, cwd=self.folder)

    def kill_agent(self, job: subprocess.Popen[Any]) -> None:
        """Kill what stands for the agent, and nothing that it has started."""
        for child in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)
        job.wait(60)

    def result(self, path: str, job: subprocess.Popen[Any], seconds: float = 120) -> dict[str, Any]:
        """Wait for a job's end and return what came of it."""
        try:
            job.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill_agent(job)
            raise AssertionError(f"{path} still runs after {seconds} s:\n{self.log(path)}") from None
        result: dict[str, Any] = json.loads((self.folder / f"{path}.json").read_text())
        return result

    def id_of(self, path: str) -> str:
        """Return what marks a job's processes."""
        return f"{run_id(self.folder / 'run')}:path_switching:{path}"

    def log(self, path: str) -> str:
        """Return the end of a job's log."""
        file = self.folder / "run" / "path_switching" / path / "log.txt"
        return file.read_text(errors="replace")[-4000:] if file.is_file() else "no log"

    def beats(self, path: str) -> bool:
        """Return whether both ranks of a job are alive."""
        now = time.time()
        files = [self.folder / f"{path}.rank{rank}" for rank in (0, 1)]
        return all(file.is_file() and now - file.stat().st_mtime < 1 for file in files)

    def orphans(self, job: str) -> dict[str, list[int]]:
        """Return the PIDs that hosts have of a job, or of a run's jobs."""
        code = "import json, sys; from pathswitch.launch import hostfile; "
        code += "found = hostfile.orphans(['hA', 'hB'], sys.argv[1:]); "
        code += "print(json.dumps({f.host: [p['pid'] for p in f.processes] for f in found if not f.error}))"
        pids: dict[str, list[int]] = json.loads(self.hosts.check("hA", sys.executable, "-c", code, job))
        return pids


def wait(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)


def _toml(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def path_of(environ: Mapping[str, str] = os.environ) -> str:
    """Return PATH with this environment's tools (ninja): a host's own PATH does not have them."""
    return f"{Path(sys.executable).parent}:{environ['PATH']}"
