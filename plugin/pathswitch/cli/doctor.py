"""What ``pathswitch doctor`` prints: a table on a terminal, a line for each finding in a log, or JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pathswitch.cli.run_checkpoints import say
from pathswitch.launch.doctor import Finding, Request, diagnose

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red", "skipped": "dim"}


def doctor_command(plan: Path | None, run: Path | None, hostfile: Path | None, as_json: bool, console: Console) -> int:
    """Examine the environment, print what was found, and return the exit code: 1 if there is a problem.

    Raises:
        ConfigError: the plan cannot be read.
    """
    findings = diagnose(Request(plan, run, hostfile), os.environ)
    counts = Counter(finding.status for finding in findings)
    if as_json:
        print(json.dumps({"findings": [finding.as_json() for finding in findings], **counts}, indent=1))
    elif console.is_terminal:
        console.print(table(findings))
    else:
        for finding in findings:
            say(console, line(finding))
    if not as_json:
        say(console, ", ".join(f"{count} {status}" for status, count in counts.items()))
    return int(counts["problem"] > 0)


def line(finding: Finding) -> str:
    """Return a finding as one line of a log."""
    todo = f" -> {finding.todo}" if finding.todo else ""
    return f"{finding.status:<8} {finding.name}: {finding.found}{todo}"


def table(findings: list[Finding]) -> Table:
    """Return the findings as a table, with what to do below what was found."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("")
    shown.add_column("check")
    shown.add_column("found, and what to do", overflow="fold")
    for finding in findings:
        style = STYLES[finding.status]
        todo = f"\n[bold]{escape(finding.todo)}[/bold]" if finding.todo else ""
        shown.add_row(f"[{style}]{finding.status}[/]", escape(finding.name), escape(finding.found) + todo)
    return shown
