"""What durable checkpoints cost: ``python tests/bench/checkpoint_io.py [--folder DIR] [--gib 2] [--runs 5]``.

Prints medians, and ratios of medians of the same run, of forks against cp, of hashing against sha256sum and b3sum, of
DeepSpeed's save with manifest and commit against the one without, and the seconds that a verification takes. Ways that
are compared take turns, each time in another order.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for ninja

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from pathswitch.checkpoint import (
    FileEntry,
    Manifest,
    Parallelism,
    Policy,
    begin_save,
    commit,
    hash_file,
    verify_checkpoint,
)
from pathswitch.checkpoint.fork import fork_checkpoint

GIB = 1 << 30
SHARDS, SHARD_SIZE = 1024, GIB
CHUNK = 16 << 20
BYTES_PER_PARAMETER = 16  # of a checkpoint in fp32: weights, master weights and Adam's two moments
COLUMNS = 8192
TAG = "global_step1"

Way = Callable[[], object]


def compare(ways: dict[str, Way], runs: int, after: Way = lambda: None) -> dict[str, float]:
    """Return the median seconds of each way; ``after`` tidies up behind each, untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs):
        names = list(ways)
        for name in names[run % len(names) :] + names[: run % len(names)]:
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
            after()
    for name, times in seconds.items():
        print(f"  {name:<44} {statistics.median(times):8.3f} s  ({min(times):.3f}..{max(times):.3f})", flush=True)
    return {name: statistics.median(times) for name, times in seconds.items()}


def print_ratios(medians: dict[str, float], ours: str) -> None:
    for name, seconds in medians.items():
        if name != ours:
            print(f"  {ours} / {name}: {medians[ours] / seconds:.3f}")


def manifest_of(files: dict[str, FileEntry]) -> Manifest:
    """Return the manifest of a main path's checkpoint with these files."""
    sizes = dict.fromkeys(("world_size", "data_parallel_size"), SHARDS)
    ones = dict.fromkeys(("zero_stage", "tensor_parallel_size", "pipeline_parallel_size"), 1)
    return Manifest(
        tag=TAG,
        paradigm="path_switching",
        path="main",
        step=1,
        global_steps=1,
        samples_seen=0,
        tokens_seen=None,
        next_lr=1e-3,
        schedule_digest="0" * 64,
        plan_digest="0" * 64,
        data_digests=None,
        parallelism=Parallelism(**sizes, **ones),
        dtype="fp32",
        versions={},
        git_commit=None,
        parent=None,
        files=files,
    )


def sparse_checkpoint(folder: Path) -> Path:
    """Commit a checkpoint of SHARDS files that are nothing but holes."""
    staging = begin_save(folder / TAG)
    files = {}
    for rank in range(SHARDS):
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        (staging / name).touch()
        os.truncate(staging / name, SHARD_SIZE)
        if rank == 0:
            zeros = hash_file(staging / name)
        files[name] = zeros.model_copy(update={"rank": rank})
    commit(folder / TAG, manifest_of(files))
    return folder / TAG


def can_reflink(folder: Path) -> bool:
    """Return whether ``cp --reflink=always`` works in a folder."""
    (folder / "original").write_bytes(b"a block")
    command = ["cp", "--reflink=always", folder / "original", folder / "clone"]
    return subprocess.run(command, capture_output=True).returncode == 0


def compare_forks(name: str, source: Path, folder: Path, runs: int) -> None:
    """Print forks of a checkpoint against copies of it."""
    copies = folder / "copies"
    methods = set()

    def fork() -> None:
        target = copies / TAG
        made = fork_checkpoint(source, target, policy=Policy(), paradigm="path_switching", path="v1", verify="sizes")
        methods.add(made.method)

    def copy(*options: str) -> Way:
        copies.mkdir(exist_ok=True)
        return lambda: subprocess.run(["cp", "-r", *options, source, copies], check=True)

    def remove() -> None:
        shutil.rmtree(copies)
        copies.mkdir()
        os.sync()

    ways: dict[str, Way] = {"fork": fork, "cp -r": copy(), "cp -r --link": copy("--link")}
    if can_reflink(folder):
        ways["cp -r --reflink=always"] = copy("--reflink=always")
    print(f"fork of {name}, verified by sizes:")
    print_ratios(compare(ways, runs, remove), "fork")
    print(f"  the fork is made of a {' and '.join(map(str, methods))} for each file, and durable; cp's copies are not")
    if not can_reflink(folder):
        print("  cp -r --reflink=always: this file system cannot reflink")


def random_file(path: Path, size: int) -> Path:
    """Write random bytes, which stay in the page cache."""
    with path.open("wb") as file:
        for start in range(0, size, CHUNK):
            file.write(os.urandom(min(CHUNK, size - start)))
        os.fsync(file.fileno())
    return path


def compare_hashes(folder: Path, size: int, runs: int) -> None:
    """Print the throughput of ``hash_file`` and of the usual tools."""
    file = random_file(folder / "random", size)
    ways: dict[str, Way] = {"hash_file": lambda: hash_file(file)}
    for tool in ("sha256sum", "b3sum"):
        if shutil.which(tool):
            ways[tool] = lambda tool=tool: subprocess.run([tool, file], check=True, stdout=subprocess.DEVNULL)
    print(f"hashing {size / GIB:g} GiB in the page cache on {len(os.sched_getaffinity(0))} cores:")
    medians = compare(ways, runs)
    print_ratios(medians, "hash_file")
    print("  " + ", ".join(f"{name} {size / seconds / 1e9:.2f} GB/s" for name, seconds in medians.items()))
    if "b3sum" not in ways:
        print("  b3sum: not on PATH")
    file.unlink()


def engine_of(size: int) -> Any:
    """Return an engine on one rank, behind its first update, whose checkpoint has at least ``size`` bytes."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    rows = -(-size // (BYTES_PER_PARAMETER * COLUMNS))
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "scheduler": {
            "type": "PathSwitchLR",
            "params": {"max_lr": 1e-3, "warmup_steps": 0, "versions": [{"name": "v1", "steps": 100}]},
        },
        "zero_optimization": {"stage": 1},
    }
    model = torch.nn.Linear(COLUMNS, rows, bias=False)
    engine = deepspeed.initialize(model=model, config=settings, model_parameters=list(model.parameters()))[0]
    engine.backward(engine(torch.ones(1, COLUMNS)).square().mean())
    engine.step()
    return engine


def compare_saves(folder: Path, size: int, runs: int) -> None:
    """Print DeepSpeed's own save, also made durable, against the one that is hashed and committed."""
    engine, stock = engine_of(size), DeepSpeedEngine.save_checkpoint.__wrapped__

    def save_durably() -> None:
        stock(engine, folder / "saves")
        for entry in (folder / "saves" / TAG).iterdir():
            with entry.open("rb") as file:
                os.fsync(file.fileno())

    def remove() -> None:
        shutil.rmtree(folder / "saves")
        os.sync()

    ways: dict[str, Way] = {
        "DeepSpeed's save": lambda: stock(engine, folder / "saves"),
        "DeepSpeed's save and fsync": save_durably,
        "pathswitch's save": lambda: engine.save_checkpoint(folder / "saves"),
    }
    engine.save_checkpoint(folder / "kept")
    tag = folder / "kept" / TAG
    size = sum(file.stat().st_size for file in tag.iterdir())
    print(f"save of {size / GIB:.2f} GiB by DeepSpeed, ZeRO 1 on one rank:")
    print_ratios(compare(ways, runs, remove), "pathswitch's save")
    print(f"verification of {size / GIB:.2f} GiB in the page cache, one process:")
    compare({"verify_checkpoint": lambda: verify_checkpoint(tag)}, runs)
    compare_forks(f"{size / GIB:.2f} GiB", tag, folder, runs)


def main() -> None:
    """Measure everything in one folder, which is removed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="on the file system to measure; temporary files' own if not given")
    parser.add_argument("--gib", type=float, default=2, help="size of what is hashed and saved")
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f}")
    with TemporaryDirectory(dir=arguments.folder, prefix="checkpoint_io_") as temporary:
        folder, size = Path(temporary), int(arguments.gib * GIB)
        sparse = sparse_checkpoint(folder / "sparse")
        compare_forks(f"{SHARDS} sparse shards of {SHARD_SIZE / GIB:g} GiB", sparse, folder, arguments.runs)
        print("  (cp -r copies no data either, since it finds holes only)")
        compare_hashes(folder, size, arguments.runs)
        compare_saves(folder, size, arguments.runs)
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
