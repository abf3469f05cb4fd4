"""A tiny plan on SLURM, and what tests need to act on its jobs at the right moment: pace, steps, processes, events."""

from __future__ import annotations

import json
import lzma
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import Cluster

from pathswitch.launch.journal import Journal
from pathswitch.launch.spec import comment_prefix

ROOT = Path(__file__).parents[2]
COMMAND = str(Path(sys.executable).with_name("pathswitch"))
VERSIONS = ("v1", "v2", "v3", "v4")
STEPS, SAVE_EVERY = 100, 20
FORKS = {"v1": 40, "v2": 140, "v3": 240, "v4": 340}
PATIENCE_SECONDS = 400.0

PLAN = """
[schedule]
max_lr = 1e-2
warmup_steps = 2
final_lr = 1e-4
alpha = 0.6
{versions}
[model]
hidden_size = 32
intermediate_size = 64
n_layers = 2
n_heads = 2
[data]
seq_len = 32
vocab_size = 400
[train]
global_batch_size = 4
ranks = 2
save_every_steps = {save_every}
[launch]
{launch}
"""
# Threads add up in another order, so their number is part of what has to be the same.
THREADS = 'OMP_NUM_THREADS = "1"'
ON_SLURM = f"""
kind = "slurm"
partition = "main"
gpus_per_node = 1
python = "{{python}}"
signal_seconds = 45
env = {{{{ {THREADS}, PACE_FOLDER = "{{pace}}" }}}}
main = {{{{ gpus_per_node = 2, time = "00:02:00", sbatch = ["--nodelist=n1"] }}}}
branches = {{{{ time = "01:00:00", sbatch = ["--exclude=n1"] }}}}
paths.v1 = {{{{ nodes = 2 }}}}
paths.v2 = {{{{ sbatch = ["--nodelist=n4"] }}}}
"""
HERE = f"""
kind = "local"
gpus_per_node = 1
env = {{ {THREADS} }}
main = {{ gpus_per_node = 2 }}
paths.v1 = {{ gpus_per_node = 2 }}
"""
# The ranks' interpreter: from the step on that the file of a rank's path names, every update takes as long as it says.
PACED_PYTHON = f"""#!{sys.executable}
import functools, os, runpy, sys, time
import deepspeed
at_once = deepspeed.DeepSpeedEngine.step
@functools.wraps(at_once)
def paced(self, *args, **kwargs):
    try:
        with open(os.path.join(os.environ["PACE_FOLDER"], os.environ["PATHSWITCH_PATH"])) as file:
            step, seconds = file.read().split()
        time.sleep(float(seconds) * (self.global_steps >= int(step)))
    except FileNotFoundError:
        pass
    return at_once(self, *args, **kwargs)
deepspeed.DeepSpeedEngine.step = paced
assert sys.argv[1:3] == ["-u", "-m"]
module, sys.argv = sys.argv[3], sys.argv[3:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def write_plans(folder: Path) -> tuple[Path, Path]:
    """Write the text of four versions, and one plan to train them on SLURM and here, on as many ranks."""
    versions = ""
    for version in VERSIONS:
        for split, size in (("train", 60_000), ("test", 4_000)):
            with lzma.open(ROOT / f"launch/sotu/{version}_{split}.txt.xz", "rt", encoding="utf-8") as file:
                (folder / f"{version}_{split}.txt").write_text(file.read(size))
        text = f'train = "{version}_train.txt"\ntest = "{version}_test.txt"\n'
        versions += f'[[versions]]\nname = "{version}"\nsteps = {STEPS}\n{text}'
    python, pace = folder / "python", folder / "pace"
    python.write_text(PACED_PYTHON)
    python.chmod(0o755)
    pace.mkdir()
    plans = folder / "slurm.toml", folder / "here.toml"
    for plan, launch in zip(plans, (ON_SLURM.format(python=python, pace=pace), HERE), strict=True):
        plan.write_text(PLAN.format(versions=versions, save_every=SAVE_EVERY, launch=launch))
    return plans


@dataclass(frozen=True)
class Run:
    """A run folder that SLURM jobs train in."""

    cluster: Cluster
    plan: Path
    out: Path

    def pathswitch(self, *arguments: str | Path) -> str:
        """Run the command to its end and return what it prints."""
        line = [COMMAND, *map(str, arguments)]
        done = subprocess.run(line, capture_output=True, text=True, env=self.cluster.environment(), timeout=240)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def status(self) -> dict[str, dict[str, Any]]:
        """Return what `pathswitch status` says, by path."""
        rows: list[dict[str, Any]] = json.loads(self.pathswitch("status", self.out, "--json"))
        return {row["path"]: row for row in rows}

    def folder(self, path: str) -> Path:
        """Return a path's folder."""
        return self.out / "path_switching" / path

    def slow(self, path: str, step: int, seconds: float = 1.0) -> None:
        """Have every update of a path take ``seconds`` from a step on, so that there is time to act."""
        file = self.plan.parent / "pace" / path
        new = file.with_suffix(".new")
        new.write_text(f"{step} {seconds}")
        new.replace(file)

    def fast(self, path: str) -> None:
        """Have a path trained at full speed again."""
        (self.plan.parent / "pace" / path).unlink()

    def step(self, path: str) -> int:
        """Return how many updates are behind a path."""
        metrics = self.folder(path) / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        return int(json.loads(whole[-1])["step"]) + 1 if whole else 0

    def job_id(self, path: str) -> int:
        """Return the id of a path's job; there is exactly one."""
        comment = comment_prefix(str(self.out), "path_switching") + path
        own = [job for job in self.cluster.jobs() if job.get("Comment") == comment]
        assert len(own) == 1, own
        return int(own[0]["JobId"])

    def job(self, path: str) -> dict[str, str]:
        """Return SLURM's fields of a path's job."""
        return self.cluster.job(self.job_id(path))

    def events(self, path: str) -> list[dict[str, Any]]:
        """Return what has happened to a path's job, from the ledger, the oldest first."""
        records = [event.record for event in Journal(self.out, "path_switching", path).read()]
        return [{"event": r.event, "step": r.step, "reason": r.reason or "", "attempt": r.attempt} for r in records]

    def wait_for(self, predicate: Callable[[], object], what: str) -> None:
        """Wait until something holds; fail with the cluster's state and the jobs' logs."""
        try:
            self.cluster.wait_for(predicate, PATIENCE_SECONDS, what)
        except TimeoutError as error:
            logs = (self.folder(path) / "log.txt" for path in ("main", *VERSIONS))
            ends = [f"--- {log}\n{log.read_text()[-2000:]}" for log in logs if log.exists()]
            raise TimeoutError("\n".join([str(error), *ends])) from None

    def wait_for_step(self, path: str, step: int) -> None:
        """Wait until a path has come to a step."""
        self.wait_for(lambda: self.step(path) >= step, f"{path} is at step {step}")

    def wait_for_starts(self, path: str, count: int) -> None:
        """Wait until SLURM has started a path's job for the nth time."""
        self.wait_for(
            lambda: sum(event["event"] == "started" for event in self.events(path)) >= count,
            f"{path} has been started {count} times",
        )

    def wait_for_end(self, path: str) -> None:
        """Wait until a path is trained to its end."""
        self.wait_for((self.folder(path) / "done.json").is_file, f"{path} is trained to its end")

    def processes(self, *words: str) -> list[int]:
        """Return the processes with these words in their command line, on whatever node."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if all(word in line for word in words):
                found.append(int(entry.name))
        return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a path's updates without what differs from run to run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
