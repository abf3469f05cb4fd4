"""SLURM's commands as far as pathswitch uses them, keeping their jobs in a folder, and failing where they are told to.

``FakeSlurm(folder)`` writes commands that run this file; what they were called with and the jobs are there to look at.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import sys
import time
from pathlib import Path
from typing import Any

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel")
FORMAT = "--format=%i|%T|%r|%L|%N|%k"
AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
NO_ANSWER = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


class FakeSlurm:
    """A folder with the commands in ``bin`` and their state beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir(parents=True)
        for name in COMMANDS:
            script = self.bin / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {folder} {name} "$@"\n')
            script.chmod(script.stat().st_mode | stat.S_IXUSR)

    @property
    def jobs(self) -> dict[str, dict[str, Any]]:
        """All jobs by their names in the plan, of two with one name the later one."""
        return {job["comment"].rpartition(":")[2]: job for job in self.all_jobs()}

    def all_jobs(self) -> list[dict[str, Any]]:
        return _read(self.folder / "jobs.json", [])

    def live(self) -> list[str]:
        """The names of the jobs that wait or run, sorted: each once, unless something is doubled."""
        ended = ("COMPLETED", "FAILED", "CANCELLED")
        return sorted(job["comment"].rpartition(":")[2] for job in self.all_jobs() if job["state"] not in ended)

    def change(self, name: str, **fields: Any) -> None:
        with (self.folder / "lock").open("a") as lock:  # a command reads all jobs, and writes them back
            fcntl.flock(lock, fcntl.LOCK_EX)
            jobs = self.all_jobs()
            for job in jobs:
                if job["comment"].endswith(f":{name}"):
                    job.update(fields)
            _write(self.folder / "jobs.json", jobs)

    def calls(self, *names: str) -> list[list[str]]:
        """The command lines so far, of some commands or of all."""
        lines = [json.loads(line) for line in _text(self.folder / "calls.jsonl").splitlines()]
        return [line["argv"] for line in lines if not names or line["argv"][0] in names]

    def environments(self) -> list[dict[str, str]]:
        """The environment of each call of sbatch."""
        lines = [json.loads(line) for line in _text(self.folder / "calls.jsonl").splitlines()]
        return [line["environ"] for line in lines if line["argv"][0] == "sbatch"]

    def forget_calls(self) -> None:
        (self.folder / "calls.jsonl").unlink(missing_ok=True)

    def fault(self, nth: int, what: str, argument: str = "") -> None:
        """Have something happen at the nth call from now, from 0.

        One of: "kill before", "kill after" (the caller), "away" (the controller), "no answer" (it took the request, and
        the answer is lost), "refuse", "touch ARGUMENT after", "wait for ARGUMENT".
        """
        _write(self.folder / "fault.json", {"nth": nth + len(self.calls()), "what": what, "argument": argument})


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _read(file: Path, default: Any) -> Any:
    return json.loads(file.read_text()) if file.exists() else default


def _write(file: Path, content: Any) -> None:
    temp = file.with_name(f"{file.name}.{os.getpid()}")
    temp.write_text(json.dumps(content))
    temp.rename(file)


def _sbatch(jobs: list[dict[str, Any]], words: list[str]) -> str:
    options, (script,) = [word for word in words if word[:2] == "--"], [word for word in words if word[:2] != "--"]
    assert "--parsable" in options
    lines = [line.removeprefix("#SBATCH ") for line in Path(script).read_text().splitlines() if line[:8] == "#SBATCH "]
    (comment,) = [line.removeprefix("--comment=") for line in lines if line.startswith("--comment=")]
    held = "--hold" in options
    dependency = next((word.partition("=")[2] for word in options if word.startswith("--dependency=")), "")
    job = {
        "id": str(len(jobs) + 1),
        "state": "PENDING",
        "reason": "JobHeldUser" if held else "Dependency" if dependency else "Priority",
        "comment": comment,
        "dependency": dependency,
        "script": script,
        "options": options,
    }
    jobs.append(job)
    return job["id"]


def _squeue(jobs: list[dict[str, Any]], words: list[str]) -> str:
    if "--steps" in words:
        return ""
    assert words == ["--noheader", "--me", "--states=all", FORMAT], words
    rows = [f"{job['id']}|{job['state']}|{job['reason']}|1:00||{job['comment']}" for job in jobs]
    return "\n".join(["77|RUNNING|None|1:00|n1|somebody's own", "78|RUNNING|None|1:00|n1|(null)", *rows])


def _scontrol(jobs: list[dict[str, Any]], words: list[str]) -> str:
    if words[:2] == ["show", "hostnames"]:
        return "n1\nn2"
    if words[:2] == ["show", "job"]:
        job = next(job for job in jobs if job["id"] == words[-1])
        return f"JobId={job['id']} JobState={job['state']} PreemptTime={job.get('preempt_time', 'None')} Priority=1"
    if words[0] == "update":
        job = next(job for job in jobs if f"JobId={job['id']}" in words)
        assert words[2:] == ["Dependency="]
        job["dependency"] = ""
        return ""
    job = next(job for job in jobs if job["id"] == words[1])
    if words[0] == "release":
        job["reason"] = "Dependency" if job["dependency"] else "Priority"
    elif words[0] == "requeue":
        job.update(state="PENDING", reason="BeginTime")
    else:
        sys.exit(f"scontrol {words}")
    return ""


def _scancel(jobs: list[dict[str, Any]], words: list[str]) -> str:
    for job in jobs:
        if job["id"] in words and not any(word.startswith("--signal") for word in words):
            job.update(state="CANCELLED", reason="None")
    return ""


ACTIONS = {"sbatch": _sbatch, "squeue": _squeue, "scontrol": _scontrol, "scancel": _scancel}


def _main(folder: Path, argv: list[str]) -> int:
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        number = len(_text(folder / "calls.jsonl").splitlines())
        with (folder / "calls.jsonl").open("a") as calls:
            calls.write(json.dumps({"argv": argv, "environ": dict(os.environ)}) + "\n")
    fault = _read(folder / "fault.json", {"nth": -1, "what": ""})
    what = fault["what"] if fault["nth"] == number or (folder / "down").exists() else ""
    if (folder / "down").exists() or what == "away":
        print(AWAY, file=sys.stderr)
        return 1
    if what == "refuse":
        print(f"{argv[0]}: error: Batch job submission failed: Invalid account", file=sys.stderr)
        return 1
    if what == "kill before":
        _kill_caller()
    deadline = time.monotonic() + 30
    while what == "wait for" and not Path(fault["argument"]).exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        jobs = _read(folder / "jobs.json", [])
        output = ACTIONS[argv[0]](jobs, argv[1:])
        _write(folder / "jobs.json", jobs)
    if what == "kill after":
        _kill_caller()
    if what == "touch after":
        Path(fault["argument"]).touch()
    if what == "no answer":
        print(NO_ANSWER, file=sys.stderr)
        return 1
    print(output)
    return 0


def _kill_caller() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(1)


if __name__ == "__main__":
    sys.exit(_main(Path(sys.argv[1]), sys.argv[2:]))
