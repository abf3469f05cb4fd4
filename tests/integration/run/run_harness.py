"""`pathswitch` as a user calls it, on a tiny plan, under the real deepspeed launcher; and what a run leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[3]
COMMAND = [str(Path(sys.executable).with_name("pathswitch"))]
STEPS = 10
# A run that is long enough to be disturbed: an argument of write_tiny_plan each; and where its branch leaves.
SIZE: dict[str, Any] = {
    "versions": 1,
    "steps": 40,
    "hidden_size": 128,
    "train": "save_every_steps = 4",
    "data": "repeat = true",
}
FORK = 16

Write = Callable[..., Path]


def pathswitch(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; a hang is a failure."""
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=timeout)


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start the command in a session of its own."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def write_tiny_plan(
    corpus: Path,
    name: str,
    *,
    versions: int = 2,
    steps: int = STEPS,
    hidden_size: int = 32,
    train: str = "",
    deepspeed: str = "",
    data: str = "",
) -> Path:
    """Write a plan of a model that trains in seconds."""
    parts = ["[schedule]\nmax_lr = 1e-2\nwarmup_steps = 2\nfinal_lr = 1e-4\nalpha = 0.6\n"]
    for index in range(1, versions + 1):
        files = f'train = "v{index}_train.txt"\ntest = "v{index}_test.txt"\n'
        parts.append(f'[[versions]]\nname = "v{index}"\nsteps = {steps}\n{files}')
    parts.append(f"[model]\nhidden_size = {hidden_size}\nintermediate_size = 64\nn_layers = 2\nn_heads = 2\n")
    parts.append(f"[data]\nseq_len = 32\nvocab_size = 400\n{data}\n")
    parts.append(f"[train]\nglobal_batch_size = 8\nranks = 2\n{train}\n")
    parts.append(f"[deepspeed]\n{deepspeed}\n")
    plan = corpus / f"{name}.toml"
    plan.write_text("\n".join(parts))
    return plan


def metrics(out: Path, path: str) -> list[dict[str, Any]]:
    """Return a path's metrics without what differs from run to run."""
    lines = (out / path / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def checkpoint(out: Path, path: str, step: int) -> dict[str, Any]:
    """Return every tensor and number of a checkpoint, by file and place."""
    found: dict[str, Any] = {}
    files = sorted((out / path / "checkpoints" / f"global_step{step}").glob("*.pt"))
    assert files
    for file in files:
        _flatten(torch.load(file, weights_only=False), file.name, found)
    return found


def _flatten(value: Any, place: str, found: dict[str, Any]) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if key != "ds_config":  # it holds the folder's name
                _flatten(item, f"{place}/{key}", found)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _flatten(item, f"{place}/{index}", found)
    elif isinstance(value, torch.Tensor | int | float | str):
        found[place] = value


def assert_same_bits(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Assert that two checkpoints are equal in every tensor and number."""
    assert a.keys() == b.keys()
    for place, value in a.items():
        same = torch.equal(value, b[place]) if isinstance(value, torch.Tensor) else value == b[place]
        assert same, f"{place}: {value} != {b[place]}"


def ranks_of(out: Path) -> list[int]:
    """Return the processes that train in a run folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if command[2:4] == [b"-m", b"pathswitch.trainer"] and os.fsencode(out) in command:
                found.append(int(entry.name))
    return sorted(found)


def wait_for_step(run: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until the main path has done ``step`` updates."""
    file = out / "path_switching" / "main" / "metrics.jsonl"
    for _ in range(15_000):
        if file.is_file() and file.read_text().count("\n") >= step:
            return
        assert run.poll() is None, run.communicate()
        time.sleep(0.02)
    raise AssertionError(f"{file} does not reach step {step}")


def wait_until_gone(pids: list[int]) -> None:
    for _ in range(1500):
        if not any(Path(f"/proc/{pid}").exists() for pid in pids):
            return
        time.sleep(0.02)
    raise AssertionError(f"still running: {pids}")


def assert_equal_runs(a: Path, b: Path) -> None:
    """Compare the bits of two runs of a plan of ``SIZE``."""
    for path, end in (("main", FORK), ("v1", 40)):
        assert metrics(a / "path_switching", path) == metrics(b / "path_switching", path)
        assert_same_bits(checkpoint(a / "path_switching", path, end), checkpoint(b / "path_switching", path, end))
    for file in ("evaluation.json", "release/model.safetensors"):
        assert (a / "path_switching/v1" / file).read_bytes() == (b / "path_switching/v1" / file).read_bytes()
