"""Measure what launching a large plan takes: ``python tests/bench/launch_scale.py [--runs 5] [--versions 50]``.

Prints medians of `pathswitch submit` for a main path on 1,000 nodes and its versions, when nothing is submitted yet and
when all is, and of `pathswitch status` with 10,000 records in the ledger and checkpoints of 8,000 ranks. SLURM's
commands are stand-ins that keep their jobs in a file, and their own time is part of it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "unit" / "launch"))
sys.path.append(str(Path(__file__).parents[1] / "unit" / "checkpoint"))
from checkpoint_files import manifest_of
from fake_slurm import FakeSlurm
from launch_jobs import open_run, write_plan

from pathswitch.checkpoint import FileEntry
from pathswitch.config import build_plan
from pathswitch.run_folder import RunFolder
from pathswitch.versions.records import CheckpointRecord, JobRecord, Record, canonical

LAUNCH = """
kind = "slurm"
command = ["train.py", "--deepspeed_config", "{path}", "--load", "{checkpoints}"]
partition = "gpu"
nodes = 1000
gpus_per_node = 8
time = "24:00:00"
seconds_per_step = 2.0
branches = {nodes = 500}
"""
RANKS, MAIN_CHECKPOINTS, RECORDS = 8_000, 10, 10_000
WRITTEN_AT = b',"written_at":"2025-01-01T00:00:00Z"}\n'


@dataclass(frozen=True)
class Times:
    """What a command took."""

    wall: float
    cpu: float
    """Seconds of all processors, those of the commands that it ran included."""


class Scale:
    """A large plan in a folder, with SLURM's commands on PATH."""

    def __init__(self, folder: Path, versions: int) -> None:
        self.folder, self.versions = folder, versions
        self.slurm = FakeSlurm(folder / "slurm")
        write_plan(folder / "plan.toml", LAUNCH, versions)

    def command(self, *arguments: str | Path) -> Times:
        """Run `pathswitch` to its end."""
        environ = {**os.environ, "PATH": f"{self.slurm.bin}{os.pathsep}{os.environ['PATH']}"}
        line = [str(Path(sys.executable).with_name("pathswitch")), *map(str, arguments)]
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(line, check=True, env=environ, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
        wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        return Times(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    def submit(self, run: str) -> Times:
        """Submit the plan into a run folder."""
        return self.command("submit", self.folder / "plan.toml", "--out", self.folder / run, "--yes")

    def status(self, run: str) -> Times:
        """Ask where its jobs stand."""
        return self.command("status", self.folder / run)

    def grow(self, run: str, records: int = RECORDS, checkpoints: int = MAIN_CHECKPOINTS, ranks: int = RANKS) -> None:
        """Give a run a past: so many records, and checkpoints of the main path with a shard for each rank."""
        out = self.folder / run
        jobs = open_run(self.folder / "plan.toml", out)
        files = {
            f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt": FileEntry(size=10**9, blake3="5" * 64, rank=rank)
            for rank in range(ranks)
        }
        digest = build_plan(RunFolder(out).plan_file()).path("main").digest
        for step in range(1, checkpoints + 1):
            folder = jobs["main"].files.checkpoints / f"global_step{step}"
            folder.mkdir(parents=True, exist_ok=True)
            manifest = manifest_of(folder, files, step=step, schedule_digest=digest)
            (folder / "pathswitch.json").write_bytes(manifest.encode(None))
        for number in range(records):
            path = f"v{number % self.versions + 1}"
            _write(out / "ledger", _record(path, number))


def _record(path: str, number: int) -> Record:
    if number % 3:
        return JobRecord("path_switching", path, "started" if number % 2 else "stopped", f"7.{number}", number, None)
    folder = f"path_switching/{path}/checkpoints/global_step{number}"
    return CheckpointRecord(f"{number:064x}", folder, "path_switching", path, number, 16 * number, None, 3e-4, None)


def _write(ledger: Path, record: Record) -> None:
    """Write a record as the ledger does, without syncing it."""
    content = canonical(record)
    (ledger / f"{hashlib.sha256(content).hexdigest()}.json").write_bytes(content[:-1] + WRITTEN_AT)


def _show(label: str, times: list[Times]) -> None:
    wall, cpu = (statistics.median(getattr(entry, name) for entry in times) for name in ("wall", "cpu"))
    fastest, slowest = min(entry.wall for entry in times), max(entry.wall for entry in times)
    print(f"  {label:<58} {wall:6.2f} s  ({fastest:.2f}..{slowest:.2f}), {cpu:.2f} s of processors", flush=True)


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--versions", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scale = Scale(Path(folder), options.versions)
        print(f"{options.versions} versions, a main path on 1,000 nodes:")
        _show("submit", [scale.submit(f"run{number}") for number in range(options.runs)])
        _show("submit again", [scale.submit("run0") for _ in range(options.runs)])
        scale.grow("run1", records=0)
        _show(f"submit again, {MAIN_CHECKPOINTS} checkpoints of {RANKS:,} ranks", [scale.submit("run1")])
        scale.grow("run0", checkpoints=0)
        _show(f"status, {RECORDS:,} records", [scale.status("run0") for _ in range(options.runs)])
        scale.grow("run0", records=0)
        label = f"status, {RECORDS:,} records, {MAIN_CHECKPOINTS} checkpoints of {RANKS:,} ranks"
        _show(label, [scale.status("run0") for _ in range(options.runs)])


if __name__ == "__main__":
    main()
