"""What the tests of the doctor have in common: a subject, and programs of their own on its PATH."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pathswitch.config import PlanFile
from pathswitch.config.launch import LaunchSection
from pathswitch.launch.doctor import Finding, Programs, Subject
from pathswitch.launch.hosts import Host

SCHEDULE = {"schedule": {"max_lr": 1e-3}, "versions": ({"name": "v1", "steps": 10},)}


def subject(
    run: Path | None = None,
    *,
    launch: LaunchSection | None = None,
    hosts: tuple[str, ...] = (),
    seconds: float = 30,
    path: Path | None = None,
    **variables: str | None,
) -> Subject:
    """A subject with this process's variables, some changed (None: unset), and a folder of programs before PATH."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PATHSWITCH_")}
    environ |= {key: value for key, value in variables.items() if value is not None}
    environ = {key: value for key, value in environ.items() if variables.get(key, value) is not None}
    if path is not None:
        environ["PATH"] = f"{path}:{environ['PATH']}"
    plan = None if launch is None else PlanFile.model_validate({**SCHEDULE, "launch": launch})
    return Subject(Programs(environ, seconds), plan, (), run, tuple(Host(name, 1) for name in hosts))


def program(folder: Path, name: str, script: str) -> Path:
    """Write a program for the shell."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    """Findings by name; each problem says what to do."""
    assert all(finding.todo for finding in findings if finding.status == "problem")
    return {finding.name: finding for finding in findings}


@contextmanager
def mounted(place: Path, kind: str, options: str, source: str = "tmpfs") -> Iterator[Path]:
    """A file system of its own, which takes root."""
    place.mkdir(exist_ok=True)
    command = ["mount", "-t", kind, "-o", options, source, str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs root, to mount small file systems of its own")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True, timeout=30)
